"""The inputs on which the official pair losses were recorded, and the probe that asks them of ours."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mmalign.surrogate import Cond, Feedback, Likelihood, NoisedProbe, RectifiedFlow, VariancePreserving

GOLDEN = Path(__file__).parents[1] / "golden"
PAIRS = Feedback(torch.arange(8) % 4, torch.tensor([1.0] * 4 + [0.0] * 4))
EPSILON = VariancePreserving(torch.linspace(0.999, 0.005, 1000, dtype=torch.float64))


def golden(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


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


def check_case(case, objective, loss_scale=1, feedback=PAIRS):
    """Loss and gradients of one recorded case."""
    near_or_far = case["case"].split("_")[0]
    arrays = official_inputs(case["dtype"])
    policy = arrays[near_or_far].requires_grad_()
    likelihood = asked(arrays["target"], policy, arrays["reference"], EPSILON)
    loss = objective(likelihood, feedback).mean() * loss_scale
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
