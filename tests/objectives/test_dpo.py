"""Diffusion-DPO against the numbers that the official code gave (tests/golden)."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mmalign.objectives import DiffusionDPO
from mmalign.surrogate import Cond, Feedback, Likelihood, NoisedProbe, RectifiedFlow, VariancePreserving

GOLDEN = Path(__file__).parents[1] / "golden"


def official_inputs(dtype):
    r = np.random.default_rng(20260101)
    eps, n_ref, n_near, n_far = (
        r.standard_normal(shape) for shape in [(4, 4, 8, 8), (8, 4, 8, 8), (8, 4, 8, 8), (8, 4, 8, 8)]
    )
    target = np.concatenate([eps, eps])
    reference = target + 0.30 * n_ref
    arrays = {
        "target": target,
        "reference": reference,
        "near": reference + 0.01 * n_near,
        "far": target + 0.30 * n_far,
    }
    return {name: torch.from_numpy(array.astype(dtype)) for name, array in arrays.items()}


def asked(target, policy, reference, path):
    """The likelihood of a probe whose target is `target`, under two predictions."""
    zero = torch.zeros_like(target)
    flow = isinstance(path, RectifiedFlow)
    t = torch.zeros(len(target), dtype=torch.float32 if flow else torch.int64)
    probe = NoisedProbe(path, zero, t, target, Cond({}))
    return Likelihood({"policy": probe.logp(policy), "reference": probe.logp(reference)}, {}, probe)


PAIRS = Feedback(torch.arange(8) % 4, torch.tensor([1.0] * 4 + [0.0] * 4))
EPSILON = VariancePreserving(torch.linspace(0.999, 0.005, 1000, dtype=torch.float64))


def check_case(case, objective, loss_scale):
    near_or_far = case["case"].split("_")[0]
    arrays = official_inputs(case["dtype"])
    policy = arrays[near_or_far].requires_grad_()
    likelihood = asked(arrays["target"], policy, arrays["reference"], EPSILON)
    loss = objective(likelihood, PAIRS).mean() * loss_scale
    rtol = 1e-9 if case["dtype"] == "float64" else 2e-3
    assert loss.item() == pytest.approx(case["loss"], rel=rtol)
    (gradient,) = torch.autograd.grad(loss, policy)
    norms = gradient.flatten(1).norm(dim=1).tolist()
    # hinge has a kink and ipo a near-cancelling difference in float32: compare against the largest gradient.
    scale = max(case["grad_norm_per_sample"])
    assert norms == pytest.approx(case["grad_norm_per_sample"], rel=rtol, abs=rtol * scale)
    assert gradient.flatten()[:4].tolist() == pytest.approx(
        case["grad_first4"], rel=rtol, abs=rtol * max(map(abs, case["grad_first4"]))
    )


@pytest.mark.parametrize(
    "case", json.loads((GOLDEN / "diffusion_dpo.json").read_text())["cases"], ids=lambda c: c["case"]
)
def test_official_salesforce(case):
    check_case(case, DiffusionDPO(beta=case["beta"]), loss_scale=1)


@pytest.mark.parametrize(
    "case", json.loads((GOLDEN / "diffusion_dpo_hf.json").read_text())["cases"], ids=lambda c: c["case"]
)
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
