"""SmPO: preferences as strong as a scorer finds them, on inverted noise."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmalign.surrogate import AnswerTokens, Draw, Feedback, Likelihood, Path, ReNoise


@dataclass(frozen=True)
class SmPO:
    """Diffusion-DPO whose logit is scaled by how clearly the scores tell the two samples apart.

    p = sigmoid(score[win] - score[lose]), the scorer's Bradley-Terry belief
    loss = -log sigmoid(beta gain (2p - 1) (log_ratio[win] - log_ratio[lose]))

    Scores are the scorer's, normalised to [0, 1] over the data (`Run.score_scale`), so p is in [0.27, 0.73]. A tie in
    score makes no pair, so equal scores give exactly no gradient. A token model takes the soft labels without the
    inversion: `draw=AnswerTokens()`.

    Shapes: N samples, P pairs. Returns [P], unreduced, times the pair's weight.
    Units: beta as in DiffusionDPO; gain is the paper's gamma.
    Source: arXiv 2506.02698; JaydenLyh/SmPO @ 8922d54f train.py:739-747 and 1046-1065, where the scores decide the
    order of a pair as here. Deviation: every pair has its own p, there the first pair's serves the whole batch; the
    inversion ends exactly at the sample's timestep (see ReNoise).
    """

    beta: float
    gain: float = 10.0
    draw: Draw = field(default_factory=partial(ReNoise, steps=10))
    needs: ClassVar[tuple[str, ...]] = ("reference",)

    def __post_init__(self) -> None:
        if self.beta <= 0 or self.gain <= 0:
            raise ValueError(f"beta is {self.beta} and gain {self.gain}; they have to be above 0")

    def check(self, path: Path | None, feedback: Feedback) -> None:
        """Raises ValueError without scores, and where a token model's answers would be inverted."""
        feedback.check_scores()
        if path is None and not isinstance(self.draw, AnswerTokens):
            raise ValueError("a token model has no noising process to invert; in a recipe give draw=AnswerTokens()")

    def __call__(self, likelihood: Likelihood, feedback: Feedback) -> Tensor:
        """[P] losses."""
        win, lose = feedback.pairs()
        ratio = likelihood.log_ratio
        clarity = torch.tanh((feedback.score[win] - feedback.score[lose]) / 2).to(ratio)  # 2p - 1
        loss = -logsigmoid(self.beta * self.gain * clarity * (ratio[win] - ratio[lose]))
        return loss * feedback.weights()[win].to(loss)
