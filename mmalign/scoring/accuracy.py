"""The four published ways of saying how often a scorer is right. They differ by several points: always name which.

Each gives one number a pair or list, whose mean is the accuracy, and the comparison [M] that each comes from, so that
an interval can draw whole prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmalign.records import Comparison
from mmalign.scoring.scorer import Scorer

Interval = Callable[..., tuple[float, float]]  # of a mean: (values [M], clusters=labels [M]) -> low, high

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


class Some(Sequence):
    """Some rows of comparisons, each read when it is asked for."""

    def __init__(self, comparisons: Sequence[Comparison], rows: Sequence[int]):
        self.comparisons, self.rows = comparisons, rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, place: Any) -> Any:
        """The comparison at a place."""
        return self.comparisons[self.rows[place]]


def liked(item: Comparison, name: str) -> tuple[float, ...]:
    """How well each medium was liked: by an aspect, as it is or as X.aspect, or overall (score, overall)."""
    if name in ("score", "overall"):
        return item.score
    return next(values for key, values in item.aspects.items() if key.rpartition(".")[2] == name)


def flat(items: Sequence[Comparison]) -> tuple[list[tuple[Any, Any, str]], list[str]]:
    """Media with their condition and name, and prompts, in one row."""
    media = [
        (medium, item.condition or (), f"comparison {item.id!r}, medium {place}")
        for item in items
        for place, medium in enumerate(item.media)
    ]
    return media, [item.prompt for item in items for _ in item.media]


def measured(
    scorer: Scorer,
    names: Sequence[str],
    validation: Sequence[Comparison],
    test: Sequence[Comparison],
    batch_size: int = 64,
    interval: Interval | None = None,
) -> list[dict[str, Any]]:
    """Lines for a card's `published`: every accuracy on held-out prompts.

    Args:
        scorer: whom to measure.
        names: aspects, or "score".
        validation: comparisons that tune PickScore's threshold.
        test: comparisons that are measured.
        batch_size: media judged at once.
        interval: of an accuracy; the clusters are prompts.
    """
    pairs = [_judged(scorer, names, items, batch_size) for items in (validation, test)]
    told = [item.prompt for item in test]
    lines = []
    for name in names:
        for metric, (values, rows, threshold) in every(pairs[0][name], pairs[1][name]).items():
            prompts = [told[row] for row in rows]
            line = {"set": "held-out prompts", "metric": f"accuracy of {name}: {metric}", "unit": "%"}
            line |= {"value": round(100 * float(values.mean()), 1), "n": len(values), "prompts": len(set(prompts))}
            if interval is not None:
                line["interval"] = [round(100 * end, 1) for end in interval(values, clusters=prompts)]
            lines.append(line if threshold is None else {**line, "threshold": round(threshold, 4)})
    return lines


def _judged(scorer: Scorer, names: Sequence[str], items: Sequence[Comparison], batch_size: int) -> dict[str, Pairs]:
    """Name -> the pairs as the scorer judges them; comparisons are read one after the other."""
    scores: dict[str, list[list[float]]] = {name: [] for name in names}
    truths: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    for start in range(0, len(items), batch_size):
        some = [items[row] for row in range(start, min(start + batch_size, len(items)))]
        media, prompts = flat(some)
        conditions = [condition for _, condition, _ in media]
        judged = scorer.aspects([m for m, *_ in media], prompts, conditions=conditions, batch_size=batch_size)
        for name in names:
            scores[name] += [part.tolist() for part in judged[name].split([len(item.media) for item in some])]
            truths[name] += [liked(item, name) for item in some]
    return {name: all_pairs(scores[name], truths[name]) for name in names}
