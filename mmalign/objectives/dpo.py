"""Diffusion-DPO, and DPO for token models: the same formula on another likelihood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmalign.surrogate import Draw, Feedback, Likelihood, Path


@dataclass(frozen=True)
class DiffusionDPO:
    """Raises the likelihood of the preferred sample over the other's, both relative to a reference.

    logit = beta (log_ratio[win] - log_ratio[lose])
      sigmoid: -(1 - s) log sigmoid(logit) - s log sigmoid(-logit), s the label smoothing (cDPO)
      hinge:   max(0, 1 - logit)
      ipo:     (log_ratio[win] - log_ratio[lose] - 1 / (2 beta))^2

    Shapes: N samples, P pairs. Returns [P], unreduced, times the pair's weight.
    Units: beta multiplies -1/2 mean squared error per latent element: 5000 for SDXL, 2000 for SD1.5; token
    models take 0.1 on summed log-probabilities.
    Source: arXiv 2311.12908 eq. 14; SalesforceAIResearch/DiffusionDPO @ 5233e759 train.py:1125-1144; hinge and
    ipo: diffusers research_projects/diffusion_dpo @ 58eb52c0 (no half there: their beta is half of this one, their
    ipo value 4 times ours); ipo: arXiv 2310.12036. Deviation: the squared error is float32 under every view.
    """

    beta: float
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    label_smoothing: float = 0.0
    draw: Draw | None = None
    needs: ClassVar[tuple[str, ...]] = ("reference",)

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"beta is {self.beta}; it has to be above 0 (5000 for SDXL, 2000 for SD1.5)")
        if self.loss_type not in ("sigmoid", "hinge", "ipo"):
            raise ValueError(f"loss_type is {self.loss_type!r}; it can be sigmoid, hinge or ipo")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it has to be in [0, 0.5)")
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError("label_smoothing is defined for loss_type sigmoid alone; set it to 0")

    def check(self, path: Path | None, feedback: Feedback) -> None:
        """Raises ValueError when there is nothing to compare."""
        feedback.check_pairs()

    def __call__(self, likelihood: Likelihood, feedback: Feedback) -> Tensor:
        """[P] losses."""
        win, lose = feedback.pairs()
        margin = likelihood.log_ratio[win] - likelihood.log_ratio[lose]
        logit = self.beta * margin
        if self.loss_type == "sigmoid":
            s = self.label_smoothing
            loss = -(1 - s) * logsigmoid(logit)
            if s:
                loss = loss - s * logsigmoid(-logit)
        elif self.loss_type == "hinge":
            loss = torch.relu(1 - logit)
        else:
            loss = (margin - 1 / (2 * self.beta)) ** 2
        return loss * feedback.weights()[win].to(loss)
