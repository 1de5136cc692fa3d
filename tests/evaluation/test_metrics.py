"""Metrics against closed forms."""

import numpy as np
import pytest

from mmalign.evaluation.metrics import bootstrap_interval, bradley_terry, colourfulness, spearman, win_rate


def test_win_rate_counts_ties_half():
    assert win_rate([1, 2, 3, 4], [2, 2, 2, 5]) == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert np.isnan(win_rate([], []))


@pytest.mark.parametrize(("base", "aligned"), [([1.0], [1.0, 2.0]), ([1.0], [np.nan])])
def test_win_rate_refuses_what_it_cannot_compare(base, aligned):
    with pytest.raises(ValueError, match=r"length|finite"):
        win_rate(base, aligned)


def test_bootstrap_width_is_the_closed_form():
    values = np.random.default_rng(0).normal(3, 2, 400)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / np.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    assert bootstrap_interval(values) == (low, high)


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(300):
        low, high = bootstrap_interval(rng.random(60) < 0.7, resamples=400)
        hits += low <= 0.7 <= high
    assert 0.90 <= hits / 300 <= 0.99


def test_repeating_pictures_of_a_prompt_buys_no_certainty():
    rng = np.random.default_rng(2)
    once = rng.normal(size=50)
    prompts = [f"p{i}" for i in range(50)]
    single = bootstrap_interval(once, clusters=prompts)
    repeated = bootstrap_interval(np.tile(once, 8), clusters=prompts * 8)
    naive = bootstrap_interval(np.tile(once, 8))
    assert np.ptp(repeated) == pytest.approx(np.ptp(single), rel=0.01)
    assert np.ptp(naive) < 0.5 * np.ptp(single)


def test_bradley_terry_of_two_is_the_log_odds():
    strengths = bradley_terry([[0, 30], [10, 0]])
    assert strengths == pytest.approx([np.log(3) / 2, -np.log(3) / 2])


def test_bradley_terry_recovers_known_strengths():
    truth = np.array([1.2, 0.3, -0.4, -1.1])
    chance = 1 / (1 + np.exp(-(truth[:, None] - truth)))
    assert bradley_terry(1000 * chance) == pytest.approx(truth, abs=1e-6)
    sampled = np.triu(np.random.default_rng(0).binomial(2000, chance), 1)
    sampled = sampled + np.tril(2000 - sampled.T, -1)
    assert bradley_terry(sampled) == pytest.approx(truth, abs=0.12)


def test_bradley_terry_needs_a_prior_for_a_perfect_record():
    with pytest.raises(ValueError, match="prior"):
        bradley_terry([[0, 5], [0, 0]])
    strong, weak = bradley_terry([[0, 5], [0, 0]], prior=1.0)
    assert strong - weak == pytest.approx(np.log(5.5 / 0.5))


def test_spearman():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 1000]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # with ties: Pearson's r of the mean ranks (0.5, 0.5, 2, 3) and (0, 1, 2, 3)
    assert spearman([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(np.corrcoef([0.5, 0.5, 2, 3], range(4))[0, 1])
    assert np.isnan(spearman([1, 1], [1, 2]))


def test_colourfulness_is_nothing_for_grey_and_grows_with_saturation():
    rng = np.random.default_rng(0)
    vivid = rng.integers(0, 256, (16, 16, 3))
    dull = 128 + (vivid - 128) // 4
    assert colourfulness(np.full((8, 8, 3), 90)) == 0
    assert 3 < colourfulness(vivid) / colourfulness(dull) < 5
