"""Draws: where the likelihood is asked for, and the counter-based randomness that everything uses.

Every random number is a pure function of (seed, group, position, draw index, stream) through Philox, a
counter-based generator (Salmon et al., SC 2011). So a resumed run draws what an uninterrupted one would have,
and results do not depend on batch size, number of processes or data workers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mmalign.surrogate.likelihood import Cond, Keys, Predict
from mmalign.surrogate.paths import Path
from mmalign.surrogate.probes import NoisedProbe, TokenProbe


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
    return torch.stack(rows).to(device=like.device, dtype=like.dtype)


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
    cacheable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.low < 1:
            raise ValueError(f"low is {self.low}; it has to be in [0, 1)")

    def __call__(self, x0: Tensor, cond: Cond, keys: Keys, path: Path, predict: Predict | None = None) -> NoisedProbe:
        """Makes the probe of N samples."""
        t = path.timesteps(self.low + (1 - self.low) * uniform(keys, "timestep")).to(x0.device)
        noise = normal(keys, "noise", x0, per_sample=not self.shared)
        return NoisedProbe(path, x0, t, noise, cond)


@dataclass(frozen=True)
class AnswerTokens:
    """The answer itself: token models have no noise to draw. x0 is tokens [N, L]."""

    cacheable: ClassVar[bool] = True

    def __call__(
        self, x0: Tensor, cond: Cond, keys: Keys, path: Path | None, predict: Predict | None = None
    ) -> TokenProbe:
        """Makes the probe of N answers; `cond["answer_mask"]` [N, L] is true on answer tokens."""
        return TokenProbe(x0, cond["answer_mask"], cond)
