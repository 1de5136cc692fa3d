"""What is right in an answer, and the small model that answers."""

import numpy as np
import pytest
import torch
from numpy.random import RandomState
from PIL import Image

import mmalign
from mmalign import embedded
from mmalign.embedded import captions, scenes
from mmalign.embedded.scenes import Scene, caption

FOX = Scene("fox", "blue", "small", "on the left")


def test_every_caption_has_one_scene_of_its_split_and_is_right_in_all_facts():
    for split in ("pairs", "development", "test"):
        shown = captions.described(split)
        assert [caption(scene) for scene in shown] == scenes.prompts(split)
        assert all(
            captions.score(caption(scene), scene) == 1 and captions.exact(caption(scene), scene) for scene in shown
        )
        assert shown == captions.described(split)
        assert len({scene.seed for scene in shown}) == len(shown)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("a small fox on the left on a blue background", 1),
        ("a small fox on the left on a red background", 0.5),
        ("a fox on the left on a blue background", 0.5),  # silence says that the size is the middle one
        ("a large carrot at the top on a pink background", -1),
        ("a small fox, a small dog on the left on a blue or a red background", 0.5),  # two wrong beside four right
        ("a foxglove, smaller", 0),  # no fact at all
        ("", 0),
    ],
)
def test_an_answer_is_scored_by_its_facts(answer, score):
    assert captions.score(answer, FOX) == score


def test_a_car_is_no_carrot():
    assert captions.claims("a carrot on a red background")["noun"] == {"carrot"}


def test_only_the_caption_itself_is_exact():
    assert not captions.exact("a small fox on the left on a blue background.", FOX)


def test_facts_are_wrong_at_the_rate_asked_for_and_wrong_values_are_equally_likely():
    rng = RandomState(0)
    drawn = [captions.corrupted(FOX, 0.4, rng) for _ in range(4000)]
    for fact, values in captions.FACTS.items():
        said = [getattr(scene, fact) for scene in drawn]
        assert set(said) == set(values)
        assert np.mean([value != getattr(FOX, fact) for value in said]) == pytest.approx(0.4, abs=0.03)
    sizes = [scene.size for scene in drawn]
    assert sizes.count("") == pytest.approx(sizes.count("large"), rel=0.15)
    assert captions.corrupted(FOX, 0, rng) == FOX


@pytest.fixture(scope="module")
def modality():
    return mmalign.load(embedded.path("vlm"), dtype=torch.float32)


def asked(modality, shown, **settings):
    """The model's answers to the question about scenes."""
    pictures = [(Image.fromarray(scenes.render(scene)),) for scene in shown]
    sampling = {**embedded.VLM_SAMPLING, **settings}
    return modality.generate([captions.QUESTION] * len(shown), seeds=range(len(shown)), images=pictures, **sampling)


def test_the_folder_is_small_and_loads_in_float32_with_a_token_for_every_word():
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = embedded.path("vlm")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 8e6
    network = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True)
    assert network.dtype == torch.float32
    tokenizer = AutoProcessor.from_pretrained(folder, local_files_only=True).tokenizer
    for text in scenes.prompts("test")[::10]:
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.split())
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer("naïve Füchse?").input_ids) == "naïve Füchse?"


def test_it_sees_what_is_in_pictures_never_trained_on_and_often_says_something_else(modality):
    shown = captions.described("development")[:32]
    likeliest, sampled = asked(modality, shown, temperature=0), asked(modality, shown)
    assert sampled[:2] == asked(modality, shown[:2])
    scores = [np.mean([captions.score(*row) for row in zip(said, shown, strict=True)]) for said in (likeliest, sampled)]
    assert scores[0] > 0.5  # 0.66 on all of them
    assert -0.3 < scores[1] < 0.2  # -0.04


def test_its_card_says_what_it_is():
    card = (embedded.path("vlm") / "README.md").read_text()
    assert "MIT" in card
    assert "{" not in card
