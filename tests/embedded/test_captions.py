"""What is right in an answer, and the small model that answers."""

import numpy as np
import pytest
from numpy.random import RandomState

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
