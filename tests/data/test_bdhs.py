"""Made-up answers: with a model that is played, what it is asked; with a tiny Qwen2-VL, whole pairs."""

from dataclasses import replace

import numpy as np
import pytest

import mmalign
from mmalign.data.bdhs import SENTENCE, hallucinated, same_words
from mmalign.data.importers import read_comparisons, write_comparisons
from mmalign.records import Comparison, Text, UserError
from tests.conftest import picture
from tests.modalities.test_soft_tokens import speaks_letters
from tests.tiny import tiny_vlm

TRUE = Text("A bowl of oranges is on the table. It is blue!\n\nIn addition, there is a banana.")


def item(answer=TRUE, number=0):
    return Comparison(f"item {number}", "Describe it.", (answer,), (1.0,), condition=(picture(number, (56, 56)),))


class Played:
    """Ends every sentence in its own way, and keeps what it was asked."""

    def __init__(self, end=" made up."):
        self.end, self.asked = end, []

    def generate(self, prompts, **given):
        self.asked.append({"prompts": prompts, **given})
        return [Text(start + self.end) for start in given["starts"]]


def test_sentences_put_together_are_the_answer():
    assert "".join(SENTENCE.findall(TRUE)) == TRUE
    assert [len(text.split()) for text in SENTENCE.findall(TRUE)] == [8, 3, 6]
    assert SENTENCE.findall("It costs 3.50 euros, no more") == ["It costs 3.50 euros, no more"]


def test_each_sentence_follows_the_true_ones_and_begins_as_it_did():
    model = Played()
    (pair,) = hallucinated(model, [item()], tries=2)
    (asked,) = model.asked
    true = SENTENCE.findall(TRUE)
    assert asked["prompts"] == ["Describe it."] * 3
    assert asked["stop"] == "."
    for place, start in enumerate(asked["starts"]):
        before = "".join(true[:place]).rstrip()
        assert start.startswith(before)
        assert true[place].startswith(start[len(before) :].strip())
    assert pair.media[0] == TRUE
    said = [start[len("".join(true[:n]).rstrip()) :].strip() for n, start in enumerate(asked["starts"])]
    first, second, third = (f"{text} made up.".strip() for text in said)
    assert pair.media[1] == f"{first} {second}\n\n{third}"
    assert pair.score == (1.0, 0.0)
    assert pair.condition == item().condition
    assert "bdhs 0.99" in pair.source[1]


def test_nearly_every_token_is_hidden_and_every_try_hides_others():
    model = Played()
    hallucinated(model, [item()], share=0.7, alike=lambda one, other: True)
    assert len(model.asked) == 5
    masks = [np.stack([hide(100) for hide in asked["hidden"]]) for asked in model.asked]
    assert all((mask.sum(1) == 70).all() and (mask == mask[0]).all() for mask in masks)  # one picture, one mask
    assert len({mask.tobytes() for mask in masks}) == 5
    assert len({tuple(asked["starts"]) for asked in model.asked}) == 5
    last = model.asked[-1]
    assert last["starts"] == [""]  # without the true answer
    assert last["stop"] is None


def test_an_answer_that_stays_the_same_makes_no_pair():
    def true(prompts, *, starts, **given):
        return [TRUE for _ in starts]

    model = Played()
    model.generate = true
    told = []
    assert hallucinated(model, [item()], tries=1, progress=told.append) == []
    assert told == [1]
    assert same_words("A  dog!", "a dog")
    assert not same_words("a dog", "a cat")


def test_yes_and_no_turn_every_other_time():
    model = Played(end="")
    hallucinated(model, [item(Text("Yes"), number) for number in range(200)], tries=2)
    begun = [asked["starts"][0] for asked in model.asked if asked["stop"]]
    assert len(begun) == 200
    assert set(begun) == {"", "Yes", "No"}
    assert begun.count("No") / 200 == pytest.approx(0.25, abs=0.1)


def test_a_model_makes_the_same_pairs_again_and_they_are_trained_on(tmp_path):
    model = speaks_letters(mmalign.load(tiny_vlm(tmp_path / "model")))
    items = [item(Text(f"there are {n} dogs. they run."), n) for n in range(3)]
    settings = {"share": 0.5, "tries": 2, "max_new_tokens": 6}
    pairs = hallucinated(model, items, **settings)
    assert [pair.media[0] for pair in pairs] == [one.media[0] for one in items]
    assert all(pair.media[1] != pair.media[0] for pair in pairs)
    assert [p.media[1] for p in hallucinated(model, items[::-1], **settings)][::-1] == [p.media[1] for p in pairs]
    assert hallucinated(model, items, seed=1, **settings)[0].media[1] != pairs[0].media[1]
    write_comparisons(tmp_path / "pairs", pairs)
    again = read_comparisons(str(tmp_path / "pairs")).comparisons
    assert [pair.media for pair in again] == [pair.media for pair in pairs]
    assert len(model.encode(list(again))) == 6


def test_what_cannot_be_hidden_is_refused():
    with pytest.raises(UserError, match="'item 0': it shows no picture"):
        hallucinated(Played(), [replace(item(), condition=None)])
    with pytest.raises(UserError, match="best medium is no text"):
        hallucinated(Played(), [replace(item(), media=(picture(1),))])
    for wrong in ({"share": 0}, {"share": 1.1}, {"tries": 0}):
        with pytest.raises(ValueError, match="needs a share in"):
            hallucinated(Played(), [item()], **wrong)
