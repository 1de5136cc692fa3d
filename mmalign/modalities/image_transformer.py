"""What picture models share whose network is a transformer: the path, the call, its arguments for the memory plan.

The families are in image_dit.py.

Shapes: N samples, C latent channels, H W latent size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from mmalign.modalities import Piece
from mmalign.modalities.latent_image import LatentImageModality
from mmalign.records import Comparison, UserError
from mmalign.surrogate.likelihood import Cond
from mmalign.surrogate.paths import Path, RectifiedFlow


class TransformerModality(LatentImageModality):
    """A pipeline around a transformer over latents as the trainer sees it; the base of the families.

    Attributes:
        patch: latents of the VAE, high and wide, that make a token.
        folded: latents of the VAE, high and wide, that are one element of x0.
    """

    part = "transformer"
    patch: ClassVar[int] = 2
    folded: ClassVar[int] = 1

    def __init__(self, pipeline: Any, source: str = "") -> None:
        super().__init__(pipeline, source)
        self.path = self._path(pipeline.scheduler)

    @staticmethod
    def _path(scheduler: Any) -> Path:
        """The process that the family was trained with, from the pipeline's scheduler.

        Default: a rectified flow with t ~ logit-normal(0, 1), shifted as the scheduler's own timesteps are. diffusers'
        train_dreambooth_lora_sd3.py and flow_grpo's train_sd3_dpo.py (ac4c86e, lines 535 and 897) look their logit-
        normal draw up in `scheduler.timesteps`, which FlowMatchEulerDiscreteScheduler shifts when it is made; SD3's
        configuration says 3. A dynamic shift is not in those timesteps, so those scripts train without it. The density
        is SD3's (arXiv 2403.03206, section 3.1); that of FLUX's training is not published, Flow-Factory's DPO takes
        this one for it too (a0b2bc5, hparams/training_args.py:656), diffusers' LoRA scripts draw t uniformly.
        """
        config = scheduler.config
        return RectifiedFlow(density="logit-normal", shift=1.0 if config.use_dynamic_shifting else config.shift)

    def encode_media(self, members: Sequence[tuple[Comparison, int]]) -> list[Piece]:
        """See `LatentModality.encode_media`.

        Raises:
            UserError: `resolution` is no whole number of patches, or beyond the position table; the VAE overflows.
        """
        patch, limit = self.pipeline.vae_scale_factor * self.patch, self.unwrapped.config.get("pos_embed_max_size")
        if self.resolution % patch or (limit and self.resolution > limit * patch):
            most = f" up to {limit * patch}" if limit else ""
            raise UserError(
                f"resolution {self.resolution}: {self.source or 'this model'} takes multiples of {patch} pixels{most}."
            )
        return super().encode_media(members)

    def predict(self, probe: Any, view: str) -> Tensor:
        """[N, C, H, W] velocity noise - x0, or what else the path asks for."""
        return self._prediction(super().predict(probe, view), probe.x_t)

    def _arguments(self, latents: Tensor, t: Tensor, cond: Cond) -> dict[str, Any]:
        return self.named(self.unwrapped.config, self.pipeline.vae_scale_factor * self.folded, latents, t, cond)

    @staticmethod
    def named(config: Any, scale: int, latents: Tensor, t: Tensor, cond: Mapping[str, Any]) -> dict[str, Any]:
        """The transformer's arguments by name.

        Args:
            config: the transformer's.
            scale: pixels, high and wide, an element of x0.
            latents: [N, C, H, W].
            t: [N] as the path counts it.
            cond: what `_embed` made.
        """
        raise NotImplementedError

    def _prediction(self, output: Tensor, latents: Tensor) -> Tensor:
        """[N, C, H, W] in the path's convention, of the transformer's output for these latents."""
        return output

    @classmethod
    def shapes(cls, config: Any) -> dict[str, tuple[int, ...]]:
        """Of `x0` for pictures of the model's own size, and of what `_embed` makes of one prompt."""
        raise NotImplementedError

    @classmethod
    def example(
        cls,
        config: Any,
        scale: int,
        samples: int,
        resolution: int | None,
        dtype: torch.dtype,
        length: float | None = None,
    ) -> dict[str, Any]:
        """The transformer's arguments by name, for the memory plan.

        Args:
            config: the transformer's.
            scale: pixels, high and wide, an element of x0.
            samples: N.
            resolution: side of the pictures in pixels; None is what the transformer was made for.
            dtype: of the arguments.
            length: of no meaning for a picture.
        """
        made = {name: torch.ones(samples, *shape, dtype=dtype) for name, shape in cls.shapes(config).items()}
        x0 = made.pop("x0")
        side = resolution // scale if resolution else x0.shape[-1]
        return cls.named(config, scale, x0.new_ones(*x0.shape[:2], side, side), torch.ones(samples), made)

    @classmethod
    def media(
        cls, config: Any, scale: int, samples: int, resolution: int | None, length: float | None = None
    ) -> tuple[int, ...]:
        """Shape of what the VAE takes, for the memory plan; the arguments are those of `example`."""
        side = resolution or scale * cls.shapes(config)["x0"][-1]
        return samples, 3, side, side


class PackedModality(TransformerModality):
    """Of the families whose transformer knows a picture as a row of tokens, each a patch of latents.

    Packing is inside of `predict`: everything else knows latents as [N, C, H, W].
    """

    def _prediction(self, output: Tensor, latents: Tensor) -> Tensor:
        return unpack(output, latents.shape[-2], latents.shape[-1])

    def _decode(self, latents: Tensor, settings: Mapping[str, Any]) -> list[Image.Image]:
        scale = self.pipeline.vae_scale_factor
        own = self.pipeline.default_sample_size * scale
        height, width = (settings.get(name, own) // (2 * scale) * 2 for name in ("height", "width"))
        return super()._decode(unpack(latents, height, width), settings)


def pack(latents: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, H/2 W/2, 4 C]: a token is a patch of 2 x 2, channel by channel."""
    return pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """[N, H/2 W/2, 4 C] -> [N, C, H, W]."""
    return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


class BinnedModality(TransformerModality):
    """Of the families that generate at the nearest size they were trained at, and then resize to the one asked for."""

    def _prediction(self, output: Tensor, latents: Tensor) -> Tensor:
        """Without a learned variance, which the sampler leaves out too."""
        return output[:, : latents.shape[1]]

    def _decode(self, latents: Tensor, settings: Mapping[str, Any]) -> list[Image.Image]:
        own = self.unwrapped.config.sample_size * self.pipeline.vae_scale_factor
        height, width = (settings.get(name, own) for name in ("height", "width"))
        processor = self.pipeline.image_processor
        resized = processor.resize_and_crop_tensor(self._pixels(latents), width, height)
        return processor.postprocess(resized, output_type="pil")
