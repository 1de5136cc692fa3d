"""Paths against the official schedule and against themselves."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from mmalign.surrogate import RectifiedFlow, VariancePreserving, VDiffusion

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "schedule.json").read_text())


def official(prediction_type):
    scheduler = DDIMScheduler(**{**GOLDEN["config"], "prediction_type": prediction_type})
    return VariancePreserving(scheduler.alphas_cumprod.double(), prediction_type)


def test_schedule_noising_and_velocity_equal_the_official_numbers():
    golden = GOLDEN["add_noise"]
    r = np.random.default_rng(20260103)
    x0, noise = (torch.from_numpy(r.standard_normal((4, 4, 8, 8))) for _ in range(2))
    t = torch.tensor(golden["timesteps"])
    path = official("v_prediction")
    assert path.alphas_cumprod[GOLDEN["timesteps"]].tolist() == pytest.approx(GOLDEN["alphas_cumprod"], rel=1e-6)
    for got, name in [(path.interpolate(x0, noise, t), "x_t"), (path.target(x0, noise, t), "velocity")]:
        assert got.flatten(1)[:, :3].numpy() == pytest.approx(np.array(golden[f"{name}_first3"]), rel=1e-5)
        assert got.flatten(1).sum(1).tolist() == pytest.approx(golden[f"{name}_sum"], rel=1e-5)


@pytest.mark.parametrize(
    "path", [official("epsilon"), official("v_prediction"), official("sample"), VDiffusion(), RectifiedFlow()], ids=str
)
def test_the_target_denoises_exactly_and_moves_along_the_path(path):
    x0, noise = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64).unbind(0)
    u = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    t, s = path.timesteps(u), path.timesteps(u / 2)
    x_t, target = path.interpolate(x0, noise, t), path.target(x0, noise, t)
    assert torch.allclose(path.denoised(target, x_t, t), x0, atol=1e-5)
    assert torch.allclose(path.implied_noise(x_t, x0, t), noise, atol=1e-5)
    assert torch.allclose(path.move(target, x_t, t, s), path.interpolate(x0, noise, s), atol=1e-5)


def test_timesteps_are_uniform_integers_and_logit_normal_times():
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    t = official("epsilon").timesteps(u)
    assert torch.equal(torch.bincount(t), torch.full((1000,), 10))
    flow = RectifiedFlow(shift=3.0).timesteps(u)
    assert flow.min() > 0
    assert flow.max() < 1
    assert flow.median().item() == pytest.approx(0.75, abs=1e-3)  # shift 3 maps 1/2 to 3/4


def test_epsilon_weight_turns_velocity_error_into_noise_error():
    t = torch.tensor([0.25, 0.5])
    assert torch.allclose(RectifiedFlow("epsilon").weight(t), (1 - t) ** 2)
    assert RectifiedFlow("epsilon").weighted
    assert not RectifiedFlow().weighted


@pytest.fixture
def cosine_scheduler(monkeypatch):
    """Stable Audio's; what it imports of torchsde makes the noise of its steps, which is not asked for here."""
    monkeypatch.setitem(sys.modules, "torchsde", ModuleType("torchsde"))
    module = importlib.import_module("diffusers.schedulers.scheduling_cosine_dpmsolver_multistep")
    return module.CosineDPMSolverMultistepScheduler(sigma_min=0.3, sigma_max=500)


def test_v_diffusion_is_what_stable_audios_scheduler_feeds_its_network_and_reads_from_it(cosine_scheduler):
    scheduler, path = cosine_scheduler, VDiffusion()
    scheduler.set_timesteps(4)
    t, sigma = scheduler.timesteps.double(), scheduler.sigmas[:4].double()
    x0, noise, v = torch.randn(3, 4, 3, 5, dtype=torch.float64).unbind(0)
    noised = x0 + sigma[:, None, None] * noise
    for row in range(4):
        x_t = scheduler.precondition_inputs(noised[row], sigma[row])
        here = slice(row, row + 1)
        assert torch.allclose(path.interpolate(x0, noise, t)[row], x_t, atol=1e-6)
        denoised = scheduler.precondition_outputs(noised[row], v[row], sigma[row])
        assert torch.allclose(path.denoised(v[here], x_t[None], t[here])[0], denoised, atol=1e-4)
    angle = torch.tensor([0.3, 1.2], dtype=torch.float64)
    turned = path.target(x0[:2], noise[:2], angle / (torch.pi / 2))
    nearby = path.interpolate(x0[:2], noise[:2], (angle + 1e-6) / (torch.pi / 2))
    slope = (nearby - path.interpolate(x0[:2], noise[:2], angle / (torch.pi / 2))) / 1e-6
    assert torch.allclose(turned, slope, atol=1e-4)  # the velocity along the angle


def test_v_diffusion_steps_away_from_pure_noise():
    path, t = VDiffusion(), torch.ones(2)
    x0, noise = torch.randn(2, 2, 3, 5).unbind(0)
    target = path.target(x0, noise, t)
    assert torch.allclose(path.move(target, noise, t, t / 2), path.interpolate(x0, noise, t / 2), atol=1e-5)
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert torch.allclose(path.timesteps(u).double(), u, atol=1e-7)
    assert 0 < path.timesteps(torch.zeros(1)).item() < 1e-6
