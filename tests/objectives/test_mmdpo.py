"""MM-DPO against the paper's formula and the released code's arithmetic, by hand."""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from mmalign.objectives import MMDPO, DiffusionDPO
from mmalign.surrogate import Cond, Feedback, Likelihood, TokenProbe
from tests.objectives.official import PAIRS

LOGP = {
    "policy": torch.tensor([-31.0, -40.5, -22.0, -25.0], dtype=torch.float64),
    "reference": torch.tensor([-33.0, -39.5, -21.0, -27.0], dtype=torch.float64),
}  # log ratios 2, -1, -1, 2
SCORED = Feedback(torch.tensor([0, 0, 1, 1]), torch.tensor([0.9, 0.4, 2.0, 1.0], dtype=torch.float64))
LIKELIHOOD = Likelihood(LOGP)
ONE_PAIR = Feedback(torch.zeros(2), torch.tensor([1.0, 0.0]))


def test_a_pairs_beta_is_the_papers():
    loss = MMDPO(beta=0.1, w=0.5, k=0.5)(LIKELIHOOD, SCORED)
    betas = [0.1 * (1 + 0.5 * (1 - math.exp(-0.5 * delta))) for delta in (0.5, 1.0)]
    expected = [math.log1p(math.exp(-beta * margin)) for beta, margin in zip(betas, (3.0, -3.0), strict=True)]
    assert loss.tolist() == pytest.approx(expected, rel=1e-12)


def test_without_k_the_strength_is_the_margin_as_in_the_released_code():
    """Its `ls_factor` comes from the data: beta (1 + weight ls_factor), never below 0.001."""
    ls_factor = torch.tensor([0.5, 1.0], dtype=torch.float64)
    beta = (0.1 * (1 + 0.1 * ls_factor)).clamp(min=1e-3)
    loss = MMDPO(beta=0.1, w=0.1, k=None)(LIKELIHOOD, SCORED)
    assert torch.allclose(loss, -logsigmoid(beta * torch.tensor([3.0, -3.0])), rtol=1e-12)


def test_without_w_it_is_dpo_and_beta_grows_with_the_margin_to_its_bound():
    assert torch.equal(MMDPO(beta=0.1, w=0)(LIKELIHOOD, SCORED), DiffusionDPO(beta=0.1)(LIKELIHOOD, SCORED))
    far = Likelihood({"policy": torch.tensor([5.0, 0]).double(), "reference": torch.zeros(2).double()})

    def loss(delta):
        return MMDPO(beta=0.1, w=0.5)(far, Feedback(torch.zeros(2), torch.tensor([delta, 0.0]).double())).item()

    assert loss(0.01) > loss(1.0) > loss(3.0) > loss(100.0)
    assert loss(100.0) == pytest.approx(DiffusionDPO(beta=0.15)(far, ONE_PAIR).item(), rel=1e-12)


def test_a_pairs_beta_depends_on_no_other_pair():
    """The released code takes a statistic of the batch's margins instead, NaN for a batch of one."""
    alone = MMDPO(beta=0.1)(
        Likelihood({view: value[:2] for view, value in LOGP.items()}),
        Feedback(SCORED.group[:2], SCORED.score[:2]),
    )
    assert torch.equal(alone, MMDPO(beta=0.1)(LIKELIHOOD, SCORED)[:1])


def test_fine_tuning_is_by_the_answers_own_tokens():
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1], [0, 1, 1, 1, 0]]).bool()
    probe = TokenProbe(torch.zeros(4, 5, dtype=torch.int64), mask, Cond({}))
    asked = Likelihood(LOGP, {}, probe)
    extra = MMDPO(beta=0.1, gamma=0.25)(asked, SCORED) - MMDPO(beta=0.1)(asked, SCORED)
    assert extra.tolist() == pytest.approx([0.25 * 31 / 4, 0.25 * 22 / 2], rel=1e-12)
    assert len(MMDPO(beta=0.1, gamma=0.25)(LIKELIHOOD, SCORED)) == 2  # a bare likelihood will do
    weighted = Feedback(SCORED.group, SCORED.score, torch.tensor([2.0, 2, 3, 3]).double())
    both = MMDPO(beta=0.1, gamma=0.25)
    assert torch.allclose(both(asked, weighted), both(asked, SCORED) * torch.tensor([2.0, 3]).double())


def test_what_cannot_be_trained_is_refused():
    MMDPO(beta=0.1).check(None, SCORED)
    with pytest.raises(ValueError, match="score the data"):
        MMDPO(beta=0.1).check(None, PAIRS)
    with pytest.raises(ValueError, match=r"score_scale"):
        MMDPO(beta=0.1, k=None).check(None, SCORED)
    for wrong in ({"beta": 0.0}, {"beta": 1, "w": -1}, {"beta": 1, "gamma": -1}, {"beta": 1, "k": 0.0}):
        with pytest.raises(ValueError, match="above 0"):
            MMDPO(**wrong)
