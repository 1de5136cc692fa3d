"""What a reward model is trained to say: pure functions of score tensors, one number a pair (or list), unreduced.

A pair has scores a and b [P] and a label [P], the probability that a is preferred: 1, 0, 0.5 for a tie, or in between.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def pairs(target: Tensor, group: Tensor, *, soft: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Every pair inside every group.

    Args:
        target: [N] how well each was liked.
        group: [N] equal for media of one comparison.
        soft: targets are votes >= 0, and a label is the share of them; else the order alone counts.

    Returns:
        Rows a [P] and b [P], and the label [P].
    """
    a, b = torch.nonzero((group[:, None] == group).triu(1), as_tuple=True)
    first, second = target[a], target[b]
    return a, b, first / (first + second) if soft else (torch.sign(first - second) + 1) / 2


def bradley_terry(a: Tensor, b: Tensor, label: Tensor) -> Tensor:
    """-label log sigmoid(a - b) - (1 - label) log sigmoid(b - a), [P].

    Over all pairs of a ranking without its ties it is ImageReward's loss (THUDM/ImageReward @ c1392c6, a cross-entropy
    over better and worse), and that of VisionPrefer's VP-Score as far as its paper's abstract (arXiv 2404.15100) says.
    """
    return -label * F.logsigmoid(a - b) - (1 - label) * F.logsigmoid(b - a)


def bradley_terry_ties(a: Tensor, b: Tensor, label: Tensor, k: float = 5.0) -> Tensor:
    """Minus the log-likelihood of a win, a loss or a tie, [P]; labels are 1, 0 or 0.5.

    P(a wins) = sigmoid(a - b - log k),    P(tie) = (k² - 1) P(a wins) P(b wins)

    Args:
        a: [P] scores.
        b: [P] scores.
        label: [P] 1 where a won, 0 where b won, 0.5 where people saw a tie.
        k: > 1; larger means more ties between equals: (k - 1) / (k + 1) of them.

    Source: Rao and Kupper (1967); KwaiVGI/VideoAlign @ 219ab9d, trainer.py:472-481 (k = 5).
    """
    win, lose = F.logsigmoid(a - b - math.log(k)), F.logsigmoid(b - a - math.log(k))
    tie = win + lose + math.log(k**2 - 1)
    return -torch.where(label == 0.5, tie, torch.where(label > 0.5, win, lose))


def soft_cross_entropy(a: Tensor, b: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy of softmax(a, b) with (label, 1 - label), [P]; a tie that is scored as a tie costs 0.

    Scores are multiplied by the logit scale. Source: yuvalkirstain/PickScore @ ca44324, clip_criterion.py (with its
    log 0.5 where labels are equal); tgxs002/HPSv2 @ 866735e, open_clip/loss.py:143 (without, and summed, not averaged).
    """
    return bradley_terry(a, b, label) - math.log(2) * (label == 0.5)


def uncertainty(
    a: Tensor, b: Tensor, label: Tensor, log_sigma_a: Tensor, log_sigma_b: Tensor, *, samples: int = 1000, seed: int = 0
) -> Tensor:
    """`bradley_terry` averaged over scores that are normal: a ~ N(a, exp(log_sigma_a)²), and so b; [P].

    The difference is drawn `samples` times, from `seed` alone. Source: MizzenAI/HPSv3 @ d232ff8, qwen2vl_trainer.py
    (uncertainty). Deviation: in the scores' own precision, not in float16.
    """
    sigma = (torch.exp(2 * log_sigma_a) + torch.exp(2 * log_sigma_b)).sqrt()
    noise = torch.randn(len(a), samples, generator=torch.Generator().manual_seed(seed)).to(a)
    drawn = (a - b)[:, None] + sigma[:, None] * noise
    return bradley_terry(drawn, torch.zeros_like(drawn), label[:, None]).mean(1)


def listwise(score: Tensor, target: Tensor, group: Tensor) -> Tensor:
    """Plackett-Luce: minus the log-probability of a ranking, by the place that each medium takes in it, [N].

    A medium competes with those of its group that were liked less; tied ones do not compete. Summed over a group of
    two it is `bradley_terry`. Source: Plackett (1975); as a loss Xia et al. (ICML 2008), ListMLE.
    """
    beaten = (group[:, None] == group) & (target[:, None] > target)
    rivals = torch.where(beaten | torch.eye(len(score), dtype=torch.bool, device=score.device), score, -torch.inf)
    return torch.logsumexp(rivals, 1) - score


def per_prompt(prompts: list[str]) -> Tensor:
    """[N] 1 / (how often each prompt occurs): a prompt with many comparisons weighs no more than others (PickScore)."""
    return torch.tensor([1 / prompts.count(prompt) for prompt in prompts])
