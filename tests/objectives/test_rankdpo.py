"""RankDPO against numbers derived from the paper (tests/golden/rankdpo.json); there is no official code."""

import math

import pytest
import torch

from mmalign.objectives import DiffusionDPO, RankDPO
from mmalign.objectives.rankdpo import ranks
from mmalign.surrogate import AnswerTokens, Feedback, FreshNoise, Likelihood
from tests.objectives.official import EPSILON, PAIRS, golden


@pytest.mark.parametrize("case", golden("rankdpo")["cases"], ids=lambda c: c["case"])
def test_derived_from_the_paper(case):
    base = math.e if case["log_base"] == "e" else float(case["log_base"])
    feedback = Feedback(
        torch.zeros(len(case["phi"]), dtype=torch.int64), torch.tensor(case["phi"], dtype=torch.float64)
    )
    error = torch.tensor(case["model_mse"], dtype=torch.float64).requires_grad_()
    likelihood = Likelihood(
        {"policy": -error / 2, "reference": -torch.tensor(case["ref_mse"], dtype=torch.float64) / 2}
    )
    # Their errors have no half, so their beta is half of ours
    loss = RankDPO(beta=2 * case["beta"], log_base=base)(likelihood, feedback)
    assert ranks(feedback).tolist() == case["rank_tau"]
    assert loss.tolist() == pytest.approx([case["loss_sum_over_pairs"]], rel=1e-9)
    (gradient,) = torch.autograd.grad(loss.sum(), error)
    assert gradient.tolist() == pytest.approx(case["dloss_d_model_mse"], rel=1e-9)
    linear = RankDPO(beta=2 * case["beta"], log_base=base, gain="linear")(likelihood, feedback)
    assert linear.item() == pytest.approx(case["alt_linear_gain_loss"], rel=1e-9)


def random_lists(generator, groups=3, k=5):
    group = torch.arange(groups).repeat_interleave(k)
    feedback = Feedback(group, torch.rand(groups * k, generator=generator, dtype=torch.float64))
    logp = torch.randn(2, groups * k, generator=generator, dtype=torch.float64)
    return Likelihood({"policy": logp[0], "reference": logp[1]}), feedback


def test_lists_of_two_are_pairs_weighted_by_their_gains():
    likelihood, feedback = random_lists(torch.Generator().manual_seed(0), k=2)
    win, lose = feedback.pairs()
    discount = 1 / math.log(2) - 1 / math.log(3)  # 0.5325, the paper's A.2
    weight = discount * (feedback.score[win].exp2() - feedback.score[lose].exp2())
    expected = weight * DiffusionDPO(beta=3.0)(likelihood, feedback)
    assert torch.allclose(RankDPO(beta=3.0)(likelihood, feedback), expected)


def test_ties_and_permutations():
    likelihood, feedback = random_lists(torch.Generator().manual_seed(1))
    loss = RankDPO(beta=2.0)(likelihood, feedback)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(2))
    shuffled = Feedback(feedback.group[order], feedback.score[order])
    moved = Likelihood({view: logp[order] for view, logp in likelihood.logp.items()})
    assert torch.allclose(RankDPO(beta=2.0)(moved, shuffled), loss)
    tied = Feedback(feedback.group, torch.full((15,), 0.3))
    assert torch.equal(RankDPO(beta=2.0)(likelihood, tied), torch.zeros(3, dtype=torch.float64))
    assert ranks(Feedback(torch.zeros(4), torch.tensor([0.5, 0.9, 0.5, 0.1]))).tolist() == [2, 1, 3, 4]


def test_weights_multiply_lists():
    likelihood, feedback = random_lists(torch.Generator().manual_seed(3))
    weight = torch.tensor([2.0, 0.0, 1.0]).repeat_interleave(5)
    weighted = RankDPO(beta=2.0)(likelihood, Feedback(feedback.group, feedback.score, weight))
    assert torch.allclose(weighted, RankDPO(beta=2.0)(likelihood, feedback) * torch.tensor([2.0, 0.0, 1.0]))


def test_what_cannot_be_trained_is_refused():
    objective, scores = RankDPO(beta=1.0), torch.tensor([0.2, 0.7, 0.5])
    assert objective.draw == FreshNoise(shared=False)  # the paper has one noise an image
    objective.check(EPSILON, Feedback(torch.zeros(3), scores))
    with pytest.raises(ValueError, match="score the data"):
        objective.check(EPSILON, PAIRS)
    with pytest.raises(ValueError, match="a list has one sample"):
        objective.check(EPSILON, Feedback(torch.tensor([1, 1, 2]), scores))
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        objective.check(EPSILON, Feedback(torch.zeros(3), 10 * scores))
    with pytest.raises(ValueError, match="AnswerTokens"):
        objective.check(None, Feedback(torch.zeros(3), scores))
    RankDPO(beta=1.0, draw=AnswerTokens()).check(None, Feedback(torch.zeros(3), scores))
