"""Draws: where the likelihood is asked for, and the counter-based randomness that everything uses.

Every random number is a pure function of (seed, group, position, draw index, stream) through Philox, a
counter-based generator (Salmon et al., SC 2011). So a resumed run draws what an uninterrupted one would have,
and results do not depend on batch size, number of processes or data workers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmalign.surrogate.likelihood import Cond, Keys, Predict, send
from mmalign.surrogate.paths import Path, VariancePreserving, expand
from mmalign.surrogate.probes import NoisedProbe, TokenProbe, at_least_float32


def generator(stream: str, *counters: int) -> np.random.Generator:
    """A generator that is a function of its arguments alone.

    Args:
        stream: what the numbers are for ("timestep", "noise", "posterior" ...); streams are independent.
        counters: integers of any size (seed, group, position, draw index).
    """
    text = stream + "|" + "|".join(str(int(counter)) for counter in counters)
    key = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key, dtype=np.uint64)))


def _counters(keys: Keys, per_sample: bool) -> list[tuple[int, ...]]:
    position = keys.position if per_sample else torch.zeros_like(keys.position)
    return list(zip(keys.group.tolist(), position.tolist(), keys.draw.tolist(), strict=True))


def uniform(keys: Keys, stream: str, *, per_sample: bool = False) -> Tensor:
    """[N] float64 in [0, 1); equal within a group unless `per_sample`."""
    values = [generator(stream, keys.seed, *counter).random() for counter in _counters(keys, per_sample)]
    return torch.tensor(values, dtype=torch.float64)


def normal(keys: Keys, stream: str, like: Tensor, *, per_sample: bool = True) -> Tensor:
    """[N, ...] standard normal in the shape, dtype and on the device of `like`; shared in a group on request."""
    made: dict[tuple[int, ...], Tensor] = {}
    rows = []
    for counter in _counters(keys, per_sample):
        if counter not in made:
            # float32 draws for every dtype: float64 runs see the same numbers as float32 ones.
            values = generator(stream, keys.seed, *counter).standard_normal(tuple(like.shape[1:]), np.float32)
            made[counter] = torch.from_numpy(values)
        rows.append(made[counter])
    return send(torch.stack(rows), like.device, like.dtype)


def timestep(keys: Keys, path: Path, low: float = 0.0) -> Tensor:
    """[N] with the path's density, shared in a group; `low` leaves out that share of the cleanest timesteps."""
    return path.timesteps(low + (1 - low) * uniform(keys, "timestep"))


def _check_low(low: float) -> None:
    if not 0 <= low < 1:
        raise ValueError(f"low is {low}; it has to be in [0, 1)")


@dataclass(frozen=True)
class FreshNoise:
    """Noises x0 at a random timestep: the likelihood of Diffusion-DPO, MaPO, SFT.

    The timestep is shared in a group; so is the noise, unless `shared=False` (RankDPO).

    Attributes:
        shared: one noise a group.
        low: leave out the cleanest part of the path, as a share of its timesteps in [0, 1); 0 as published.
    """

    shared: bool = True
    low: float = 0.0

    @property
    def cacheable(self) -> bool:
        """Always: x_t does not depend on weights."""
        return True

    def __post_init__(self) -> None:
        _check_low(self.low)

    def __call__(self, x0: Tensor, cond: Cond, keys: Keys, path: Path, predict: Predict | None = None) -> NoisedProbe:
        """Makes the probe of N samples."""
        t = send(timestep(keys, path, self.low), x0.device)
        noise = normal(keys, "noise", x0, per_sample=not self.shared)
        return NoisedProbe(path, x0, t, noise, cond)


Grid = Literal["exact", "upstream-0.20", "upstream-0.22"]


class Leg(NamedTuple):
    """One step of an inversion, for N samples: from time `start` to `end`, the network asked for time `ask`."""

    start: Tensor
    end: Tensor
    ask: Tensor
    goes: Tensor  # [N] bool; the others stay where they are


def legs(path: Path, t: Tensor, steps: int, grid: Grid) -> list[Leg]:
    """The steps from clean data up to t [N].

    "exact" ends at each sample's own t, after `steps` network calls for every t (so all processes make equally many),
    and asks for the time that the step ends at, as diffusers does since 0.22. The other two are what the official code
    of InPO and SmPO did under diffusers 0.20 (its first question is for a negative timestep) and under 0.22 and
    later: a fixed grid of 1000 / steps that stops at its last point below t, which is not t. They are there to
    reproduce those numbers.
    """
    everywhere = torch.ones_like(t, dtype=torch.bool)
    if grid == "exact":
        times = path.grid(t, steps)
        return [Leg(times[k], times[k + 1], times[k + 1], everywhere) for k in range(steps)]
    if not isinstance(path, VariancePreserving):
        raise ValueError(f"the grid {grid} is of a diffusion model's timesteps; a flow model takes grid='exact'")
    stride, old = len(path.alphas_cumprod) // steps, grid == "upstream-0.20"
    made = []
    for number in range(steps):
        ask = torch.full_like(t, number * stride + 1 - (stride if old else 0))
        start = ask if old else ask - stride
        # Their first level is alpha_bar[0], not the data's 1 (set_alpha_to_one is off)
        made.append(Leg(start.clamp(min=0), start + stride, ask, ask < t))
    return [leg for leg in made if leg.goes.any()]


@dataclass(frozen=True)
class DDIMInversion:
    """Inverts x0 along the model's own deterministic path to a random timestep (InPO).

    The probe's noise is the one that interpolates x0 to the x_t reached: the target follows from it. Without gradient
    and without guidance, in at least float32.

    Attributes:
        steps: network calls.
        eta: times the DDIM standard deviation of each step is added as fresh noise, each sample its own.
        view: whose weights invert; the official code takes the policy.
        grid: "exact", or one of the official code's grids; see `legs`.
        low: leave out the cleanest part of the path, as in FreshNoise.

    Source: JaydenLyh/InPO @ a9cfc4de train.py:992-1014; inversion as in arXiv 2010.02502 section 5.4. Deviation: the
    grid ends at the sample's t, and every sample has its own.
    """

    steps: int = 10
    eta: float = 0.0
    view: str = "policy"
    grid: Grid = "exact"
    low: float = 0.0

    @property
    def cacheable(self) -> bool:
        """Under the policy x_t changes as it learns."""
        return self.view != "policy"

    def __post_init__(self) -> None:
        _check_low(self.low)
        if self.steps < 1 or self.eta < 0:
            raise ValueError(f"steps is {self.steps} and eta {self.eta}; they have to be at least 1 and 0")

    def __call__(self, x0: Tensor, cond: Cond, keys: Keys, path: Path, predict: Predict) -> NoisedProbe:
        """Makes the probe of N samples by `steps` network calls."""
        t = send(timestep(keys, path, self.low), x0.device)
        x = at_least_float32(x0)
        for number, leg in enumerate(legs(path, t, self.steps, self.grid)):
            moved = path.advance(self._direction(x, leg, cond, path, predict), x, leg.start, leg.end)
            if self.eta:
                noise = normal(keys, f"inversion {number}", x)
                moved = moved + self.eta * expand(self._spread(path, leg), x) * noise
            x = torch.where(expand(leg.goes, x) > 0, moved, x)
        return NoisedProbe(path, x0, t, path.implied_noise(x, at_least_float32(x0), t), cond, x)

    def _direction(self, x: Tensor, leg: Leg, cond: Cond, path: Path, predict: Predict) -> Tensor:
        prediction = predict(x, leg.ask, cond, view=self.view)
        return path.direction(at_least_float32(prediction), x, leg.ask)

    def _spread(self, path: Path, leg: Leg) -> Tensor:
        if self.grid == "exact":
            return path.spread(leg.end, leg.start)
        assert isinstance(path, VariancePreserving)
        # The official code takes the deviation between the asked time and the next one
        last = len(path.alphas_cumprod) - 1
        return path.spread((leg.ask + (last + 1) // self.steps).clamp(max=last), leg.ask.clamp(min=0))


@dataclass(frozen=True)
class ReNoise(DDIMInversion):
    """DDIM inversion whose every step asks twice and goes along the mean of both answers (SmPO).

    The second question is about the point that the first answer leads to, at the same timestep: one fixed-point
    iteration with averaging, which is what SmPO keeps of ReNoise (arXiv 2403.14602).

    Source: JaydenLyh/SmPO @ 8922d54f train.py:999-1028; 10 steps for SDXL, 5 for SD1.5.
    """

    def _direction(self, x: Tensor, leg: Leg, cond: Cond, path: Path, predict: Predict) -> Tensor:
        first = super()._direction(x, leg, cond, path, predict)
        reached = path.advance(first, x, leg.start, leg.end)
        return (first + super()._direction(reached, leg, cond, path, predict)) / 2


@dataclass(frozen=True)
class AnswerTokens:
    """The answer itself: token models have no noise to draw. x0 is tokens [N, L]."""

    @property
    def cacheable(self) -> bool:
        """Always: nothing is drawn."""
        return True

    def __call__(
        self, x0: Tensor, cond: Cond, keys: Keys, path: Path | None, predict: Predict | None = None
    ) -> TokenProbe:
        """Makes the probe of N answers; `cond["answer_mask"]` [N, L] is true on answer tokens."""
        return TokenProbe(x0, cond["answer_mask"], cond)
