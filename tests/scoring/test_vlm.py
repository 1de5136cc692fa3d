"""Probability of an answer, on a tiny Qwen2-VL whose tokens are bytes."""

import pytest
import torch
import yaml

import mmalign
from mmalign.records import Comparison, Text, UserError
from mmalign.scoring import Card, list_scorers, load_scorer
from mmalign.scoring.chat import Chat
from mmalign.scoring.frames import reader
from mmalign.scoring.vlm import FORMULAS, question_of
from mmalign.surrogate import AnswerTokens, Keys
from tests.conftest import picture
from tests.tiny import tiny_video_vlm

PROMPTS = ["a fox", "two foxes, one of them {red}", "b"]
FIRST = {"formula": "first", "question": 'Is it "{prompt}"?', "positive": ["y"], "negative": ["n"]}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_video_vlm(tmp_path_factory.mktemp("vlm"))


@pytest.fixture(scope="module")
def chat(source):
    return Chat.load(source)


@pytest.fixture
def made(source, tmp_path):
    """Loads a scorer of a card with the given facts."""

    def make(score, **facts):
        facts = {"name": "tiny", "family": "vlm", "model": {"transformers": str(source)}, "score": score} | facts
        (tmp_path / "card.yaml").write_text(yaml.safe_dump(facts))
        return load_scorer(tmp_path)

    return make


def pictures():
    return [picture(n, (28 * n, 28)) for n in (1, 2, 3)]


def asked(chat, words):
    """Log-probabilities of words as the answer, [N]: each row by itself."""
    contents = [[one, f'Is it "{prompt}"?'] for one, prompt in zip(pictures(), PROMPTS, strict=True)]
    return {word: torch.stack([chat.logp([content], [word])[0] for content in contents]) for word in words}


def test_yes_against_no_is_a_sigmoid(made, chat):
    logp = {word: rows[:, 0] for word, rows in asked(chat, "yYnN").items()}
    scores = made(FIRST).score(pictures(), PROMPTS, batch_size=2)
    torch.testing.assert_close(scores, torch.sigmoid(logp["y"] - logp["n"]), atol=1e-5, rtol=1e-5)
    assert scores.std() > 1e-3
    both = made(FIRST | {"positive": ["y", "Y", "yes"], "negative": ["n", "N"]}).score(pictures(), PROMPTS)
    yes, no = (sum(logp[word].exp() for word in words) for words in ("yY", "nN"))  # "yes" is three tokens
    torch.testing.assert_close(both, yes / (yes + no), atol=1e-5, rtol=1e-5)


def test_without_negatives_the_whole_vocabulary_counts(made, chat):
    only = {name: value for name, value in FIRST.items() if name != "negative"}
    logp = asked(chat, "y")["y"][:, 0]
    torch.testing.assert_close(made(only).score(pictures(), PROMPTS), logp.exp(), atol=1e-6, rtol=1e-4)


def test_mean_is_over_the_tokens_of_the_answer(made, chat):
    logp = asked(chat, ["Yes"])["Yes"]
    assert logp.shape == (3, 3)
    scores = made(FIRST | {"formula": "mean", "positive": ["Yes"]}).score(pictures(), PROMPTS)
    torch.testing.assert_close(scores, logp.mean(1).exp(), atol=1e-6, rtol=1e-4)


def test_input_pictures_come_first_and_are_labelled(made, chat):
    score = FIRST | {"label": "<img{n}>: ", "conditions": 1}
    scorer = made(score)
    (found,) = scorer.score([picture(1)], ["a"], conditions=[[picture(2)]])
    logits = chat.logits([["<img1>: ", picture(2), "<img2>: ", picture(1), 'Is it "a"?']])[0]
    yes, no = (chat.processor.tokenizer(word).input_ids[0] for word in "yn")
    assert found.item() == pytest.approx(torch.sigmoid(logits[yes] - logits[no]).item(), abs=1e-5)
    (swapped,) = scorer.score([picture(2)], ["a"], conditions=[[picture(1)]])
    assert swapped != found
    assert scorer.preparation != made(FIRST).preparation
    with pytest.raises(UserError, match="compares with 1 input pictures, not 0"):
        scorer.score([picture(1)], ["a"])


def test_a_video_is_read_at_the_cards_rate(made, chat):
    frames = [picture(n, (28, 28)) for n in range(4)]
    scorer = made(FIRST, judges="video", preprocess={"frames": {"fps": 2, "most": 2}})
    logits = chat.logits([[[frames[0], frames[2]], 'Is it "a"?']])[0]
    yes, no = (chat.processor.tokenizer(word).input_ids[0] for word in "yn")
    (found,) = scorer.score([frames], ["a"])
    assert found.item() == pytest.approx(torch.sigmoid(logits[yes] - logits[no]).item(), abs=1e-5)


def test_likelihood_is_that_of_the_trained_model(made, source):
    """Against the modality that learns from such answers, less the token that ends the turn."""
    answers = [Text("A red fox."), Text("no")]
    scorer = made({"formula": "likelihood"}, judges="text")
    found = scorer.score(answers, ["What is it?"] * 2, conditions=[[picture(1)]] * 2)
    modality = mmalign.load(source, dtype=torch.float32)
    encoded = modality.encode(
        [Comparison(id="a", prompt="What is it?", media=tuple(answers), score=(1, 0), condition=(picture(1),))]
    )
    nothing = torch.zeros(2, dtype=torch.int64)
    probe = AnswerTokens()(encoded.x0, encoded.cond, Keys(0, nothing, nothing, nothing), None)
    with torch.no_grad():
        logits = modality.predict(probe, "policy").log_softmax(-1)  # the last positions, of the longest answer
    for row, answer in enumerate(answers):
        tokens = modality.processor.tokenizer(answer).input_ids
        expected = sum(logits[row, n, token].item() for n, token in enumerate(tokens)) / len(tokens)
        assert found[row].item() == pytest.approx(expected, abs=1e-4)
    assert found.max() < 0
    with pytest.raises(UserError, match="is no text"):
        scorer.score([picture(1)], ["a"])


@pytest.mark.parametrize(
    ("score", "facts", "match"),
    [
        ({"formula": "frist"}, {}, "did you mean 'first'"),
        ({"formula": "likelihood"}, {}, "judges text"),
        ({"formula": "first"}, {}, "score.positive must list"),
        ({"formula": "first", "positive": [True]}, {}, "in quotes"),
        ({"formula": "first", "positive": ["Yes"]}, {}, r"none of \['Yes'\] is one token"),
        (FIRST, {"model": {}}, "model needs `transformers"),
        (FIRST, {"preprocess": {"size": 3}}, "preprocess: unknown field 'size'"),
        (FIRST, {"judges": "video", "preprocess": {"frames": {"rate": 3}}}, "preprocess:"),
        (FIRST | {"question": {"file": "q.txt", "source": "the paper"}}, {}, "q.txt is missing: write .* the paper"),
    ],
)
def test_cards_that_cannot_be(made, score, facts, match):
    with pytest.raises(UserError, match=match):
        made(score, **facts)


def test_a_question_in_a_file_is_checked(made, tmp_path):
    (tmp_path / "q.txt").write_text("\nIs it {text_prompt}?\n")
    question = {"file": "q.txt", "source": "us", "sha256": "0" * 64}
    with pytest.raises(UserError, match="sha256 differs"):
        made(FIRST | {"question": question})
    assert made(FIRST | {"question": question | {"sha256": ""}}).question == "\nIs it {prompt}?\n"


def test_a_prompt_cannot_end_the_turn(made):
    with pytest.raises(UserError, match="special token"):
        made(FIRST).score([picture(1)], ["a<|im_end|>"])


@pytest.mark.parametrize("card", [card for card in list_scorers() if card.family == "vlm"], ids=lambda card: card.name)
def test_the_bundled_cards(card: Card):
    assert card.score["formula"] in FORMULAS
    assert reader(card)
    assert card.judges == "text" or card.name == "paco-reward" or "{prompt}" in question_of(card)
    assert all(isinstance(word, str) for word in card.score.get("positive", []) + card.score.get("negative", []))
