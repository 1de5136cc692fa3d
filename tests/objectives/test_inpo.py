"""InPO and SmPO whole, inversion and loss, against the numbers of the official code under two diffusers versions."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from mmalign.objectives import DiffusionDPO, InPO, SmPO
from mmalign.surrogate import Cond, DDIMInversion, Feedback, Keys, Likelihood, ReNoise, VariancePreserving, draws
from tests.objectives.official import EPSILON, PAIRS, golden
from tests.objectives.test_smpo import belief

GRIDS = {"0.20.0": "upstream-0.20", "0.42.1": "upstream-0.22"}
KEYS = Keys(0, torch.zeros(2, dtype=torch.int64), torch.arange(2), torch.zeros(2, dtype=torch.int64))


def recorded(name):
    """(scheduler's path, latents) of a golden file."""
    config = golden(name)["scheduler_config"]
    alphas = DDIMScheduler(**config).alphas_cumprod.double()
    latents = np.random.default_rng(20260102).standard_normal((2, 4, 8, 8)) * 0.9
    return VariancePreserving(alphas), torch.from_numpy(latents)


def epsilon(scale, slope):
    """The golden files' stand-in for a network."""
    return lambda x, t: scale * x + slope * (t.to(x) / 1000).reshape(-1, 1, 1, 1)


def check(case, draw, objective, feedback, monkeypatch):
    path, x0 = recorded("inpo")
    calls, noise = [], np.random.default_rng(7)
    policy, reference = epsilon(0.30, 0.50), epsilon(0.29, 0.48)

    def predict(x_t, t, cond, view="policy"):
        assert view == "policy"
        calls.append((t[0].item(), x_t.sum().item()))
        return policy(x_t, t)

    monkeypatch.setattr(draws, "timestep", lambda *_: torch.tensor([case["t0"]] * 2))
    monkeypatch.setattr(draws, "normal", lambda k, s, like: torch.from_numpy(noise.standard_normal(like.shape)))
    probe = draw(x0, Cond({}), KEYS, path, predict)
    assert [t for t, _ in calls] == [call["t"] for call in case["calls"]]
    assert [total for _, total in calls] == pytest.approx([call["x_sum"] for call in case["calls"]], rel=1e-4)
    assert probe.x_t.sum().item() == pytest.approx(case["x_t_sum"], rel=1e-4)
    assert probe.x_t.flatten()[:3].tolist() == pytest.approx(case["x_t_first3"], rel=1e-4)
    assert probe.target.flatten()[:3].tolist() == pytest.approx(case["target_first3"], rel=1e-3)
    logp = {"policy": probe.logp(policy(probe.x_t, probe.t)), "reference": probe.logp(reference(probe.x_t, probe.t))}
    assert (-2 * logp["policy"]).tolist() == pytest.approx(case["model_losses"], rel=1e-3)
    loss = objective(Likelihood(logp), feedback)
    assert loss.item() == pytest.approx(case["loss"], rel=1e-2)


@pytest.mark.parametrize("case", golden("inpo")["cases"], ids=lambda c: c["case"])
def test_official_inpo(case, monkeypatch):
    draw = DDIMInversion(steps=10, eta=case["eta"], grid=GRIDS[case["diffusers"]])
    pair = Feedback(torch.zeros(2), torch.tensor([1.0, 0.0]))
    check(case, draw, InPO(beta=2000), pair, monkeypatch)


@pytest.mark.parametrize("case", golden("smpo_inversion")["cases"], ids=lambda c: c["case"])
def test_official_smpo(case, monkeypatch):
    draw = ReNoise(steps=len(case["grid"]), grid=GRIDS[case["diffusers"]])
    pair = belief(golden("smpo_inversion")["prob"])
    pair = Feedback(torch.zeros(2), pair.score[[0, 4]])
    check(case, draw, SmPO(beta=2000), pair, monkeypatch)


def test_given_a_probe_inpo_is_diffusion_dpo():
    likelihood = Likelihood({"policy": torch.randn(8), "reference": torch.randn(8)})
    assert torch.equal(InPO(beta=3.0)(likelihood, PAIRS), DiffusionDPO(beta=3.0)(likelihood, PAIRS))
    assert InPO(beta=3.0).draw == DDIMInversion(steps=10, eta=0.1)


def test_what_cannot_be_trained_is_refused():
    InPO(beta=1).check(EPSILON, PAIRS)
    with pytest.raises(ValueError, match="token model"):
        InPO(beta=1).check(None, PAIRS)
    with pytest.raises(ValueError, match="beta"):
        InPO(beta=0)
