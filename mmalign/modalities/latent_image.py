"""What latent image models share: pictures to latents and back.

A family adds how its prompts are embedded and how its network is called: see image_unet.py and image_dit.py.

Shapes: N samples, C latent channels, H W latent size, R the training pictures' side in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmalign.modalities.latent import LatentModality
from mmalign.records import Comparison, UserError, image_size, open_image

MAX_ENLARGED = 16  # a picture that would have to grow by as much is none: a 1 x 1 placeholder, an icon


class LatentImageModality(LatentModality):
    """A diffusers pipeline with an AutoencoderKL as the trainer sees it; the base of the families.

    Attributes:
        guidance: what its pipeline calls the scale of guidance.
        resolution: side of the training pictures in pixels.
        aspect_buckets: train on the nearest of several aspects, of about `resolution` squared pixels each.
    """

    medium = "picture"
    guidance: ClassVar[str] = "guidance_scale"

    def __init__(self, pipeline: Any, source: str = "") -> None:
        super().__init__(pipeline, source)
        # 128: Z-Image, whose pipeline has it as a number in its code
        side = self.unwrapped.config.get("sample_size") or getattr(pipeline, "default_sample_size", 128)
        self.resolution: int = side * pipeline.vae_scale_factor
        self.aspect_buckets = False

    @classmethod
    def without_vae(cls, pipeline: Any, vae: Any) -> None:
        """See `LatentModality.without_vae`: it guesses 8 pixels a latent."""
        pipeline.vae_scale_factor = pixels_per_latent(vae)

    def frame(self, item: Comparison) -> tuple[int, int]:
        """A square of `resolution`, or with `aspect_buckets` the bucket nearest to the first picture's aspect."""
        if not self.aspect_buckets:
            return self.resolution, self.resolution
        width, height = image_size(item.media[0], name=self.name(item, 0))
        return min(self.buckets(), key=lambda frame: (abs(math.log(frame[0] / frame[1] * width / height)), frame))

    def buckets(self) -> list[tuple[int, int]]:
        """Heights and widths of about the area of `resolution` squared, aspects up to 2, as SDXL was trained.

        Both are multiples of eight latents (64 pixels for SDXL; arXiv 2307.01952 appendix I).
        """
        unit = 8 * self.pipeline.vae_scale_factor
        area = (self.resolution / unit) ** 2  # in units
        sides = range(max(1, round(math.sqrt(area / 2))), round(math.sqrt(area * 2)) + 1)
        return [(side * unit, max(1, round(area / side)) * unit) for side in sides]

    def _read(self, item: Comparison, number: int, frame: tuple[int, ...]) -> tuple[Tensor, list[float]]:
        """[3, *frame] in [-1, 1], and "size" [6].

        A picture keeps its aspect: it is brought to cover the frame, the rest cropped at the centre. "size" is its
        original height and width, the crop's top and left, the frame's height and width.
        """
        picture = open_image(item.media[number], name=self.name(item, number))
        cropped, left, top = cover(picture, frame, name=self.name(item, number))
        return pixels(cropped), [float(n) for n in (picture.height, picture.width, top, left, *frame)]

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 16,
        user: Tensor | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Image.Image]:
        """Pictures, one a prompt; the arguments are those of `LatentModality._generated`, None the pipeline's own."""
        settings = {
            "num_inference_steps": num_inference_steps,
            self.guidance: guidance_scale,
            "height": height,
            "width": width,
        }
        told = {"negative_prompt": negative_prompt, "batch_size": batch_size, "user": user, "progress": progress}
        return self._generated(prompts, seeds, settings, **told)

    def _decode(self, latents: Tensor, settings: Mapping[str, Any]) -> list[Image.Image]:
        return self.pipeline.image_processor.postprocess(self._pixels(latents), output_type="pil")

    def _pixels(self, latents: Tensor) -> Tensor:
        """[N, 3, H, W] in [-1, 1] of latents as `_posterior` scales them."""
        vae = self.pipeline.vae
        latents = latents.to(vae.dtype) / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
        return vae.decode(latents, return_dict=False)[0]


def cover(picture: Image.Image, frame: Sequence[int], *, name: str) -> tuple[Image.Image, int, int]:
    """A picture brought to cover a frame of (height, width), the rest cropped at the centre; the crop's left and top.

    Raises:
        UserError: it is too small for that ("too_small").
    """
    (width, height), (high, wide) = picture.size, frame
    if min(width, height) * MAX_ENLARGED <= min(frame):
        raise UserError(
            f"{name}: is {width} x {height} pixels, too small for {wide} x {high}; remove it.", reason="too_small"
        )
    factor = max(wide / width, high / height)
    resized = picture.resize(
        (max(wide, round(width * factor)), max(high, round(height * factor))), Image.Resampling.LANCZOS
    )
    left, top = (resized.width - wide) // 2, (resized.height - high) // 2
    return resized.crop((left, top, left + wide, top + high)), left, top


def pixels(picture: Image.Image) -> Tensor:
    """[3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.asarray(picture, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


def pixels_per_latent(vae: Any) -> int:
    """How many pixels high and wide a latent is."""
    return getattr(vae, "spatial_compression_ratio", None) or 2 ** (len(vae.config.block_out_channels) - 1)
