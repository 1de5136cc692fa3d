"""Randomness is a function of (seed, group, position, draw index, stream) and of nothing else."""

from itertools import pairwise

import pytest
import torch

from mmalign.surrogate import Cond, DDIMInversion, FreshNoise, Keys, RectifiedFlow, ReNoise, VariancePreserving, draws
from mmalign.surrogate.draws import generator, normal, uniform

PATH = VariancePreserving(torch.linspace(0.999, 0.005, 1000))


def keys(groups=(5, 5, 2**62 + 1, 2**62 + 1), positions=(0, 1, 0, 1), draw=0, seed=1):
    return Keys(seed, torch.tensor(groups), torch.tensor(positions), torch.full((len(groups),), draw))


def test_the_same_keys_give_the_same_numbers_whatever_the_global_state():
    torch.manual_seed(0)
    first = normal(keys(), "noise", torch.zeros(4, 3, 2))
    torch.manual_seed(1)
    assert torch.equal(first, normal(keys(), "noise", torch.zeros(4, 3, 2)))
    before = torch.random.get_rng_state()
    uniform(keys(), "timestep")
    assert torch.equal(before, torch.random.get_rng_state())


def test_every_part_of_the_key_matters():
    base = generator("noise", 1, 2, 3, 4).random()
    others = [("posterior", 1, 2, 3, 4), ("noise", 0, 2, 3, 4), ("noise", 1, 0, 3, 4), ("noise", 1, 2, 0, 4)]
    assert len({base, *(generator(*other).random() for other in others), generator("noise", 1, 2, 3, 5).random()}) == 6


def test_members_share_timestep_and_noise_unless_asked_otherwise():
    x0 = torch.randn(4, 4, 8, 8)
    probe = FreshNoise()(x0, Cond({}), keys(), PATH)
    assert torch.equal(probe.t[0], probe.t[1])
    assert probe.t[0] != probe.t[2]
    assert torch.equal(probe.noise[0], probe.noise[1])
    own = FreshNoise(shared=False)(x0, Cond({}), keys(), PATH)
    assert not torch.equal(own.noise[0], own.noise[1])
    assert torch.equal(own.t, probe.t)


def test_a_sample_draws_the_same_in_any_batch():
    x0 = torch.randn(4, 4, 8, 8)
    whole = FreshNoise()(x0, Cond({}), keys(), PATH)
    part = FreshNoise()(x0[2:], Cond({}), keys().rows(slice(2, 4)), PATH)
    assert torch.equal(whole.x_t[2:], part.x_t)
    assert torch.equal(whole[2:4].x_t, part.x_t)


def test_noise_is_standard_normal():
    noise = normal(keys(), "noise", torch.zeros(4, 100_000), per_sample=True)
    assert abs(noise.mean().item()) < 5 / 400_000**0.5
    assert abs(noise.std().item() - 1) < 0.01
    assert abs(torch.corrcoef(noise)[0, 1].item()) < 0.02


# -- inversions --------------------------------------------------------------------------------------------


def schedule(prediction_type="epsilon"):
    return VariancePreserving(torch.linspace(0.9999, 0.005, 1000, dtype=torch.float64), prediction_type)


PATHS = [schedule(), schedule("v_prediction"), schedule("sample"), RectifiedFlow(density="uniform")]


class Linear:
    """A stand-in for a network: a smooth function of x and t, in the path's own kind of prediction."""

    def __init__(self, path):
        self.path, self.calls = path, 0

    def __call__(self, x_t, t, cond, view="policy"):
        self.calls += 1
        time = self.path.fraction(t).to(x_t).reshape(-1, 1, 1, 1)
        noise = 0.3 * x_t + 0.5 * time + 0.1 * x_t.roll(1, -1)
        if isinstance(self.path, RectifiedFlow) or self.path.prediction_type == "epsilon":
            return noise
        signal, sigma = self.path._scales(t, x_t)
        x0 = (x_t - sigma * noise) / signal
        return x0 if self.path.prediction_type == "sample" else signal * noise - sigma * x0


def at(t, path, monkeypatch):
    """Fixes the timesteps that the draws take."""
    t = torch.tensor(t, dtype=torch.float32) / 1000 if isinstance(path, RectifiedFlow) else torch.tensor(t)
    monkeypatch.setattr(draws, "timestep", lambda keys, path, low: t[: len(keys.group)])


@pytest.mark.parametrize("kind", [DDIMInversion, ReNoise])
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_an_inversion_ends_at_each_samples_t_and_its_noise_interpolates_there(path, kind, monkeypatch):
    at([0, 999, 350, 3], path, monkeypatch)
    x0 = torch.randn(4, 2, 4, 4)
    network = Linear(path)
    draw = kind(steps=10, eta=0.1)
    probe = draw(x0, Cond({}), keys(), path, network)
    assert network.calls == 10 * (2 if kind is ReNoise else 1)  # for every t equally many
    assert torch.isfinite(probe.noise).all()
    assert torch.allclose(path.interpolate(x0, probe.noise, probe.t), probe.x_t, atol=1e-5)
    assert probe.x_t.dtype == torch.float32
    for row in range(4):  # a batch of different t equals each one alone
        t = [[0, 999, 350, 3][row]]
        at(t, path, monkeypatch)
        alone = draw(x0[row : row + 1], Cond({}), keys().rows(slice(row, row + 1)), path, Linear(path))
        assert torch.allclose(alone.x_t, probe.x_t[row : row + 1], atol=1e-6)


@pytest.mark.parametrize("path", PATHS[:3], ids=str)
def test_models_that_say_the_same_in_other_words_invert_alike(path, monkeypatch):
    at([0, 999, 350, 3], path, monkeypatch)
    x0 = torch.randn(4, 2, 4, 4, dtype=torch.float64)
    epsilon = DDIMInversion(steps=7)(x0, Cond({}), keys(), PATHS[0], Linear(PATHS[0]))
    other = DDIMInversion(steps=7)(x0, Cond({}), keys(), path, Linear(path))
    assert torch.allclose(epsilon.x_t, other.x_t, atol=1e-6)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_inverted_and_denoised_again_a_sample_comes_back_the_closer_the_more_steps(path, monkeypatch):
    at([800] * 4, path, monkeypatch)
    network, x0, errors = Linear(path), torch.randn(4, 2, 4, 4, dtype=torch.float64), {}
    for kind in (DDIMInversion, ReNoise):
        for steps in (10, 20, 50):
            probe = kind(steps=steps)(x0, Cond({}), keys(), path, network)
            x, times = probe.x_t, path.grid(probe.t, steps).flip(0)
            for t, s in pairwise(times):
                x = path.move(network(x, t, None), x, t, s)
            errors[kind, steps] = (x - x0).square().mean().item()
        assert errors[kind, 50] < errors[kind, 20] < errors[kind, 10]
    assert errors[ReNoise, 10] < errors[DDIMInversion, 10]


def test_inversion_noise_is_fresh_for_each_member_and_seed(monkeypatch):
    at([500] * 4, PATH, monkeypatch)
    x0 = torch.zeros(4, 2, 4, 4)
    draw = DDIMInversion(steps=5, eta=0.5)
    first = draw(x0, Cond({}), keys(), PATH, Linear(PATH))
    assert not torch.allclose(first.x_t[0], first.x_t[1])
    assert torch.equal(first.x_t, draw(x0, Cond({}), keys(), PATH, Linear(PATH)).x_t)
    assert not torch.allclose(first.x_t, draw(x0, Cond({}), keys(seed=2), PATH, Linear(PATH)).x_t)


def test_cacheable_is_what_does_not_follow_the_policy():
    assert FreshNoise().cacheable
    assert not DDIMInversion().cacheable
    assert ReNoise(view="reference").cacheable


def test_wrong_inversions_are_refused():
    with pytest.raises(ValueError, match="steps"):
        DDIMInversion(steps=0)
    with pytest.raises(ValueError, match="exact"):
        DDIMInversion(grid="upstream-0.20")(torch.zeros(4, 1, 2, 2), Cond({}), keys(), RectifiedFlow(), None)
