"""Clips of the embedded video model: their captions, splits and judges."""

import numpy as np
import pytest

from mmalign.embedded import motions, scenes

OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def drawn(goes, shake=0.0, seed=0):
    return motions.render(motions.Clip("fox", "blue", goes, goes, shake, seed))


def test_splits_share_no_combination():
    parts = {split: set(motions.combinations(split)) for split in motions.SPLITS}
    assert {split: len(part) for split, part in parts.items()} == dict(
        zip(motions.SPLITS, (144, 48, 24, 24), strict=True)
    )
    assert parts["pairs"] < parts["train"]
    assert not parts["test"] & parts["train"] | parts["test"] & parts["development"]
    assert not parts["development"] & parts["train"]
    for part in parts.values():
        assert {noun for noun, _ in part} == set(motions.NOUNS)
        assert {colour for _, colour in part} == set(scenes.COLOURS)


def test_prompts_are_four_a_combination():
    prompts = motions.prompts("test")
    assert len(set(prompts)) == len(prompts) == 4 * 24
    assert motions.caption("owl", "orange", "up") == "an owl moving up on an orange background"
    assert motions.asked("an owl moving up on an orange background").tolist() == [0, -1]


def test_a_share_goes_astray_and_all_shake():
    clips = motions.random_clips(2000, 0, "train")
    assert np.mean([clip.goes != clip.direction for clip in clips]) == pytest.approx(motions.ASTRAY, abs=0.04)
    shakes = [clip.shake for clip in clips]
    assert 0 <= min(shakes) < 0.2 < 2.5 < max(shakes) <= 3
    assert motions.random_clips(3, 5, "train") == motions.random_clips(3, 5, "train")


@pytest.mark.parametrize("goes", motions.DIRECTIONS)
def test_both_judges_know_the_direction(goes):
    frames = drawn(goes)
    assert frames.shape == (9, 64, 64, 3)
    for says in motions.DIRECTIONS:
        prompt = motions.caption("fox", "blue", says)
        right, flows = motions.goes_there(frames, prompt), motions.flows_there(frames, prompt)
        if says == goes:
            assert right == pytest.approx(1, abs=0.02)
            assert flows == 1
        elif says == OPPOSITE[goes]:
            assert right == pytest.approx(-1, abs=0.02)
            assert flows == 0
        else:
            assert abs(right) < 0.05
            assert flows == 0


def test_the_judge_of_the_pairs_likes_a_smooth_way():
    prompt = motions.caption("fox", "blue", "left")
    scores = [
        np.mean([motions.goes_there(drawn("left", shake, seed), prompt) for seed in range(8)]) for shake in range(4)
    ]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] - scores[3] > 0.3


def test_nothing_there_is_no_way():
    empty = np.full((9, 64, 64, 3), 90, np.uint8)
    prompt = motions.caption("fox", "blue", "left")
    assert motions.goes_there(empty, prompt) == 0
    assert motions.flows_there(empty, prompt) == 0


def test_the_ground():
    assert motions.ground_is_right(drawn("up"), motions.caption("fox", "blue", "up")) == 1
    assert motions.ground_is_right(drawn("up"), motions.caption("fox", "red", "up")) == 0
