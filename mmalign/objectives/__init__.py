"""One file a method. An objective is a frozen dataclass: its fields are hyperparameters, calling it is the formula."""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor

from mmalign.objectives.dpo import DiffusionDPO
from mmalign.objectives.inpo import InPO
from mmalign.objectives.mapo import MaPO
from mmalign.objectives.mmdpo import MMDPO
from mmalign.objectives.ppd import PPD
from mmalign.objectives.rankdpo import RankDPO
from mmalign.objectives.sft import SFT
from mmalign.objectives.smpo import SmPO
from mmalign.surrogate import Draw, Feedback, Likelihood, Path

__all__ = ["MMDPO", "PPD", "SFT", "DiffusionDPO", "InPO", "MaPO", "RankDPO", "SmPO"]


class Objective(Protocol):
    """What the trainer asks of a method."""

    needs: ClassVar[tuple[str, ...]]
    draw: Draw | None

    def check(self, path: Path | None, feedback: Feedback) -> None: ...
    def __call__(self, likelihood: Likelihood, feedback: Feedback) -> Tensor: ...
