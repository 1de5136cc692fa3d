from itertools import pairwise

import numpy as np
import pytest
import torch

from mmalign.data import perturb
from mmalign.records import Text
from tests.conftest import picture


def many(make, tries=40):
    """What different keys give."""
    return [make(f"item {n}") for n in range(tries)]


def test_all_are_functions_of_seed_and_key():
    def wave(seed, key):
        return perturb.perturb_sound(np.arange(12.0)[None], 1, range(1, 12), "shuffle", seed, key)[1]

    for make in (
        lambda seed, key: perturb.shuffled(20, seed, key),
        lambda seed, key: perturb.kept(40, 4, seed, key),
        lambda seed, key: perturb.kept(40, 4, seed, key, groups=[n // 3 for n in range(40)]),
        lambda seed, key: perturb.kept(40, 4, seed, key, similarity=np.ones((40, 40))),
        lambda seed, key: perturb.hidden(40, 0.5, seed, key).tolist(),
        wave,
    ):
        assert make(0, "a") == make(0, "a")
        assert len({str(make(*each)) for each in ((0, "a"), (1, "a"), (0, "b"), (0, 7))}) == 4


@pytest.mark.parametrize("count", [2, 3, 7, 16, 33])
@pytest.mark.parametrize("magnitude", [None, 2, 4, 16])
def test_permutations_are_never_the_order_itself_and_can_be_undone(count, magnitude):
    for order in (perturb.reversed_order(count, magnitude), *many(lambda k: perturb.shuffled(count, 0, k, magnitude))):
        assert sorted(order) == list(range(count))
        assert order != list(range(count))
        for frames in ([f"{n}.png" for n in range(count)], torch.arange(count), np.arange(count)):
            back = perturb.take(perturb.take(frames, order), perturb.inverse(order))
            assert list(back) == list(frames)


def test_runs_stay_together_as_in_temple():
    assert perturb.reversed_order(8, 4) == [6, 7, 4, 5, 2, 3, 0, 1]
    assert perturb.reversed_order(7, 2) == [6, 3, 4, 5, 0, 1, 2]
    assert perturb.reversed_order(3) == [2, 1, 0]
    order = perturb.shuffled(16, 0, "a", magnitude=4)
    assert all(order[n : n + 4] == list(range(order[n], order[n] + 4)) for n in range(0, 16, 4))


@pytest.mark.parametrize("groups", [None, [n // 5 for n in range(33)]])
def test_what_is_kept_is_exact_and_nested_by_difficulty(groups):
    for key in range(20):
        left = [perturb.kept(33, magnitude, 0, key, groups=groups) for magnitude in (16, 8, 4, 2)]
        assert [len(indices) for indices in left] == [2, 4, 8, 16]
        for fewer, more in pairwise(left):
            assert set(fewer) < set(more)
            assert more == sorted(more)
    assert perturb.kept(3, 16, 0, 0) in ([0], [1], [2])


def test_groups_go_as_a_whole_and_the_similar_go_together():
    scenes = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    for key in range(20):
        left = perturb.kept(12, 2, 0, key, groups=scenes)
        whole = [sum(scenes[index] == scene for index in left) for scene in range(3)]
        assert sorted(whole) == [0, 2, 4]
    alike = np.kron(np.eye(2), np.ones((4, 4)))
    for key in range(20):
        assert perturb.kept(8, 2, 0, key, similarity=alike) in ([0, 1, 2, 3], [4, 5, 6, 7])
    assert len(perturb.kept(8, 4, 0, 0, similarity=alike)) == 2


def test_the_curriculum_begins_with_what_differs_most():
    assert perturb.curriculum(32) == [16, 8, 4, 2]
    assert perturb.curriculum(8) == [8, 4, 2]
    assert perturb.curriculum(2) == [2]
    for count in (2, 5, 8, 32):
        left = [len(perturb.kept(count, magnitude, 0, 0)) for magnitude in perturb.curriculum(count)]
        assert left == sorted(set(left))
    assert perturb.curriculum(1) == []


def test_hidden_tokens_are_exact_and_nested():
    masks = [perturb.hidden(50, ratio, 0, "a") for ratio in (0.001, 0.1, 0.5, 0.99, 1.0)]
    assert [int(mask.sum()) for mask in masks] == [1, 5, 25, 50, 50]
    assert masks[-1].all()
    for fewer, more in pairwise(masks):
        assert (fewer <= more).all()


def test_a_blurred_picture_is_another_and_smoother():
    image = picture(0)
    rough = [
        np.abs(np.diff(np.asarray(one, dtype=float), axis=0)).mean()
        for one in (image, perturb.blurred(image, 1), perturb.blurred(image, 4))
    ]
    assert rough[0] > rough[1] > rough[2]


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_sounds_by_their_events(kind):
    wave = kind([[0.0, 0, 0, 1, 1, 2, 2, 2, 2], [5.0, 5, 5, 6, 6, 7, 7, 7, 7]])
    made, order = perturb.perturb_sound(wave, 2, [1.5, 2.5], "reverse", 0, 0)
    assert order == [2, 1, 0]
    assert made[0].tolist() == [2, 2, 2, 2, 1, 1, 0, 0, 0]
    assert made[1].tolist() == [7, 7, 7, 7, 6, 6, 5, 5, 5]
    for key in range(20):
        made, order = perturb.perturb_sound(wave, 2, [1.5, 2.5], "shuffle", 0, key)
        assert sorted(order) == [0, 1, 2]
        assert made.shape == (2, 9)
        assert made.tolist() != wave.tolist()
        made, order = perturb.perturb_sound(wave, 2, [1.5, 2.5], "drop", 0, key)
        assert made.shape[1] == 9 - {(1, 2): 3, (0, 2): 2, (0, 1): 4}[tuple(order)]
    assert perturb.perturb_sound(kind([[1.0, 1.0]]), 1, [1], "reverse", 0, 0) is None


def test_a_comparison_says_how_it_was_made():
    one = perturb.comparison("what?", Text("a dog"), Text("an owl"), "wrong_object", 3, "row-7", condition=[picture(0)])
    assert one.source == ("original", "wrong_object seed 3 key row-7")
    assert one.score == (1.0, 0.0)
    assert len(one.condition) == 1
    again = perturb.comparison("what?", Text("b"), Text("c"), "wrong_object", 3, "row-7")
    assert again.id == one.id
    others = [
        ("why?", "wrong_object", 3, "row-7"),
        ("what?", "other", 3, "row-7"),
        ("what?", "wrong_object", 4, "row-7"),
    ]
    ids = {perturb.comparison(prompt, Text("b"), Text("c"), *rest).id for prompt, *rest in others}
    assert len(ids | {one.id}) == 4


def test_what_cannot_be_perturbed_is_said():
    wave = np.zeros((1, 10))
    for make, sentence in (
        (lambda: perturb.shuffled(1, 0, 0), "1 things with magnitude None"),
        (lambda: perturb.kept(8, 1, 0, 0), "8 things with magnitude 1"),
        (lambda: perturb.hidden(8, 0, 0, 0), "ratio 0"),
        (lambda: perturb.hidden(8, 1.1, 0, 0), "ratio 1.1"),
        (lambda: perturb.blurred(picture(0), 0), "radius is 0"),
        (lambda: perturb.perturb_sound(wave, 1, [], "drop", 0, 0), "have to rise"),
        (lambda: perturb.perturb_sound(wave, 1, [5, 4], "drop", 0, 0), "have to rise"),
        (lambda: perturb.perturb_sound(wave, 1, [10], "drop", 0, 0), r"inside the 10.000 s"),
    ):
        with pytest.raises(ValueError, match=sentence):
            make()
