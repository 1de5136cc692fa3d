"""Supervised fine-tuning on the preferred samples: the baseline beside every figure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmalign.surrogate import Draw, Feedback, Likelihood, Path


@dataclass(frozen=True)
class SFT:
    """Raises the likelihood of the best sample of each group.

    loss = -2 logp[best]: for a diffusion model the plain mean squared error.

    Shapes: N samples, G groups. Returns [W], one a best sample (a group of one is its own best; samples that tie
    for the best all count), times its weight.
    Source: the baseline of arXiv 2311.12908 section 5.
    """

    draw: Draw | None = None
    needs: ClassVar[tuple[str, ...]] = ()

    def check(self, path: Path | None, feedback: Feedback) -> None:
        """Every group has a best sample, so nothing can be wrong."""

    def __call__(self, likelihood: Likelihood, feedback: Feedback) -> Tensor:
        """[W] losses."""
        logp, best = likelihood.logp["policy"], feedback.best
        return -2 * logp[best] * feedback.weights()[best].to(logp)
