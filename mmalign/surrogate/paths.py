"""From data to noise and back: the two families of probability paths, diffusion and flow.

For both, x0 is data and t = 0 is clean. VariancePreserving counts t in whole timesteps 0 ... T-1 (diffusion
models, SD1.5 to PixArt); VDiffusion (Stable Audio) and RectifiedFlow (SD3, FLUX, Wan) have t in [0, 1]. All functions
take t as [N] and broadcast over any latent shape [N, ...], so pictures, video and sound share them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from mmalign.surrogate.likelihood import send


def expand(values: Tensor, like: Tensor) -> Tensor:
    """[N] -> [N, 1, ...] with as many dimensions as `like`, in its dtype and on its device."""
    return values.to(device=like.device, dtype=like.dtype).reshape(-1, *[1] * (like.ndim - 1))


class Path(Protocol):
    """A noising process; what draws and probes ask of it."""

    def timesteps(self, u: Tensor) -> Tensor:
        """U [N] in [0, 1) to timesteps with the family's density."""
        ...

    def fraction(self, t: Tensor) -> Tensor:
        """[N] how far into the noise, in [0, 1)."""
        ...

    def interpolate(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t."""
        ...

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network is asked to predict."""
        ...

    def weight(self, t: Tensor) -> Tensor:
        """[N] w(t) of the squared error."""
        ...

    def denoised(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The x0 that a prediction implies."""
        ...

    def implied_noise(self, x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """The noise that makes x0 into x_t."""
        ...

    def move(self, prediction: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The deterministic step from t to s, with what the network said at t."""
        ...

    def grid(self, t: Tensor, steps: int) -> Tensor:
        """[steps + 1, N] times from clean data to exactly t, for every sample its own."""
        ...

    def direction(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Where a prediction made for x_t at time t points: the noise or the velocity that it implies."""
        ...

    def advance(self, direction: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Takes x_t from t to s along a direction."""
        ...

    def spread(self, t: Tensor, s: Tensor) -> Tensor:
        """[N] standard deviation of x_s given x_t and x0, for s below t: the noise of a stochastic step."""
        ...

    @property
    def weighted(self) -> bool:
        """False when w(t) is 1 everywhere."""
        ...


class _Diffusion:
    """x_t = signal(t) x0 + sigma(t) noise with signal^2 + sigma^2 = 1; a path says what its times are."""

    prediction_type: Literal["epsilon", "v_prediction", "sample"]

    def _scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and sigma, expanded to `like`."""
        raise NotImplementedError

    def _alpha_bar(self, t: Tensor) -> Tensor:
        """[N] signal squared."""
        raise NotImplementedError

    def interpolate(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t."""
        signal, sigma = self._scales(t, x0)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network is asked to predict."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        signal, sigma = self._scales(t, x0)
        return signal * noise - sigma * x0

    def weight(self, t: Tensor) -> Tensor:
        """[N] ones: the official Diffusion-DPO code has no SNR weight."""
        return torch.ones(t.shape, device=t.device)

    def denoised(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The x0 that a prediction implies."""
        if self.prediction_type == "sample":
            return prediction
        signal, sigma = self._scales(t, x_t)
        if self.prediction_type == "epsilon":
            return (x_t - sigma * prediction) / signal
        return signal * x_t - sigma * prediction

    def implied_noise(self, x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """The noise that makes x0 into x_t."""
        signal, sigma = self._scales(t, x_t)
        return (x_t - signal * x0) / sigma

    def move(self, prediction: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The deterministic DDIM step from t to s, in either direction (arXiv 2010.02502, eq. 12, eta = 0)."""
        return self.interpolate(self.denoised(prediction, x_t, t), self.direction(prediction, x_t, t), s)

    def direction(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that a prediction made for x_t at timestep t implies."""
        if self.prediction_type == "epsilon":
            return prediction
        if self.prediction_type == "sample":
            return self.implied_noise(x_t, prediction, t)
        signal, sigma = self._scales(t, x_t)
        return signal * prediction + sigma * x_t

    def advance(self, direction: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The DDIM step from t to s with a given noise."""
        signal, sigma = self._scales(t, x_t)
        return self.interpolate((x_t - sigma * direction) / signal, direction, s)

    def spread(self, t: Tensor, s: Tensor) -> Tensor:
        """[N] DDIM's standard deviation at eta = 1 (arXiv 2010.02502, eq. 16); 0 where s is the data."""
        at, below = self._alpha_bar(t).double(), self._alpha_bar(s).double()
        return ((1 - below) / (1 - at) * (1 - at / below)).clamp(min=0).sqrt()


@dataclass(frozen=True)
class VariancePreserving(_Diffusion):
    """x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) noise (DDPM, arXiv 2006.11239).

    Timestep 0 is the first noisy level; -1 stands for the data itself (alpha_bar = 1), where inversions start.

    Attributes:
        alphas_cumprod: [T], alpha_bar for timestep 0 ... T-1.
        prediction_type: "epsilon", "v_prediction" or "sample", in diffusers' spelling.
    """

    alphas_cumprod: Tensor
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    weighted: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"prediction_type {self.prediction_type!r} is not epsilon, v_prediction or sample")

    def _scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = self._alpha_bar(t).to(torch.promote_types(like.dtype, torch.float32))
        return expand(alpha_bar.sqrt(), like), expand((1 - alpha_bar).sqrt(), like)

    def _alpha_bar(self, t: Tensor) -> Tensor:
        alpha_bar = send(self.alphas_cumprod, t.device)[t.clamp(min=0)]
        return torch.where(t < 0, torch.ones_like(alpha_bar), alpha_bar)

    def timesteps(self, u: Tensor) -> Tensor:
        """U in [0, 1) -> uniform integers 0 ... T-1."""
        return (u * len(self.alphas_cumprod)).long().clamp_(max=len(self.alphas_cumprod) - 1)

    def fraction(self, t: Tensor) -> Tensor:
        """[N] how far into the noise, in [0, 1)."""
        return t.double() / len(self.alphas_cumprod)

    def grid(self, t: Tensor, steps: int) -> Tensor:
        """[steps + 1, N] timesteps, -1 (data) first, t last; a timestep below `steps` comes up more than once."""
        share = torch.arange(1, steps + 1, device=t.device, dtype=torch.float64)[:, None] / steps
        return torch.cat([torch.full_like(t, -1)[None], (share * t).round().to(t.dtype)])


@dataclass(frozen=True)
class VDiffusion(_Diffusion):
    """x_t = cos(pi t / 2) x0 + sin(pi t / 2) noise, t in [0, 1] and uniform (arXiv 2202.00512; Stable Audio).

    The network predicts v = cos(pi t / 2) noise - sin(pi t / 2) x0.
    Source: Stability-AI/stable-audio-tools @ 50049e3, inference/sampling.py:9 and training/diffusion.py:381-420.
    """

    prediction_type: Literal["epsilon", "v_prediction", "sample"] = field(default="v_prediction", init=False)
    weighted: bool = field(default=False, init=False)

    def _scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        angle = t.double() * (math.pi / 2)
        return expand(angle.cos(), like), expand(angle.sin(), like)

    def _alpha_bar(self, t: Tensor) -> Tensor:
        return (t.double() * (math.pi / 2)).cos().square()

    def timesteps(self, u: Tensor) -> Tensor:
        """U in [0, 1) -> itself, short of both ends."""
        return u.double().clamp(1e-7, 1 - 1e-7).to(torch.float32)

    def fraction(self, t: Tensor) -> Tensor:
        """[N] how far into the noise: t itself."""
        return t.double()

    def grid(self, t: Tensor, steps: int) -> Tensor:
        """[steps + 1, N] evenly from 0 to t."""
        return torch.arange(steps + 1, device=t.device, dtype=t.dtype)[:, None] * t / steps


@dataclass(frozen=True)
class RectifiedFlow:
    """x_t = (1 - t) x0 + t noise, velocity = noise - x0 (arXiv 2209.03003; SD3 arXiv 2403.03206).

    Attributes:
        weight_name: "uniform", or "epsilon" for (1-t)^2, which makes the error that of the noise.
        density: "uniform" or "logit-normal" over t.
        shift: the family's resolution shift, t -> shift t / (1 + (shift - 1) t).
    """

    weight_name: Literal["uniform", "epsilon"] = "uniform"
    density: Literal["uniform", "logit-normal"] = "logit-normal"
    shift: float = 1.0

    @property
    def weighted(self) -> bool:
        """False when w(t) is 1 everywhere."""
        return self.weight_name != "uniform"

    def timesteps(self, u: Tensor) -> Tensor:
        """U in [0, 1) -> t in (0, 1) with the family's density and shift."""
        t = u.double().clamp(1e-7, 1 - 1e-7)
        if self.density == "logit-normal":
            t = torch.sigmoid(torch.special.ndtri(t))
        t = self.shift * t / (1 + (self.shift - 1) * t)
        return t.to(torch.float32)

    def fraction(self, t: Tensor) -> Tensor:
        """[N] how far into the noise: t itself."""
        return t.double()

    def interpolate(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t."""
        t = expand(t, x0)
        return (1 - t) * x0 + t * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The velocity noise - x0."""
        return noise - x0

    def weight(self, t: Tensor) -> Tensor:
        """[N]: 1, or (1-t)^2."""
        return (1 - t) ** 2 if self.weighted else torch.ones_like(t)

    def denoised(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The x0 that a velocity implies."""
        return x_t - expand(t, x_t) * prediction

    def implied_noise(self, x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """The noise that makes x0 into x_t; at t = 0 any would, and x0 itself (velocity 0) is returned."""
        t = expand(t, x_t)
        return torch.where(t == 0, x0, (x_t - (1 - t) * x0) / torch.where(t == 0, 1.0, t))

    def move(self, prediction: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The Euler step from t to s, in either direction."""
        return self.advance(prediction, x_t, t, s)

    def grid(self, t: Tensor, steps: int) -> Tensor:
        """[steps + 1, N] evenly from 0 to t."""
        return torch.arange(steps + 1, device=t.device, dtype=t.dtype)[:, None] * t / steps

    def direction(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The velocity: the prediction itself."""
        return prediction

    def advance(self, direction: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The Euler step from t to s with a given velocity."""
        return x_t + expand(s - t, x_t) * direction

    def spread(self, t: Tensor, s: Tensor) -> Tensor:
        """[N] as for diffusion, with signal 1 - t and sigma t: sigma_s / sigma_t times what noise came in between."""
        t, s = t.double(), s.double()
        between = t.square() - ((1 - t) / (1 - s)).square() * s.square()
        return s / t.clamp(min=1e-12) * between.clamp(min=0).sqrt()
