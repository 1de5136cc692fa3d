"""Randomness is a function of (seed, group, position, draw index, stream) and of nothing else."""

import torch

from mmalign.surrogate import Cond, FreshNoise, Keys, VariancePreserving
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
