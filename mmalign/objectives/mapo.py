"""MaPO: margin-aware preference optimisation without a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmalign.surrogate import Draw, Feedback, Likelihood, Path


def odds(error: Tensor, scale: float) -> Tensor:
    """phi(l) = s l / (exp(s l) - 1), the amplification of a squared error; 1 at l = 0.

    By expm1, as exp - 1 cancels for the small errors of a trained model (5 % off at l = 1e-6, and 0/0 at l = 0).
    """
    x = scale * error
    small = x.abs() < 1e-4
    away = torch.where(small, torch.ones_like(x), x)
    return torch.where(small, 1 - x / 2 + x * x / 12, away / torch.expm1(away))


@dataclass(frozen=True)
class MaPO:
    """Fits the preferred sample and widens its margin over the other; no reference model.

    With l = -2 logp, the mean squared error, and phi(l) = snr l / (exp(snr l) - 1):

    loss = l[win] - beta log sigmoid(T (phi(l[win]) - phi(l[lose])))

    Shapes: N samples, P pairs. Returns [P], unreduced, times the pair's weight.
    Units: T multiplies inside and beta outside, as in the released code (0.1, 0.5, 1000); the paper has one beta, see
    `MaPO.paper`.
    Source: arXiv 2406.06424; mapo-t2i/mapo @ 374b3d3d utils.py:286-301. Deviation: expm1.
    """

    beta: float = 0.1
    snr: float = 0.5
    T: float = 1000.0
    draw: Draw | None = None
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if min(self.beta, self.snr, self.T) <= 0:
            raise ValueError(f"beta, snr and T are {self.beta}, {self.snr}, {self.T}; they have to be above 0")

    @classmethod
    def paper(cls, beta: float, draw: Draw | None = None) -> MaPO:
        """The paper's form (v2, eqs. 9-11): one beta, inside phi and dividing the margin term; 8 for general taste."""
        return cls(beta=1 / beta, snr=1.0, T=beta, draw=draw)

    def check(self, path: Path | None, feedback: Feedback) -> None:
        """Raises ValueError without pairs, for token models, and where the error is weighted by time."""
        feedback.check_pairs()
        if path is None:
            raise ValueError("MaPO compares denoising errors, which a token model has none of; take DiffusionDPO")
        if path.weighted:
            raise ValueError("MaPO needs an error without a weight over time (w(t) = 1); choose the uniform weight")

    def __call__(self, likelihood: Likelihood, feedback: Feedback) -> Tensor:
        """[P] losses."""
        win, lose = feedback.pairs()
        error = -2 * likelihood.logp["policy"]
        margin = odds(error[win], self.snr) - odds(error[lose], self.snr)
        loss = error[win] - self.beta * logsigmoid(self.T * margin)
        return loss * feedback.weights()[win].to(loss)
