"""A small preference head on a frozen CLIP.

A contrastive CLIP learns to ignore whatever its captions do not say, so its embedding is nearly blind to the
finish of a picture (colour, contrast, light). Its first layers are not: they have not yet thrown it away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


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
        pooled = []
        for mix, layer in zip(self.mix, features, strict=True):
            kept = mix(layer).relu().flatten(2)  # [N, width, H W]
            pooled += [kept.mean(-1), (kept.var(-1, unbiased=False) + 1e-6).sqrt()]
        finish = self.mlp(torch.cat(pooled, -1)).squeeze(-1)
        return finish, self.strength * torch.sigmoid(self.slope * (cosine - self.middle))


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
