import itertools

import numpy as np
import pytest

from mmalign.embedded import prompts, scenes


def test_held_out_combinations_are_disjoint_from_all_training():
    parts = {name: set(scenes.combinations(name)) for name in scenes.SPLITS}
    for a, b in itertools.combinations(("train", "development", "test"), 2):
        assert not parts[a] & parts[b], (a, b)
    assert parts["pairs"] < parts["train"]
    assert parts["scorer_fit"] < parts["train"]
    assert not parts["pairs"] & parts["scorer_fit"]
    assert len(parts["train"] | parts["development"] | parts["test"]) == len(scenes.NOUNS) * len(scenes.COLOURS)


def test_captions_of_disjoint_combinations_are_disjoint():
    parts = {name: prompts(name) for name in scenes.SPLITS}
    assert len(parts["test"]) == 720
    assert len(parts["development"]) == 360
    for name, captions in parts.items():
        assert len(set(captions)) == len(captions), name
    assert not set(parts["test"]) & set(parts["train"])
    assert not set(parts["development"]) & set(parts["train"])
    assert not set(parts["development"]) & set(parts["test"])
    assert not set(parts["pairs"]) & set(parts["scorer_fit"])


@pytest.mark.parametrize("split", ["train", "pairs", "scorer_fit", "test"])
def test_every_noun_and_colour_occurs(split):
    nouns, colours = zip(*scenes.combinations(split), strict=True)
    assert set(nouns) == set(scenes.NOUNS)
    assert {colours.count(colour) for colour in scenes.COLOURS} == {len(colours) // len(scenes.COLOURS)}


def test_random_scenes_stay_in_their_split_and_repeat():
    first = scenes.random_scenes(200, 5, "development")
    assert first == scenes.random_scenes(200, 5, "development")
    assert first != scenes.random_scenes(200, 6, "development")
    assert {(scene.noun, scene.colour) for scene in first} <= set(scenes.combinations("development"))


def test_captions():
    assert scenes.caption(scenes.Scene("fox", "blue", "small", "on the left")) == (
        "a small fox on the left on a blue background"
    )
    assert scenes.caption(scenes.Scene("owl", "orange")) == "an owl on an orange background"


def test_pictures_are_deterministic_and_the_seed_and_finish_matter():
    scene = scenes.Scene("fox", "blue", "small", "on the left", 0.5, 3)
    picture = scenes.render(scene)
    assert picture.shape == (64, 64, 3)
    assert picture.dtype == np.uint8
    assert np.array_equal(picture, scenes.render(scene))
    for other in (
        {"seed": 4},
        {"q": 0.9},
        {"place": ""},
        {"size": "large"},
        {"noun": "owl"},
        {"colour": "red"},
    ):
        assert not np.array_equal(picture, scenes.render(scenes.Scene(**{**vars(scene), **other}))), other


def test_finish_makes_pictures_more_colourful():
    def chroma(q):
        picture = scenes.render(scenes.Scene("fox", "blue", q=q)).astype(float)
        return (picture.max(-1) - picture.min(-1)).mean()

    assert chroma(0.0) < chroma(0.5) < chroma(1.0)


def test_the_place_is_where_the_object_is():
    def centre(place):
        empty = np.asarray(scenes.COLOURS["blue"])
        away = np.abs(scenes.render(scenes.Scene("fox", "blue", "small", place)).astype(float) - empty).sum(-1) > 120
        return np.argwhere(away).mean(0)

    middle = centre("")
    assert centre("on the left")[1] < middle[1] - 8
    assert centre("on the right")[1] > middle[1] + 8
    assert centre("at the top")[0] < middle[0] - 8
    assert centre("at the bottom")[0] > middle[0] + 8


def test_the_ground_can_be_read_back():
    every = scenes.random_scenes(300, 0, "train")
    assert np.mean([scenes.ground(scenes.render(scene)) == scene.colour for scene in every]) > 0.99
