"""PPD: its attention against the golden numbers, its loss against Diffusion-DPO's."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmalign.modalities.user import UserAttention
from mmalign.objectives import PPD, DiffusionDPO
from mmalign.surrogate import Feedback, Likelihood

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "ppd.json").read_text())


@pytest.mark.parametrize("user", ["given", "zero"])
def test_decoupled_attention_is_the_golden_one(user):
    """Source: PAPER-DERIVED (arXiv 2501.06655), no official code; see the file."""
    r = np.random.default_rng(20260105)
    shapes = [(2, 6, 8), (2, 5, 8), (2, 5, 8), (2, 3, 12), (12, 8), (12, 8)]
    q, k, v, u, w_k, w_v = (torch.from_numpy(r.standard_normal(shape)) for shape in shapes)
    layer = UserAttention(width=12, inner=8, heads=1).double()
    layer.key.weight.data, layer.value.weight.data = 0.3 * w_k.T, 0.3 * w_v.T
    base = torch.softmax(q @ k.transpose(1, 2) / 8**0.5, -1) @ v
    extra = layer(q[:, None], u if user == "given" else torch.zeros_like(u))
    assert base.sum().item() == pytest.approx(GOLDEN["base_sum"], rel=1e-9)
    if user == "zero":
        assert torch.equal(base + extra, base)
        assert (base + extra).sum().item() == pytest.approx(GOLDEN["zero_user"]["out_sum"], rel=1e-9)
    else:
        assert extra.sum().item() == pytest.approx(GOLDEN["extra_sum"], rel=1e-9)
        assert (base + extra).sum().item() == pytest.approx(GOLDEN["out_sum"], rel=1e-9)
        assert (base + extra).flatten()[:3].tolist() == pytest.approx(GOLDEN["out_first3"], rel=1e-9)


FEEDBACK = Feedback(torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, 0.0, 0.0, 1.0]), user=torch.tensor([7, 7, 8, 8]))


def test_the_loss_is_diffusion_dpos():
    logp = {"policy": torch.randn(4, requires_grad=True), "reference": torch.randn(4)}
    likelihood = Likelihood(logp)
    assert torch.equal(PPD(300.0)(likelihood, FEEDBACK), DiffusionDPO(300.0)(likelihood, FEEDBACK))


def test_without_users_it_is_refused_in_one_sentence():
    PPD(1.0).check(None, FEEDBACK)
    with pytest.raises(ValueError, match="names no user"):
        PPD(1.0).check(None, replace(FEEDBACK, user=None))
    with pytest.raises(ValueError, match="no pair"):
        PPD(1.0).check(None, replace(FEEDBACK, score=torch.ones(4)))
    with pytest.raises(ValueError, match="beta is 0"):
        PPD(0)
