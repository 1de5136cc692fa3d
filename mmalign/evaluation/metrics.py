"""How sure one may be: win rate, bootstrap interval, Bradley-Terry strengths, rank correlation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def wins(base: ArrayLike, aligned: ArrayLike) -> NDArray[np.float64]:
    """1 where aligned scores higher, 0.5 for a tie, 0 where lower; [N].

    Raises:
        ValueError: the lengths differ, or a score is not finite.
    """
    base, aligned = np.asarray(base, float), np.asarray(aligned, float)
    if base.shape != aligned.shape or base.ndim != 1:
        raise ValueError(f"base {base.shape} and aligned {aligned.shape} must be vectors of one length")
    if not (np.isfinite(base).all() and np.isfinite(aligned).all()):
        raise ValueError("a score is not finite")
    return (aligned > base) + 0.5 * (aligned == base)


def win_rate(base: ArrayLike, aligned: ArrayLike) -> float:
    """Share of items on which aligned scores higher, ties half, in [0, 1]; NaN without items."""
    won = wins(base, aligned)
    return float(won.mean()) if len(won) else float("nan")


def bootstrap_interval(
    values: ArrayLike,
    *,
    clusters: Sequence | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` [N].

    Args:
        values: [N] numbers.
        clusters: [N] labels; whole clusters are drawn. Several pictures of one prompt are not independent:
            with the prompts as clusters the interval is as wide as the number of prompts warrants.
        confidence: coverage in (0, 1).
        resamples: how many times to draw.
        seed: of the resampling, so that a report can be repeated.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13; with clusters the
    mean is the ratio of drawn sums to drawn counts.
    """
    values = np.asarray(values, float)
    labels = np.arange(len(values)) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    if len(labels) != len(values):
        raise ValueError(f"{len(labels)} cluster labels for {len(values)} values")
    if not len(values):
        return float("nan"), float("nan")
    sums, counts = np.bincount(labels, values), np.bincount(labels).astype(float)
    rng, means = np.random.default_rng(seed), []
    rows = max(1, 2_000_000 // len(sums))  # bounds the memory of one round of draws
    for start in range(0, resamples, rows):
        drawn = rng.integers(len(sums), size=(min(rows, resamples - start), len(sums)))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def bradley_terry(wins: ArrayLike, *, prior: float = 0.0, iterations: int = 10_000) -> NDArray[np.float64]:
    """Strengths [K] on the log scale, mean 0: P(i beats j) = sigmoid(strength_i - strength_j).

    Args:
        wins: [K, K]; entry i, j is how often i beat j (a tie counts half for each). The diagonal is ignored.
        prior: games, half of them won, that each player is said to have had against each other; it keeps
            strengths finite when someone won or lost every game.
        iterations: at most; it stops when strengths change by less than 1e-12.

    Raises:
        ValueError: without a prior, the games do not tie all players together (the maximum is at infinity).

    Source: Hunter, MM algorithms for generalized Bradley-Terry models (Annals of Statistics 32, 2004), eq. 3.
    """
    wins = np.array(wins, float)
    if wins.ndim != 2 or wins.shape[0] != wins.shape[1] or (wins < 0).any():
        raise ValueError("wins must be a square table of counts")
    wins = wins + prior / 2
    np.fill_diagonal(wins, 0)
    size = len(wins)
    reach = np.linalg.matrix_power(np.eye(size) + (wins > 0), max(size, 1)) > 0
    if not reach.all():
        raise ValueError("some players never beat, or never lost to, the others: give a prior")
    games, won = wins + wins.T, wins.sum(1)
    strength = np.ones(size)
    for _ in range(iterations):
        before = strength
        strength = won / (games / (before[:, None] + before)).sum(1) if size > 1 else before
        strength = strength / np.exp(np.log(strength).mean())
        if np.abs(np.log(strength / before)).max() < 1e-12:
            break
    return np.log(strength)


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Rank correlation of two vectors [N], ties at their mean rank; NaN if one of them is constant."""
    a, b = ranks(a), ranks(b)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values against {len(b)}")
    a, b = a - a.mean(), b - b.mean()
    spread = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / spread) if spread > 0 else float("nan")


def ranks(values: ArrayLike) -> NDArray[np.float64]:
    """Ranks from 0, equal values sharing the mean of theirs."""
    _, places, counts = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[places]


def colourfulness(picture) -> float:
    """Colourfulness of an RGB picture: about 0 for grey, 100 for very vivid; no learned part.

    Source: Hasler and Süsstrunk, Measuring colourfulness in natural images (2003), M3.
    """
    red, green, blue = np.asarray(picture, float)[..., :3].reshape(-1, 3).T
    first, second = red - green, (red + green) / 2 - blue
    return float(np.hypot(first.std(), second.std()) + 0.3 * np.hypot(first.mean(), second.mean()))
