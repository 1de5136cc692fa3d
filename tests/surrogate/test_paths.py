"""Paths against the official schedule and against themselves."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from mmalign.surrogate import RectifiedFlow, VariancePreserving

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
    "path", [official("epsilon"), official("v_prediction"), official("sample"), RectifiedFlow()], ids=str
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
