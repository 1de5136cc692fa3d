"""Probes: the closed-form logp of a prediction.

A NoisedProbe holds noisy latents at a timestep, a TransitionProbe one step of a sampler, a TokenProbe an
answer. Each can be cut by rows, so that a batch can be asked in parts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmalign.surrogate.likelihood import Cond
from mmalign.surrogate.paths import Path, expand


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision up to float32; float64 stays: an error computed in half shifts the DPO logit by 0.1."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@dataclass(frozen=True)
class NoisedProbe:
    """Latents at a noise level: logp = -1/2 w(t) mean over the latent's elements of (target - prediction)^2.

    The half makes Diffusion-DPO the language-model formula with beta as in the official code. Summed over
    elements and timesteps this is the ELBO of arXiv 2006.11239 up to a constant.

    Attributes:
        path: the noising process.
        x0: [N, ...] clean latents.
        t: [N] timesteps.
        noise: [N, ...].
        cond: N conditions.
        x_t: [N, ...]; None means interpolated. The target follows from x0, noise and t in either case.
    """

    path: Path
    x0: Tensor
    t: Tensor
    noise: Tensor
    cond: Cond
    x_t: Tensor | None = None

    def __post_init__(self) -> None:
        if self.x_t is None:
            object.__setattr__(self, "x_t", self.path.interpolate(self.x0, self.noise, self.t))

    def __len__(self) -> int:
        return len(self.x0)

    def __getitem__(self, rows: Any) -> NoisedProbe:
        assert self.x_t is not None
        return NoisedProbe(
            self.path, self.x0[rows], self.t[rows], self.noise[rows], self.cond.rows(rows), self.x_t[rows]
        )

    @property
    def target(self) -> Tensor:
        """[N, ...] what the network should have said."""
        return self.path.target(self.x0, self.noise, self.t)

    def logp(self, prediction: Tensor) -> Tensor:
        """[N]."""
        error = (at_least_float32(self.target) - at_least_float32(prediction)).square().flatten(1).mean(1)
        return -0.5 * self.path.weight(self.t).to(error) * error


@dataclass(frozen=True)
class TransitionProbe:
    """One stochastic sampler step x_t -> x_s: logp of a Gaussian, mean over elements (DDPO, Flow-GRPO).

    Attributes:
        path: gives the deterministic mean `path.move`.
        x_t: [N, ...] before the step.
        x_s: [N, ...] after it, as it was sampled.
        t: [N] before.
        s: [N] after.
        std: [N] of the step.
        cond: N conditions.
    """

    path: Path
    x_t: Tensor
    x_s: Tensor
    t: Tensor
    s: Tensor
    std: Tensor
    cond: Cond

    def __len__(self) -> int:
        return len(self.x_t)

    def __getitem__(self, rows: Any) -> TransitionProbe:
        parts = (self.x_t[rows], self.x_s[rows], self.t[rows], self.s[rows], self.std[rows])
        return TransitionProbe(self.path, *parts, self.cond.rows(rows))

    def logp(self, prediction: Tensor) -> Tensor:
        """[N] mean over elements of the log-density."""
        x_t = at_least_float32(self.x_t)
        mean = self.path.move(at_least_float32(prediction), x_t, self.t, self.s)
        std = expand(self.std, mean)
        z = (at_least_float32(self.x_s) - mean) / std
        return (-0.5 * z.square() - std.log() - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)


@dataclass(frozen=True)
class TokenProbe:
    """An answer of a token model: logp = sum over answer tokens of log p(token | what came before).

    Attributes:
        tokens: [N, L] int64.
        mask: [N, L] bool, true on answer tokens.
        cond: N conditions (pictures, attention mask ...).
    """

    tokens: Tensor
    mask: Tensor
    cond: Cond

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Any) -> TokenProbe:
        return TokenProbe(self.tokens[rows], self.mask[rows], self.cond.rows(rows))

    def logp(self, prediction: Tensor) -> Tensor:
        """[N], from logits [N, L, V] whose position i predicts token i + 1; or from the last K positions' alone."""
        logits = at_least_float32(prediction[:, :-1])
        tokens, mask = (value[:, value.shape[1] - logits.shape[1] :] for value in (self.tokens, self.mask))
        chosen = logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(-1)
        return (chosen * mask).sum(1)
