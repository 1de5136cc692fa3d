"""SD1.5 and SDXL: latent diffusion with a UNet, through diffusers.

What differs between the two is a table of two rows: SDXL adds a pooled embedding and six time ids (original
height and width, crop top and left, target height and width; arXiv 2307.01952 section 2.2).

Shapes: N samples, C = 4 latent channels, H W latent size (an eighth of the picture's), L = 77 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.modalities import Only, Skeleton
from mmalign.modalities.latent import LORA_FILE, frozen, load_modality, makers, model_index, on_meta
from mmalign.modalities.latent_image import LatentImageModality, pixels_per_latent
from mmalign.modalities.single_file import configurations
from mmalign.surrogate.likelihood import Cond
from mmalign.surrogate.paths import VariancePreserving

__all__ = ["KOHYA_FILE", "LORA_FILE", "UNetModality", "load", "skeleton"]

KOHYA_FILE = "pytorch_lora_weights_kohya.safetensors"


def load(
    source: str | Path,
    lora: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    vae: str | Path | None = None,
    only: Only = None,
    config: str | Path | None = None,
) -> UNetModality:
    """Loads SD1.5 or SDXL.

    Args:
        source: pipeline folder, hub id, or an original-format single file.
        lora: LoRA to put on as the policy's adapter, in diffusers or kohya keys.
        dtype: of UNet and text encoders; default bfloat16 on an accelerator, else float32.
        device: default the accelerator when there is one.
        vae: another VAE (hub id or folder), as `madebyollin/sdxl-vae-fp16-fix`; it runs in `dtype`. Without it
            the pipeline's own VAE runs in float32, as SDXL's overflows in float16.
        only: see `mmalign.load`.
        config: for a single file of an unusual size, a pipeline folder with its configurations.

    Raises:
        UserError: a part is missing or does not fit.
    """
    single = Path(source).suffix in (".safetensors", ".ckpt")

    def read(dtype: torch.dtype, parts: Mapping[str, Any]) -> Any:
        from mmalign.modalities.single_file import load_pipeline

        pipeline = load_pipeline(Path(source), dtype, config)
        for name, part in parts.items():
            setattr(pipeline, name, part)
        return pipeline

    shapes = partial(skeleton, config or source)
    return load_modality(UNetModality, shapes, source, lora, dtype, device, vae, only, read if single else None)


def skeleton(source: str | Path) -> Skeleton:
    """UNet ("network") and frozen parts as shapes without memory, for the memory plan."""
    single = Path(source).suffix == ".safetensors"
    parts = on_meta(_single_file_makers(Path(source)) if single else makers(source), UNetModality.part)
    scale = pixels_per_latent(parts["vae"])
    index = configurations(Path(source))["model_index"] if single else model_index(source)
    return Skeleton(
        parts,
        partial(example, parts["network"].config, scale),
        UNetModality.targets,
        frozen(index, UNetModality.part),
    )


def _single_file_makers(path: Path) -> dict[str, Any]:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    configs = configurations(path)
    made: dict[str, Any] = {
        "unet": partial(UNet2DConditionModel.from_config, configs["unet"]),
        "vae": partial(AutoencoderKL.from_config, configs["vae"]),
    }
    for name in configs.keys() & {"text_encoder", "text_encoder_2"}:
        made[name] = partial(CLIPTextModel, CLIPTextConfig(**configs[name]))
    return made


def example(
    config: Any, scale: int, samples: int, resolution: int | None, dtype: torch.dtype, length: float | None = None
) -> dict[str, Any]:
    """A UNet's arguments by name: latents [N, C, H, W], timesteps [N], prompt embeddings [N, L, D], for SDXL more.

    Args:
        config: the UNet's.
        scale: pixels a latent.
        samples: N.
        resolution: side of the pictures in pixels; None is what the UNet was made for.
        dtype: of the arguments.
        length: of no meaning for a picture.
    """
    side = resolution // scale if resolution else config.sample_size
    made: dict[str, Any] = {
        "sample": torch.zeros(samples, config.in_channels, side, side, dtype=dtype, requires_grad=True),
        "timestep": torch.zeros(samples, dtype=torch.int64),
        "encoder_hidden_states": torch.zeros(samples, 77, config.cross_attention_dim, dtype=dtype),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        made["added_cond_kwargs"] = {
            "text_embeds": torch.zeros(samples, pooled, dtype=dtype),
            "time_ids": torch.zeros(samples, 6, dtype=dtype),
        }
    return made


class UNetModality(LatentImageModality):
    """A Stable Diffusion (XL) pipeline as the trainer sees it."""

    part = "unet"
    targets = ("to_k", "to_q", "to_v", "to_out.0")  # the published Diffusion-DPO and MaPO LoRAs train these

    def __init__(self, pipeline: Any, source: str = "") -> None:
        super().__init__(pipeline, source)
        self.is_xl = hasattr(pipeline, "text_encoder_2")
        scheduler = pipeline.scheduler
        self.path = VariancePreserving(scheduler.alphas_cumprod.clone(), scheduler.config.prediction_type)

    @property
    def unet(self) -> Any:
        """The network without what accelerate or compile wrapped around it."""
        return self.unwrapped

    def _embed(self, prompts: list[str]) -> Cond:
        """Prompt embeddings [N, L, D], and for SDXL the pooled ones [N, D]."""
        device = self.pipeline.text_encoder.device
        made = self.pipeline.encode_prompt(
            prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        entries = {"prompt_embeds": made[0]}
        if self.is_xl:
            entries["text_embeds"] = made[2]
        return Cond(entries)

    def _sized(self, cond: Cond, sizes: Tensor) -> Cond:
        """For SDXL the time ids: a comparison's first picture's, so that its members differ in nothing else."""
        return Cond({**cond, "time_ids": sizes}) if self.is_xl else cond

    @torch.no_grad()
    def empty(self) -> Cond:
        """The empty prompt as guidance meets it: zeros for SDXL's `force_zeros_for_empty_prompt`, else encoded."""
        cond = super().empty()
        if self.pipeline.config.get("force_zeros_for_empty_prompt", False):
            cond = Cond({name: torch.zeros_like(value) for name, value in cond.items()})
        return cond

    def _arguments(self, latents: Tensor, t: Tensor, cond: Cond) -> dict[str, Any]:
        added = {name: cond[name] for name in ("text_embeds", "time_ids") if name in cond}
        return {
            "sample": latents,
            "timestep": t,
            "encoder_hidden_states": cond["prompt_embeds"],
            "added_cond_kwargs": added or None,
        }

    def _read_lora(self, file: str) -> tuple[dict[str, Tensor], Any, Any]:
        return self.pipeline.lora_state_dict(file, unet_config=self.unet.config, return_lora_metadata=True)

    def _save_lora(self, folder: Path) -> dict[str, Tensor]:
        """In diffusers and in kohya keys."""
        from diffusers.utils import convert_state_dict_to_kohya
        from safetensors.torch import save_file

        layers = super()._save_lora(folder)
        kohya = convert_state_dict_to_kohya({f"unet.{key}": value for key, value in layers.items()})
        # diffusers writes alpha = rank; the adapter's own alpha is what keeps its strength.
        alpha = torch.tensor(float(self.unet.peft_config["policy"].lora_alpha))
        save_file(
            {key: alpha.clone() if key.endswith(".alpha") else value.contiguous() for key, value in kohya.items()},
            folder / KOHYA_FILE,
        )
        return layers
