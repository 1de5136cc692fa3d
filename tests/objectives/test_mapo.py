"""MaPO against the numbers that the official code gave (tests/golden/mapo.json), and where that code breaks."""

import math

import pytest
import torch

from mmalign.objectives import MaPO
from mmalign.objectives.mapo import odds
from mmalign.surrogate import Feedback, Likelihood, RectifiedFlow
from tests.objectives.official import EPSILON, PAIRS, check_case, golden


@pytest.mark.parametrize("case", golden("mapo")["cases"], ids=lambda c: c["case"])
def test_official(case):
    check_case(case, MaPO(beta=case["beta_mapo"], snr=case["snr_value"], T=case["T"]))


def test_the_paper_has_one_beta():
    error = torch.tensor([0.1, 0.12, 0.09, 0.2, 0.11, 0.13, 0.08, 0.15], dtype=torch.float64)
    loss = MaPO.paper(beta=8)(Likelihood({"policy": -error / 2}), PAIRS)

    def phi(x):
        return 8 * x / (x.exp() - 1)

    expected = error[:4] - torch.nn.functional.logsigmoid(phi(error[:4]) - phi(error[4:])) / 8
    assert torch.allclose(loss, expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_odds_are_right_at_and_near_zero_where_exp_minus_one_cancels(dtype):
    error = torch.tensor([0.0, 1e-9, 1e-6, 1e-4, 1e-3, 0.1, 5.0], dtype=dtype).requires_grad_()
    x = 0.5 * error.detach().double()
    expected = torch.where(x == 0, 1.0, x / torch.expm1(x))
    assert torch.allclose(odds(error, 0.5).double(), expected, rtol=1e-7 if dtype == torch.float32 else 1e-13)
    (slope,) = torch.autograd.grad(odds(error, 0.5).sum(), error)
    assert slope[0].item() == pytest.approx(-0.25)


def test_at_zero_error_loss_and_gradient_are_finite():
    logp = torch.zeros(8, requires_grad=True)
    loss = MaPO()(Likelihood({"policy": logp}), PAIRS)
    assert torch.allclose(loss, torch.full((4,), 0.1 * math.log(2)))
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert torch.isfinite(gradient).all()


def test_what_cannot_be_trained_is_refused():
    MaPO().check(EPSILON, PAIRS)
    with pytest.raises(ValueError, match="token model"):
        MaPO().check(None, PAIRS)
    with pytest.raises(ValueError, match="uniform weight"):
        MaPO().check(RectifiedFlow("epsilon"), PAIRS)
    with pytest.raises(ValueError, match="no pair"):
        MaPO().check(EPSILON, Feedback(torch.tensor([1, 1]), torch.tensor([0.5, 0.5])))
    with pytest.raises(ValueError, match="above 0"):
        MaPO(beta=0)
