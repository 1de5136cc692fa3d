"""MM-DPO: DPO whose beta grows with how clearly a reward model prefers the one sample to the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmalign.surrogate import Draw, Feedback, Likelihood, Path


@dataclass(frozen=True)
class MMDPO:
    """DPO with a beta for each pair, and a part of supervised fine-tuning on the preferred sample.

    delta = score[win] - score[lose] > 0,  strength = 1 - exp(-k delta), or delta itself without a k
    loss = -log sigmoid(beta (1 + w strength) (log_ratio[win] - log_ratio[lose])) - gamma logp[win] / tokens[win]

    Every two samples of a list whose scores differ are a pair. Scores are a reward model's, in its own units, which k
    has to fit; without a k they are taken for normalised ones (`Run.score_scale`).

    Shapes: N samples, P pairs. Returns [P], unreduced, times the pair's weight.
    Units: beta as in DiffusionDPO; gamma multiplies nats a token of the answer, or a diffusion model's logp.
    Source: arXiv 2502.10391 section 4.2; Kwai-YuanQi/MM-RLHF @ 7c8af1d2 trl/trainer/dpo_trainer.py:792 and 899-911,
    where the strength is read from the data. Deviations: that code then overwrites its beta by a statistic of the
    batch's own margins (:797-818), and its label_smoothing of 1 means none; neither is here. Its clamp at 1e-3 is left
    out, as no beta falls below the first one. Its SFT part is a mean over the batch's tokens, ours over each answer's.
    """

    beta: float
    w: float = 0.5
    k: float | None = 0.5
    gamma: float = 0.0
    draw: Draw | None = None
    needs: ClassVar[tuple[str, ...]] = ("reference",)

    def __post_init__(self) -> None:
        if self.beta <= 0 or min(self.w, self.gamma) < 0:
            raise ValueError(f"beta, w and gamma are {self.beta}, {self.w}, {self.gamma}; above 0 and 0 or more")
        if self.k is not None and self.k <= 0:
            raise ValueError(f"k is {self.k}; it has to be above 0, or None for scores that are normalised")

    def check(self, path: Path | None, feedback: Feedback) -> None:
        """Raises ValueError for labels in place of scores, and for scores outside [0, 1] where there is no k."""
        feedback.check_scores()
        if self.k is None and (feedback.score.min() < 0 or feedback.score.max() > 1):
            raise ValueError("MMDPO without a k needs scores in [0, 1]; give score_scale = (low, high), or a k")

    def __call__(self, likelihood: Likelihood, feedback: Feedback) -> Tensor:
        """[P] losses."""
        win, lose = feedback.pairs()
        ratio, logp = likelihood.log_ratio, likelihood.logp["policy"]
        delta = (feedback.score[win] - feedback.score[lose]).to(ratio)
        strength = delta if self.k is None else -torch.expm1(-self.k * delta)
        loss = -logsigmoid(self.beta * (1 + self.w * strength) * (ratio[win] - ratio[lose]))
        if self.gamma:
            answer = getattr(likelihood.probe, "mask", None)
            tokens = 1 if answer is None else answer[win].sum(1)
            loss = loss - self.gamma * logp[win] / tokens
        return loss * feedback.weights()[win].to(loss)
