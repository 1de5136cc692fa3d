"""From scored candidates to comparisons: the arithmetic, and whole small tables held in memory."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mmalign.records import Comparison, UserError


def best_worst(
    prompts: Sequence[str],
    media: Sequence[Sequence[Any]],
    scores: Sequence[Sequence[float]],
    *,
    sources: Sequence[Sequence[str]] | None = None,
    conditions: Sequence[Sequence[Any]] | None = None,
    drop_fraction: float = 0.0,
    min_margin: float = 0.0,
) -> tuple[list[Comparison], dict[str, int]]:
    """Pair each prompt's best candidate with its worst.

    Args:
        prompts: [G] texts.
        media: [G][K] candidates of each prompt, K >= 2.
        scores: [G][K] numbers, higher is better; a pair keeps the two as its scores.
        sources: [G][K] where each candidate came from (such as its seed); default its number, "0", "1" …
        conditions: [G] input pictures of each prompt, where it has any.
        drop_fraction: Share of pairs to drop, those of the smallest margin, in [0, 1).
        min_margin: Drop pairs whose margin is smaller.

    Returns:
        The pairs, best first, in the order of the prompts; and counts: prompts, ties, below_margin,
        dropped (by drop_fraction), kept.

    Raises:
        UserError: Lengths that differ, or a score that is not finite.
    """
    sources = sources or [[str(number) for number in range(len(row))] for row in media]
    if not len(prompts) == len(media) == len(scores) == len(sources):
        raise UserError(f"{len(prompts)} prompts with {len(media)} lists of media and {len(scores)} of scores.")
    shown = conditions or [()] * len(prompts)
    pairs = [_pair(*row) for row in zip(prompts, media, scores, sources, shown, strict=True)]
    untied = [pair for pair in pairs if margin(pair.score) > 0]
    clear = [pair for pair in untied if margin(pair.score) >= min_margin]
    weak = weakest([margin(pair.score) for pair in clear], drop_fraction)
    kept = [pair for pair, is_weak in zip(clear, weak, strict=True) if not is_weak]
    counts = {
        "prompts": len(pairs),
        "ties": len(pairs) - len(untied),
        "below_margin": len(untied) - len(clear),
        "dropped": len(clear) - len(kept),
        "kept": len(kept),
    }
    return kept, counts


def ranked(
    prompts: Sequence[str],
    media: Sequence[Sequence[Any]],
    scores: Sequence[Sequence[Sequence[float]]],
    *,
    sources: Sequence[Sequence[str]] | None = None,
) -> tuple[list[Comparison], dict[str, int]]:
    """Each prompt's candidates as one ranked list, scored by `win_shares`.

    Args:
        prompts: [G] texts.
        media: [G][K] candidates of each prompt, K >= 2.
        scores: [S][G][K] numbers, higher is better, of S scorers.
        sources: [G][K] where each candidate came from; default its number.

    Returns:
        The lists, and counts: prompts, ties (lists whose candidates all score alike; left out), kept.

    Raises:
        UserError: Lengths that differ, or a score that is not finite.
    """
    sources = sources or [[str(number) for number in range(len(row))] for row in media]
    if not scores or not all(len(rows) == len(prompts) == len(media) == len(sources) for rows in scores):
        raise UserError(
            f"{len(prompts)} prompts with {len(media)} lists of media and {[len(s) for s in scores]} scores."
        )
    lists = []
    for row, prompt in enumerate(prompts):
        own = [[float(score) for score in rows[row]] for rows in scores]
        _check(prompt, media[row], own, sources[row])
        share = win_shares(own)
        if margin(share) > 0:
            lists.append(comparison(prompt, media[row], share, sources[row]))
    return lists, {"prompts": len(prompts), "ties": len(prompts) - len(lists), "kept": len(lists)}


def extremes(scores: Sequence[float]) -> tuple[int, int]:
    """The places of the best and of the worst score; of equal ones the first."""
    return scores.index(max(scores)), scores.index(min(scores))


def all_pairs(scores: Sequence[float]) -> list[tuple[int, int]]:
    """Every two places, the better first; K (K - 1) / 2 of them."""
    places = range(len(scores))
    return [(i, j) if scores[i] >= scores[j] else (j, i) for i in places for j in places[i + 1 :]]


def win_shares(scores: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """[S][K] -> [K], see `mmalign.scoring.ensemble.win_shares`; imported when asked, as it brings torch along."""
    from mmalign.scoring import ensemble

    return ensemble.win_shares(scores)


def margin(scores: Sequence[float]) -> float:
    """Between the best and the worst."""
    return max(scores) - min(scores)


def weakest(margins: Sequence[float], fraction: float) -> np.ndarray:
    """[P] bool, the `fraction` of pairs (rounded down) with the smallest margins; of equal ones the first."""
    found = np.zeros(len(margins), bool)
    found[np.argsort(np.asarray(margins, float), kind="stable")[: int(fraction * len(margins))]] = True
    return found


def comparison(
    prompt: str,
    media: Iterable[Any],
    scores: Iterable[float],
    sources: Sequence[str],
    key: Sequence[str] = (),
    **fields: Any,
) -> Comparison:
    """A comparison whose id is a hash of prompt and sources, and of what `key` adds to tell it from others."""
    name = hashlib.sha256("\0".join((prompt, *sources, *key)).encode()).hexdigest()[:24]
    return Comparison(id=name, prompt=prompt, media=tuple(media), score=tuple(scores), source=tuple(sources), **fields)


def _pair(
    prompt: str, media: Sequence, scores: Sequence[float], sources: Sequence[str], shown: Sequence[Any]
) -> Comparison:
    scores = [float(score) for score in scores]
    _check(prompt, media, [scores], sources)
    places = extremes(scores)
    kept = ([row[place] for place in places] for row in (media, scores, sources))
    return comparison(prompt, *kept, condition=tuple(shown) or None)


def _check(prompt: str, media: Sequence, scores: Sequence[Sequence[float]], sources: Sequence[str]) -> None:
    for row in scores:
        if not len(media) == len(row) == len(sources) >= 2 or not all(map(math.isfinite, row)):
            raise UserError(f"prompt {prompt!r}: needs two or more candidates, each with a finite score: {row}.")
