"""InPO: Diffusion-DPO asked where the model's own inversion of each picture leads."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from torch import Tensor

from mmalign.objectives.dpo import DiffusionDPO
from mmalign.surrogate import DDIMInversion, Draw, Feedback, Likelihood, Path


@dataclass(frozen=True)
class InPO:
    """Diffusion-DPO on noise that the model itself finds for each sample, by DDIM inversion, instead of fresh noise.

    loss = -log sigmoid(beta (log_ratio[win] - log_ratio[lose]))

    Shapes: N samples, P pairs. Returns [P], unreduced, times the pair's weight.
    Units: beta as in DiffusionDPO: 5000 for SDXL, 2000 for SD1.5.
    Source: arXiv 2503.18454; JaydenLyh/InPO @ a9cfc4de train.py:955-1053 (10 steps, eta 0.1, under the policy).
    Deviation: the inversion ends exactly at the sample's timestep (see DDIMInversion).
    """

    beta: float
    draw: Draw = field(default_factory=partial(DDIMInversion, steps=10, eta=0.1))
    needs: ClassVar[tuple[str, ...]] = ("reference",)

    def __post_init__(self) -> None:
        DiffusionDPO(self.beta)  # the same rules hold for its beta

    def check(self, path: Path | None, feedback: Feedback) -> None:
        """Raises ValueError without pairs, and for token models."""
        feedback.check_pairs()
        if path is None:
            raise ValueError("InPO inverts a noising process, which a token model does not have; take DiffusionDPO")

    def __call__(self, likelihood: Likelihood, feedback: Feedback) -> Tensor:
        """[P] losses."""
        return DiffusionDPO(self.beta)(likelihood, feedback)
