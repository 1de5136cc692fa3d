"""Heads: what turns the features of a trunk into scores.

A contrastive CLIP learns to ignore whatever its captions do not say, so its embedding is nearly blind to the
finish of a picture (colour, contrast, light). Its first layers are not: they have not yet thrown it away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from mmalign.records import UserError
from mmalign.scoring import weights
from mmalign.scoring.scorer import Card

KINDS = ("linear", "mlp", "mlp-relu", "silu2")


def make_head(kind: str, width: int, outputs: int = 1) -> nn.Sequential:
    """A head of features [N, width] -> [N, outputs].

    linear: one affine map · mlp: width-1024-128-64-16-outputs with dropout and no activation, so an affine map again
    once it is trained (ImageReward; LAION's `linearMSE`) · mlp-relu: with ReLU (LAION's `reluMSE`) · silu2: two
    layers, SiLU between. Its state dict has the numbers of the official checkpoints: `0.weight`, `2.weight`, ...

    Source: zai-org/ImageReward @ c1392c6, ImageReward.py; christophschuhmann/improved-aesthetic-predictor @ 6934dd8.

    Raises:
        UserError: there is no such kind.
    """
    if kind not in KINDS:
        raise UserError(f"A head's kind must be one of {', '.join(KINDS)}, not {kind!r}.")
    if kind == "linear":
        return nn.Sequential(nn.Linear(width, outputs))
    if kind == "silu2":
        return nn.Sequential(nn.Linear(width, 128), nn.SiLU(), nn.Linear(128, outputs))
    layers: list[nn.Module] = []
    for (a, b), dropped in zip(pairwise((width, 1024, 128, 64, 16)), (0.2, 0.2, 0.1, 0), strict=True):
        relu = [nn.ReLU()] if kind == "mlp-relu" else []
        layers += [nn.Linear(a, b), *relu, *([nn.Dropout(dropped)] if dropped else [])]
    return nn.Sequential(*layers, nn.Linear(16, outputs))


class AspectHeads(nn.Module):
    """A head of its own for each aspect, all on the same features.

    Args:
        names: of the aspects.
        width: number of features.
        kind: see `make_head`.
    """

    def __init__(self, names: Sequence[str], width: int, kind: str):
        super().__init__()
        self.heads = nn.ModuleDict({name: make_head(kind, width) for name in names})

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Features [N, width] -> aspect -> [N]."""
        return {name: head(features).squeeze(-1) for name, head in self.heads.items()}


def load_aspects(card: Card, width: int) -> AspectHeads:
    """The heads of a card's `score.head`: {file, kind, names, weights}.

    Raises:
        UserError: a field is missing or wrong, or the file is missing or does not fit.
    """
    facts = card.score.get("head") or {}
    names = facts.get("names")
    if not isinstance(names, list) or not names or "score" in names:
        raise UserError(f"{card.folder / 'card.yaml'}: score.head.names must list the aspects, none called score.")
    heads = AspectHeads(names, width, facts.get("kind", "linear"))
    weights.fill(heads, weights.state_dict(card, facts), card)
    return heads


def with_mean(aspects: dict[str, Tensor], shares: Mapping[str, float] | None = None) -> dict[str, Tensor]:
    """Adds `score`, the mean of the aspects; shares: aspect -> its weight in it, default 1."""
    by = {name: float((shares or {}).get(name, 1)) for name in aspects}
    return {"score": sum(by[name] * value for name, value in aspects.items()) / sum(by.values()), **aspects}


class PreferenceHead(nn.Module):
    """How much a person would like a picture: its finish, plus its truth to the prompt.

    finish = MLP(mean and deviation over the picture of ReLU(1x1 convolution) of each tapped layer)
    alignment = strength · sigmoid(slope · (cosine - middle)); it saturates, because a picture that is true
    to its prompt does not become truer, and the finish decides among such pictures

    Args:
        taps: names of the image tower's layers -> their channels.
        width: features kept of each layer.
    """

    def __init__(self, taps: Mapping[str, int], width: int = 24, hidden: int = 48):
        super().__init__()
        self.taps = tuple(taps)
        self.mix = nn.ModuleList([nn.Conv2d(channels, width, 1) for channels in taps.values()])
        self.mlp = nn.Sequential(nn.Linear(2 * width * len(taps), hidden), nn.GELU(), nn.Linear(hidden, 1))
        self.strength = nn.Parameter(torch.tensor(8.0))
        self.slope = nn.Parameter(torch.tensor(12.0))
        self.middle = nn.Parameter(torch.tensor(0.6))

    def forward(self, cosine: Tensor, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Cosines [N] and tapped layers [N, C, H, W] -> finish [N] and alignment [N]."""
        kept = [mix(layer).relu() for mix, layer in zip(self.mix, features, strict=True)]
        finish = self.mlp(pooled(kept)).squeeze(-1)
        return finish, self.strength * torch.sigmoid(self.slope * (cosine - self.middle))


def pooled(layers: Sequence[Tensor]) -> Tensor:
    """Mean and deviation over the picture of each channel of layers [N, C, H, W] or [N, L, C] -> [N, sum of 2 C]."""
    flat = [layer.flatten(2) if layer.ndim == 4 else layer.transpose(1, 2) for layer in layers]
    # The small number keeps the root's gradient finite where a channel is constant.
    return torch.cat([part for x in flat for part in (x.mean(-1), (x.var(-1, unbiased=False) + 1e-6).sqrt())], -1)


def tapped(tower: nn.Module, pixels: Tensor, names: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
    """Runs an image tower and returns its embedding and the outputs of the named layers."""
    outputs: dict[str, Tensor] = {}
    hooks = [
        tower.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: outputs.update({name: out}))
        for name in names
    ]
    try:
        embedding = tower(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return embedding, [outputs[name] for name in names]
