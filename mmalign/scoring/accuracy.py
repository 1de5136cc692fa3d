"""The four published ways of saying how often a scorer is right. They differ by several points: always name which.

Each gives one number a pair or list, whose mean is the accuracy, and the comparison [M] that each comes from, so that
an interval can draw whole prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

THRESHOLDS = np.arange(11) / 10  # PickScore's, on the difference of two probabilities


class Pairs(NamedTuple):
    """All pairs of comparisons.

    Attributes:
        margin: [P] score of one less that of the other.
        truth: [P] 1 where people preferred the one, -1 the other, 0 neither.
        comparison: [P] which comparison it is of.
    """

    margin: NDArray
    truth: NDArray
    comparison: NDArray


class Measured(NamedTuple):
    """Numbers in [0, 1] whose mean is an accuracy; [M] each. `threshold` is what was tuned, if anything was."""

    values: NDArray
    comparison: NDArray
    threshold: float | None = None


def all_pairs(scores: Sequence[Sequence[float]], truths: Sequence[Sequence[float]]) -> Pairs:
    """The pairs of comparisons, given [G][K] scores and [G][K] likings, higher is better in both."""
    rows = [
        (float(score[i]) - float(score[j]), np.sign(truth[i] - truth[j]), number)
        for number, (score, truth) in enumerate(zip(scores, truths, strict=True))
        for i in range(len(score))
        for j in range(i + 1, len(score))
    ]
    margin, truth, comparison = np.array(rows, float).reshape(-1, 3).T
    return Pairs(margin, truth, comparison.astype(int))


def hpsv2(pairs: Pairs) -> Measured:
    """The share of a list's pairs that are no inversions, by list: a tie of people's counts as right.

    Source: tgxs002/HPSv2 @ 866735e, training/train.py:358. Deviation: a tie of the scorer's counts half; there the
    order of the list decides.
    """
    right = np.where(pairs.margin == 0, 0.5, pairs.margin * pairs.truth > 0)
    right[pairs.truth == 0] = 1
    lists, place = np.unique(pairs.comparison, return_inverse=True)
    return Measured(np.bincount(place, right) / np.bincount(place), lists)


def pickscore(validation: Pairs, test: Pairs) -> Measured:
    """Ties are answers: right 1, a tie of only one side 0.5; the threshold of a tie is tuned on the validation pairs.

    A pair is called a tie where its probabilities, softmax of the two scores, differ by no more than the threshold.
    Source: yuvalkirstain/PickScore @ 11584a5, eval_preference_predictor.py.
    """

    def right(pairs: Pairs, threshold: float) -> NDArray:
        said = np.where(np.abs(np.tanh(pairs.margin / 2)) <= threshold, 0, np.sign(pairs.margin))
        return np.where(said == pairs.truth, 1.0, np.where((said == 0) | (pairs.truth == 0), 0.5, 0.0))

    best = max(THRESHOLDS, key=lambda threshold: right(validation, threshold).mean())  # of equal ones the first
    return Measured(right(test, best), test.comparison, float(best))


def videoreward_with_ties(pairs: Pairs) -> Measured:
    """A tie is right where people saw one; the threshold on the margin is the best for these very pairs.

    Source: Deutsch et al., Ties Matter (arXiv 2305.14324); KwaiVGI/VideoAlign @ 219ab9d, calc_accuracy.py, whose
    thresholds are the margins themselves. Deviation: pairs of equal margin pass a threshold together.
    """
    size = np.abs(pairs.margin)
    order = np.argsort(size, kind="stable")
    ties = np.cumsum(pairs.truth[order] == 0)  # right among those called ties
    clear = (pairs.margin * pairs.truth > 0)[order]
    hits = ties + clear.sum() - np.cumsum(clear)
    last = np.append(size[order][1:] > size[order][:-1], True)  # the last of each margin
    best = size[order][np.argmax(np.where(last, hits, -1))]
    right = np.where(size <= best, pairs.truth == 0, pairs.margin * pairs.truth > 0)
    return Measured(right.astype(float), pairs.comparison, float(best))


def ties_dropped(pairs: Pairs) -> Measured:
    """Pairs that people tie are left out, and a tie of the scorer's is wrong: two publications have it.

    Source: KwaiVGI/VideoAlign @ 219ab9d, calc_accuracy.py (without ties); THUDM/ImageReward @ c1392c6, test.py:17.
    """
    kept = pairs.truth != 0
    return Measured((pairs.margin * pairs.truth > 0)[kept].astype(float), pairs.comparison[kept])


def every(validation: Pairs, test: Pairs) -> dict[str, Measured]:
    """All of them by name, those that have a pair to judge."""
    found = {"imagereward, videoreward without ties": ties_dropped(test)}
    if len(test.truth):
        found |= {"hpsv2 (inversions)": hpsv2(test), "videoreward with ties": videoreward_with_ties(test)}
    if len(test.truth) and len(validation.truth):
        found["pickscore (threshold tuned on validation)"] = pickscore(validation, test)
    return {name: measured for name, measured in found.items() if len(measured.values)}
