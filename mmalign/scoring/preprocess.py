"""From a picture to the pixels that an image tower was trained on, exactly as the official code does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from mmalign.records import MAX_PIXELS, UserError, open_image
from mmalign.scoring.scorer import Card, Scorer

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocess:
    """Resizes to a square of `size` and normalises.

    Attributes:
        resize: `long-side-pad` (HPSv2: long side to size, black bars) or `short-side-crop` (CLIP).
        interpolation: `bicubic-tensor` (float tensors, differentiable) or `bicubic-pil` (8 bit, Pillow).
        antialias: of `bicubic-tensor` only. torchvision < 0.17 had none, so HPSv2's published numbers
            of 2023 were probably measured without; today's `hpsv2` package has it. They differ by ~1e-3.

    Source: tgxs002/HPSv2 @ 866735e, open_clip/transform.py; torchvision's Resize, CenterCrop and ToTensor. Deviations:
    a picture whose long side already has the right size is padded too (the official code leaves it as it is, and then
    fails in the tower); every picture is made RGB on white before it is resized, as PickScore does (OpenAI's CLIP and
    ImageReward do so after it, so they resize a palette by nearest neighbour and drop the alpha channel).
    """

    size: int = 224
    resize: str = "short-side-crop"
    interpolation: str = "bicubic-pil"
    antialias: bool = True
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    @classmethod
    def from_card(cls, facts: Mapping[str, Any], where: str = "card") -> Preprocess:
        """Builds it from a card's mapping; UserError for a field or value that does not exist."""
        try:
            made = cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in facts.items()})
        except TypeError as error:
            raise UserError(f"{where}: preprocess: {error}.") from None
        for name, known in {"resize": RESIZERS, "interpolation": ("bicubic-tensor", "bicubic-pil")}.items():
            if getattr(made, name) not in known:
                raise UserError(f"{where}: preprocess.{name} must be one of {', '.join(known)}.")
        if made.interpolation == "bicubic-pil" and made.resize != "short-side-crop":
            raise UserError(f"{where}: preprocess.resize {made.resize} is for interpolation bicubic-tensor alone.")
        return made

    def __call__(self, picture: Image.Image) -> torch.Tensor:
        """RGB picture -> normalised float32 [3, size, size]."""
        picture = picture.convert("RGB")
        if self.interpolation == "bicubic-pil":
            return self.normalise(to_tensor(pil_short_side_crop(picture, self.size)))
        return self.tensor(to_tensor(picture))

    def tensor(self, pixels: torch.Tensor) -> torch.Tensor:
        """RGB in [0, 1], [3, H, W] -> normalised [3, size, size]; differentiable.

        Exact for `bicubic-tensor`; for `bicubic-pil` it stands in for Pillow without its 8-bit rounding.
        """
        return self.normalise(RESIZERS[self.resize](pixels, self.size, self.antialias))

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Takes off the mean and divides by the deviation."""
        mean, std = (pixels.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (pixels - mean) / std


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """[3, H, W] float32 in [0, 1], kept in the picture's channels-last memory: same values, half the time."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div_(255)


def bicubic(pixels: torch.Tensor, height: int, width: int, antialias: bool) -> torch.Tensor:
    """Resizes [C, H, W] as torchvision does a float tensor: values may overshoot [0, 1]."""
    if (height, width) == pixels.shape[1:]:
        return pixels
    size = max(1, height), max(1, width)
    return F.interpolate(pixels[None], size, mode="bicubic", align_corners=False, antialias=antialias)[0]


def long_side_pad(pixels: torch.Tensor, size: int, antialias: bool) -> torch.Tensor:
    """Long side to `size` (Python's rounding, as the official code), black bars around the middle."""
    scale = size / max(pixels.shape[1:])
    pixels = bicubic(pixels, *(round(side * scale) for side in pixels.shape[1:]), antialias)
    down, right = (size - side for side in pixels.shape[1:])
    return F.pad(pixels, (right // 2, right - right // 2, down // 2, down - down // 2))


def short_side_crop(pixels: torch.Tensor, size: int, antialias: bool) -> torch.Tensor:
    """Short side to `size` (truncating, as torchvision), middle square cut out."""
    height, width = pixels.shape[1:]
    short = min(height, width)
    pixels = bicubic(pixels, int(size * height / short), int(size * width / short), antialias)
    top, left = (round((side - size) / 2) for side in pixels.shape[1:])
    return pixels[:, top : top + size, left : left + size]


def pil_short_side_crop(picture: Image.Image, size: int) -> Image.Image:
    """Resizes with Pillow and cuts out the middle square, as torchvision does with a picture."""
    short = min(picture.size)
    sides = [int(size * side / short) for side in picture.size]
    corner = [round((side - size) / 2) for side in sides]
    box = *corner, *(c + size for c in corner)
    if sides[0] * sides[1] > MAX_PIXELS:  # a sliver: resize what is kept alone, at coordinates of 32 bits
        scale = [side / new for side, new in zip(picture.size, sides, strict=True)] * 2
        kept = [c * s for c, s in zip(box, scale, strict=True)]
        return picture.resize((size, size), Image.Resampling.BICUBIC, box=kept)
    return (picture if (*sides,) == picture.size else picture.resize(sides, Image.Resampling.BICUBIC)).crop(box)


RESIZERS = {"long-side-pad": long_side_pad, "short-side-crop": short_side_crop}


class PictureScorer(Scorer):
    """What the families that judge preprocessed pictures share."""

    def __init__(self, card: Card, device: str | torch.device):
        self.card, self.device = card, torch.device(device)
        self.preprocess = Preprocess.from_card(card.preprocess, f"{card.folder / 'card.yaml'}")
        self.preparation = self.preprocess

    def prepare(self, medium: Any, *, condition: Sequence = (), name: str = "") -> torch.Tensor:
        """[3, size, size] of a picture."""
        return self.preprocess(open_image(medium, name=name))

    def score_tensor(self, pixels: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """See `Scorer.score_tensor`."""
        return self.judge([self.preprocess.tensor(one) for one in pixels.to(self.device)], prompts)["score"]
