"""Base against aligned on the same prompts and seeds, as several scorers see it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mmalign.evaluation.metrics import bootstrap_interval, wins
from mmalign.records import UserError
from mmalign.scoring.scorer import Scorer


class Row(NamedTuple):
    """What one scorer says. Rates are in [0, 1]; `change` is the mean of aligned minus base."""

    scorer: str
    n: int
    win_rate: float
    win_low: float
    win_high: float
    base_mean: float
    aligned_mean: float
    change: float
    change_low: float
    change_high: float


@dataclass(frozen=True)
class Result:
    """Paired scores.

    Attributes:
        prompts: N prompts; equal ones are one cluster, as their pictures are not independent.
        scores: scorer -> side ("base" or "aligned") -> float array [N], row by row the same prompt and seed.
    """

    prompts: tuple[str, ...]
    scores: dict[str, dict[str, np.ndarray]]

    def rows(self, *, confidence: float = 0.95, resamples: int = 10_000) -> list[Row]:
        """One row a scorer, with paired bootstrap intervals that draw whole prompts."""
        options = {"clusters": self.prompts, "confidence": confidence, "resamples": resamples}
        rows = []
        for scorer, sides in self.scores.items():
            base, aligned = sides["base"], sides["aligned"]
            won, change = wins(base, aligned), aligned - base
            win_interval, change_interval = (
                bootstrap_interval(won, **options),
                bootstrap_interval(change, **options),
            )
            if won.min() == won.max() != 0.5:  # won everything, or nothing: resampling cannot show the doubt
                tail = ((1 - confidence) / 2) ** (1 / len(set(self.prompts)))  # Clopper and Pearson's bound
                win_interval = (tail, 1.0) if won[0] else (0.0, 1 - tail)
            means = (float(values.mean()) for values in (base, aligned, change))
            base_mean, aligned_mean, mean_change = means
            rows.append(Row(scorer, len(won), float(won.mean()), *win_interval,
                            base_mean, aligned_mean, mean_change, *change_interval))  # fmt: skip
        return rows

    def to_json(self) -> str:
        """Rows and every score, so that any other figure can be worked out later."""
        scores = {
            name: {side: values.tolist() for side, values in sides.items()} for name, sides in self.scores.items()
        }
        content: dict[str, Any] = {"rows": [row._asdict() for row in self.rows()]}
        return json.dumps(content | {"prompts": list(self.prompts), "scores": scores}, indent=1, ensure_ascii=False)


def score_sides(
    prompts: Sequence[str],
    base_media: Sequence,
    aligned_media: Sequence,
    scorers: Mapping[str, Scorer],
    *,
    conditions: Sequence[Sequence] | None = None,
    batch_size: int = 32,
) -> Result:
    """Scores both sides of N prompts, and their input pictures where they have any, with every scorer.

    Raises:
        UserError: nothing to compare, no scorer, or the lengths differ.
    """
    if not len(prompts) == len(base_media) == len(aligned_media):
        counts = f"{len(prompts)} prompts, {len(base_media)} base and {len(aligned_media)} aligned media"
        raise UserError(f"A comparison needs equally many of each, got {counts}.")
    if not len(prompts) or not scorers:
        raise UserError("A comparison needs at least one prompt and one scorer.")
    scores = {
        name: {
            side: scorer.score(media, prompts, conditions=conditions, batch_size=batch_size).double().numpy()
            for side, media in (("base", base_media), ("aligned", aligned_media))
        }
        for name, scorer in scorers.items()
    }
    return Result(tuple(prompts), scores)


def pool(results: Sequence[Result]) -> Result:
    """Puts several seeds together; prompts stay clusters, so repeating a prompt buys no false certainty.

    Raises:
        UserError: nothing to pool, or the scorers differ.
    """
    if not results or any(result.scores.keys() != results[0].scores.keys() for result in results):
        raise UserError("Only results of the same scorers, and at least one, can be pooled.")
    scores = {
        name: {side: np.concatenate([r.scores[name][side] for r in results]) for side in ("base", "aligned")}
        for name in results[0].scores
    }
    return Result(tuple(p for r in results for p in r.prompts), scores)
