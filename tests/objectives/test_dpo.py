"""Diffusion-DPO against the numbers that the official code gave (tests/golden)."""

import math

import numpy as np
import pytest
import torch

from mmalign.objectives import DiffusionDPO
from mmalign.surrogate import Cond, Feedback, Likelihood, NoisedProbe, RectifiedFlow
from tests.objectives.official import GOLDEN, PAIRS, check_case, golden


@pytest.mark.parametrize("case", golden("diffusion_dpo")["cases"], ids=lambda c: c["case"])
def test_official_salesforce(case):
    check_case(case, DiffusionDPO(beta=case["beta"]))


@pytest.mark.parametrize("case", golden("diffusion_dpo_hf")["cases"], ids=lambda c: c["case"])
def test_official_diffusers(case):
    # No half in that code: their beta is half of ours, their ipo value four times ours.
    scale = 4 if case["loss_type"] == "ipo" else 1
    check_case(case, DiffusionDPO(beta=2 * case["beta"], loss_type=case["loss_type"]), loss_scale=scale)


def test_official_flow():
    arrays = {name: torch.from_numpy(value) for name, value in np.load(GOLDEN / "flow_dpo.npz").items()}
    target = arrays["in_noise"] - arrays["in_model_input"]
    policy = arrays["in_model_pred"].clone().requires_grad_()
    path = RectifiedFlow()
    probe = NoisedProbe(path, arrays["in_model_input"], torch.full((8,), 0.3), arrays["in_noise"], Cond({}))
    assert torch.allclose(probe.target, target)
    likelihood = Likelihood({"policy": probe.logp(policy), "reference": probe.logp(arrays["in_model_pred_ref"])})
    loss = DiffusionDPO(beta=100)(likelihood, PAIRS).mean()
    assert loss.item() == pytest.approx(arrays["out_loss"].item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, policy)
    assert torch.allclose(gradient, arrays["grad_model_pred"], rtol=1e-4, atol=1e-7)


def test_policy_equal_to_reference_gives_ln_2_exactly():
    logp = torch.randn(8)
    loss = DiffusionDPO(beta=5000)(Likelihood({"policy": logp, "reference": logp}), PAIRS)
    assert torch.equal(loss, torch.full((4,), math.log(2)))


def test_label_smoothing_is_the_expected_loss_under_flipped_labels():
    likelihood = Likelihood({"policy": torch.randn(8), "reference": torch.randn(8)})
    flipped = Feedback(PAIRS.group, 1 - PAIRS.score)
    plain = DiffusionDPO(beta=2.0)
    # Pairs come out in row order, so a flipped pair list has another order: compare means.
    expected = 0.9 * plain(likelihood, PAIRS).mean() + 0.1 * plain(likelihood, flipped).mean()
    smoothed = DiffusionDPO(beta=2.0, label_smoothing=0.1)(likelihood, PAIRS).mean()
    assert smoothed.item() == pytest.approx(expected.item(), rel=1e-6)


def test_weights_multiply_pairs_and_ties_make_none():
    likelihood = Likelihood({"policy": torch.randn(4), "reference": torch.randn(4)})
    feedback = Feedback(
        torch.tensor([1, 1, 2, 2]), torch.tensor([1.0, 0.0, 0.5, 0.5]), torch.tensor([3.0, 3.0, 1.0, 1.0])
    )
    unweighted = Feedback(feedback.group, feedback.score)
    loss = DiffusionDPO(beta=1.0)
    assert torch.allclose(loss(likelihood, feedback), 3 * loss(likelihood, unweighted))
    assert len(loss(likelihood, feedback)) == 1
    ties = Feedback(torch.tensor([1, 1]), torch.tensor([0.5, 0.5]))
    with pytest.raises(ValueError, match="no pair"):
        loss.check(None, ties)


@pytest.mark.parametrize(
    "arguments", [{"beta": 0}, {"beta": 1, "loss_type": "cpo"}, {"beta": 1, "label_smoothing": 0.7}]
)
def test_wrong_hyperparameters_are_refused(arguments):
    with pytest.raises(ValueError, match="it "):
        DiffusionDPO(**arguments)
