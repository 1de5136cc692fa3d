"""The four ways by hand, and where they part."""

import numpy as np
import pytest

from mmalign.scoring import accuracy

# scores and likings of two comparisons: a list of three with a tie of people's, and a pair that is scored the wrong way
SCORES, TRUTHS = [[2.0, 1.0, 0.0], [0.1, 0.4]], [[3.0, 3.0, 1.0], [1.0, 0.0]]
PAIRS = accuracy.all_pairs(SCORES, TRUTHS)


def test_pairs():
    assert PAIRS.margin.tolist() == pytest.approx([1, 2, 1, -0.3])
    assert PAIRS.truth.tolist() == [0, 1, 1, 1]
    assert PAIRS.comparison.tolist() == [0, 0, 0, 1]


def test_hpsv2_takes_ties_of_people_as_right():
    found = accuracy.hpsv2(PAIRS)
    assert found.values.tolist() == [1.0, 0.0]  # by list, not by pair
    half = accuracy.all_pairs([[1.0, 1.0, 0.0]], [[2.0, 1.0, 0.0]])
    assert accuracy.hpsv2(half).values.tolist() == pytest.approx([(0.5 + 1 + 1) / 3])


def test_imagereward_drops_ties_of_people_and_counts_the_scorers_as_wrong():
    assert accuracy.ties_dropped(PAIRS).values.tolist() == [1, 1, 0]
    assert accuracy.ties_dropped(PAIRS).comparison.tolist() == [0, 0, 1]
    tied = accuracy.all_pairs([[1.0, 1.0]], [[1.0, 0.0]])
    assert accuracy.ties_dropped(tied).values.tolist() == [0]


def test_pickscore_tunes_on_validation_and_reports_on_test():
    """Probabilities differ by tanh(margin / 2): 0.24 at 0.5, 0.76 at 2. Validation wants 0.5 to be a tie."""
    validation = accuracy.all_pairs([[0.5, 0.0], [2.0, 0.0]], [[1.0, 1.0], [1.0, 0.0]])
    test = accuracy.all_pairs([[0.4, 0], [0, 0.4], [0.4, 0], [3, 0], [0, 3]], [[1, 1], [1, 1], [1, 0], [1, 0], [1, 0]])
    found = accuracy.pickscore(validation, test)
    assert found.threshold == pytest.approx(0.3)  # the first that is best
    assert found.values.tolist() == [1, 1, 0.5, 1, 0]
    untied = accuracy.pickscore(accuracy.all_pairs([[2.0, 0.0]], [[1.0, 0.0]]), test)
    assert untied.threshold == 0
    assert untied.values.tolist() == [0.5, 0.5, 1, 1, 0]


def test_videoreward_with_ties_is_the_best_threshold():
    rng = np.random.default_rng(0)
    margin, truth = rng.normal(size=60).round(1), rng.integers(-1, 2, 60)
    pairs = accuracy.Pairs(margin, truth, np.arange(60))
    tried = [np.where(abs(margin) <= e, truth == 0, margin * truth > 0).mean() for e in abs(margin)]
    assert accuracy.videoreward_with_ties(pairs).values.mean() == pytest.approx(max(tried))
    assert len(set(tried)) > 5


def test_the_four_part_on_the_same_pairs():
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 3, (200, 2)).astype(float)
    scores = truth + rng.normal(0, 1.5, truth.shape)
    half = accuracy.all_pairs(scores[:100], truth[:100]), accuracy.all_pairs(scores[100:], truth[100:])
    found = {name: measured.values.mean() for name, measured in accuracy.every(*half).items()}
    assert len(found) == 4
    assert len({round(value, 4) for value in found.values()}) == 4


def test_a_scorer_that_is_right_is_right_by_all():
    truth = [[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]]
    pairs = accuracy.all_pairs([[100 * x for x in row] for row in truth], truth)
    # with ties the smallest margin is always called one, as published
    assert {name: m.values.mean() for name, m in accuracy.every(pairs, pairs).items() if "with ties" not in name} == {
        "imagereward, videoreward without ties": 1,
        "hpsv2 (inversions)": 1,
        "pickscore (threshold tuned on validation)": 1,
    }
    nothing = accuracy.all_pairs([], [])
    assert accuracy.every(nothing, nothing) == {}
