"""RankDPO: whole ranked lists, each pair as important as its swap would cost in the ranking."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmalign.surrogate import AnswerTokens, Draw, Feedback, FreshNoise, Likelihood, Path


def ranks(feedback: Feedback) -> Tensor:
    """[N] place in its group by score, 1 for the best; samples that tie keep their order."""
    score, row = feedback.score, torch.arange(len(feedback.score), device=feedback.score.device)
    same = feedback.group[:, None] == feedback.group[None, :]
    before = (score[None, :] > score[:, None]) | ((score[None, :] == score[:, None]) & (row[None, :] < row[:, None]))
    return 1 + (same & before).sum(1)


@dataclass(frozen=True)
class RankDPO:
    """Diffusion-DPO on every pair of a list, weighted by the change of DCG that swapping the two would make.

    G = 2^score - 1, D = log(1 + rank), delta = |G[win] - G[lose]| |1/D[win] - 1/D[lose]|
    loss = -sum over the group's pairs of delta log sigmoid(beta (log_ratio[win] - log_ratio[lose]))

    Scores are gains in [0, 1], such as the share of comparisons that a sample won (`mmalign.data.label.ranked`).

    Shapes: N samples, G groups. Returns [G], unreduced, times the group's weight.
    Units: beta as in DiffusionDPO (the paper's, on errors without the half, is half of it); not published.
    Source: arXiv 2410.18013 eqs. 5-7 and algorithm 2; no official code. The exponent of the gain and the natural
    logarithm are our reading of it: `gain="linear"` has G = 2 score - 1, `log_base` 2 multiplies delta by ln 2.
    """

    beta: float
    log_base: float = math.e
    gain: Literal["exponential", "linear"] = "exponential"
    draw: Draw | None = field(default_factory=partial(FreshNoise, shared=False))
    needs: ClassVar[tuple[str, ...]] = ("reference",)

    def __post_init__(self) -> None:
        if self.beta <= 0 or self.log_base <= 1:
            raise ValueError(f"beta is {self.beta} and log_base {self.log_base}; they have to be above 0 and 1")
        if self.gain not in ("exponential", "linear"):
            raise ValueError(f"gain is {self.gain!r}; it can be exponential or linear")

    def check(self, path: Path | None, feedback: Feedback) -> None:
        """Raises ValueError for labels in place of scores, scores outside [0, 1], and lists of one."""
        feedback.check_scores()
        if feedback.score.min() < 0 or feedback.score.max() > 1:
            raise ValueError("RankDPO's scores are gains in [0, 1]; rank the data, or give score_scale = (low, high)")
        if path is None and not isinstance(self.draw, AnswerTokens | None):
            raise ValueError("a token model has no noise to draw; in a recipe give draw=AnswerTokens()")

    def __call__(self, likelihood: Likelihood, feedback: Feedback) -> Tensor:
        """[G] losses, in the order of the group numbers."""
        win, lose = feedback.pairs()
        ratio = likelihood.log_ratio
        score = feedback.score.to(ratio)
        gains = torch.exp2(score) - 1 if self.gain == "exponential" else 2 * score - 1
        discount = math.log(self.log_base) / torch.log1p(ranks(feedback).to(ratio))
        delta = (gains[win] - gains[lose]).abs() * (discount[win] - discount[lose]).abs()
        loss = -delta * logsigmoid(self.beta * (ratio[win] - ratio[lose]))
        count, number = feedback.lists
        return ratio.new_zeros(count).index_add(0, number[win], loss * feedback.weights()[win].to(loss))
