"""PPD: one model, many tastes. Diffusion-DPO whose policy is told whose preference a pair is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmalign.objectives.dpo import DiffusionDPO
from mmalign.surrogate import Draw, Feedback, Likelihood, Path


@dataclass(frozen=True)
class PPD:
    """Raises the likelihood of what a user preferred, given that user, relative to the base that knows no user.

    loss = -log sigmoid(beta (log_ratio[win] - log_ratio[lose])),  log_ratio = logp(x | c, u) - logp_base(x | c)

    Who the user is travels in the condition (`Cond.policy_only`), so the formula itself is Diffusion-DPO's.

    Shapes: N samples, P pairs. Returns [P], unreduced, times the pair's weight.
    Units: beta as in DiffusionDPO; the paper's is not published.
    Source: arXiv 2501.06655; no official code. The reference without a user is an inference: the base is frozen and
    a dropped user gives the base.
    """

    beta: float
    draw: Draw | None = None
    needs: ClassVar[tuple[str, ...]] = ("reference",)
    personal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"beta is {self.beta}; it has to be above 0")

    def check(self, path: Path | None, feedback: Feedback) -> None:
        """Raises ValueError when there is nothing to compare, or nobody whose taste it is."""
        DiffusionDPO(self.beta).check(path, feedback)
        if feedback.user is None:
            raise ValueError("a comparison names no user; PPD needs the field user in each (user_id in Pick-a-Pic)")

    def __call__(self, likelihood: Likelihood, feedback: Feedback) -> Tensor:
        """[P] losses."""
        return DiffusionDPO(self.beta)(likelihood, feedback)
