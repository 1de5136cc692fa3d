"""From scored candidates to comparisons."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

from mmalign.records import Comparison, UserError


def best_worst(
    prompts: Sequence[str],
    media: Sequence[Sequence[Any]],
    scores: Sequence[Sequence[float]],
    *,
    sources: Sequence[Sequence[str]] | None = None,
    drop_fraction: float = 0.0,
    min_margin: float = 0.0,
) -> tuple[list[Comparison], dict[str, int]]:
    """Pair each prompt's best candidate with its worst.

    Args:
        prompts: [G] texts.
        media: [G][K] candidates of each prompt, K >= 2.
        scores: [G][K] numbers, higher is better; a pair keeps the two as its scores.
        sources: [G][K] where each candidate came from (such as its seed); default its number, "0", "1" …
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
    pairs = [_pair(*row) for row in zip(prompts, media, scores, sources, strict=True)]
    untied = [pair for pair in pairs if _margin(pair) > 0]
    clear = [pair for pair in untied if _margin(pair) >= min_margin]
    kept = sorted(range(len(clear)), key=lambda row: _margin(clear[row]))[int(drop_fraction * len(clear)) :]
    counts = {
        "prompts": len(pairs),
        "ties": len(pairs) - len(untied),
        "below_margin": len(untied) - len(clear),
        "dropped": len(clear) - len(kept),
        "kept": len(kept),
    }
    return [clear[row] for row in sorted(kept)], counts


def ranked(
    prompts: Sequence[str],
    media: Sequence[Sequence[Any]],
    scores: Sequence[Sequence[Sequence[float]]],
    *,
    sources: Sequence[Sequence[str]] | None = None,
) -> tuple[list[Comparison], dict[str, int]]:
    """Each prompt's candidates as one ranked list, scored by the share of comparisons that each won.

    A candidate's score is phi = C / (S (K - 1)), with C the candidates that it beats, summed over the scorers; a tie
    counts for nobody (Syn-Pic, arXiv 2410.18013 algorithm 1). It is in [0, 1], what RankDPO takes for its gains.

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
        k = len(own[0])
        share = tuple(sum(s[i] > other for s in own for other in s) / (len(own) * (k - 1)) for i in range(k))
        if len(set(share)) > 1:
            lists.append(_comparison(prompt, media[row], share, sources[row]))
    return lists, {"prompts": len(prompts), "ties": len(prompts) - len(lists), "kept": len(lists)}


def _margin(pair: Comparison) -> float:
    return pair.score[0] - pair.score[1]


def _pair(prompt: str, media: Sequence, scores: Sequence[float], sources: Sequence[str]) -> Comparison:
    scores = [float(score) for score in scores]
    _check(prompt, media, [scores], sources)
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    return _comparison(prompt, *([row[best], row[worst]] for row in (media, scores, sources)))


def _check(prompt: str, media: Sequence, scores: Sequence[Sequence[float]], sources: Sequence[str]) -> None:
    for row in scores:
        if not len(media) == len(row) == len(sources) >= 2 or not all(map(math.isfinite, row)):
            raise UserError(f"prompt {prompt!r}: needs two or more candidates, each with a finite score: {row}.")


def _comparison(prompt: str, media: Sequence, scores: Sequence[float], sources: Sequence[str]) -> Comparison:
    key = hashlib.sha256("\0".join((prompt, *sources)).encode()).hexdigest()[:24]
    return Comparison(id=key, prompt=prompt, media=tuple(media), score=tuple(scores), source=tuple(sources))
