"""SD3: a rectified flow over latents with a joint-attention transformer, through diffusers.

`TransformerModality` holds what flow transformers share: the path and the call. A family adds how its prompts are
embedded, the transformer's arguments by name with its own count of time, and what a LoRA trains; a row of `KINDS` then
names it.

There is one LoRA file, in diffusers' keys: diffusers converts no transformer's LoRA to kohya's names, and ComfyUI reads
these keys as they are.

Shapes: N samples, C = 16 latent channels, H W latent size (an eighth of the picture's), L tokens (77 of CLIP, then 256
of T5), D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.modalities import Only, Piece, Skeleton, class_name
from mmalign.modalities.latent import frozen, load_modality, makers, model_index, on_meta
from mmalign.modalities.latent_image import LatentImageModality, pixels_per_latent
from mmalign.modalities.user import arguments
from mmalign.records import Comparison, UserError
from mmalign.surrogate.likelihood import Cond
from mmalign.surrogate.paths import RectifiedFlow

CLIP_TOKENS, T5_TOKENS = 77, 256  # what StableDiffusion3Pipeline generates with, T5 absent or not


def load(
    source: str | Path,
    lora: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    vae: str | Path | None = None,
    only: Only = None,
) -> TransformerModality:
    """Loads a flow transformer's pipeline; text encoders that its `model_index.json` leaves out stay out.

    Args:
        source: pipeline folder or hub id.
        lora: LoRA to put on as the policy's adapter, in diffusers keys.
        dtype: of transformer and text encoders; default bfloat16 on an accelerator, else float32.
        device: default the accelerator when there is one.
        vae: another VAE (hub id or folder); it runs in `dtype`, the pipeline's own in float32.
        only: see `mmalign.load`.

    Raises:
        UserError: a part is missing or does not fit.
    """
    return load_modality(KINDS[class_name(source)], partial(skeleton, source), source, lora, dtype, device, vae, only)


def skeleton(source: str | Path) -> Skeleton:
    """Transformer ("network") and frozen parts as shapes without memory, for the memory plan."""
    kind = KINDS[class_name(source)]
    parts = on_meta(makers(source), kind.part)
    scale = pixels_per_latent(parts["vae"])
    example = partial(kind.example, parts["network"].config, scale)
    return Skeleton(parts, example, kind.targets, frozen(model_index(source), kind.part))


class TransformerModality(LatentImageModality):
    """A flow transformer's pipeline as the trainer sees it."""

    part = "transformer"

    def __init__(self, pipeline: Any, source: str = "") -> None:
        super().__init__(pipeline, source)
        config = pipeline.scheduler.config
        # Training draws t ~ logit-normal(0, 1) and shifts it as the scheduler's own timesteps are shifted. diffusers'
        # train_dreambooth_lora_sd3.py and flow_grpo's train_sd3_dpo.py (ac4c86e, lines 535 and 897) look their logit-
        # normal draw up in `scheduler.timesteps`, which FlowMatchEulerDiscreteScheduler shifts when it is made; SD3's
        # configuration says 3. A dynamic shift is not in those timesteps, so those scripts train without it.
        shift = 1.0 if config.use_dynamic_shifting else config.shift
        self.path = RectifiedFlow(density="logit-normal", shift=shift)

    def predict(self, probe: Any, view: str) -> Tensor:
        """[N, C, H, W] velocity noise - x0; the only call of the trained network."""
        dtype = self.unwrapped.dtype
        cond = probe.cond.view(view).to(self.device, dtype)
        named = self._arguments(probe.x_t.to(self.device, dtype), probe.t.to(self.device), cond)
        named |= arguments(self.unwrapped.forward, cond.get("user"))
        return self.network(**named, return_dict=False)[0]

    def _arguments(self, latents: Tensor, t: Tensor, cond: Cond) -> dict[str, Any]:
        """The transformer's arguments by name, of latents [N, C, H, W] and t [N] in [0, 1]."""
        raise NotImplementedError

    @staticmethod
    def example(
        config: Any, scale: int, samples: int, resolution: int | None, dtype: torch.dtype, length: float | None = None
    ) -> dict[str, Any]:
        """The transformer's arguments by name, for the memory plan.

        Args:
            config: the transformer's.
            scale: pixels a latent.
            samples: N.
            resolution: side of the pictures in pixels; None is what the transformer was made for.
            dtype: of the arguments.
            length: of no meaning for a picture.
        """
        raise NotImplementedError


class SD3Modality(TransformerModality):
    """Stable Diffusion 3 and 3.5: two CLIPs and T5, which may be absent, read a prompt (arXiv 2403.03206)."""

    # yifan123/flow_grpo scripts/train_sd3_dpo.py:389; of SD3.5's dual attention the second, `attn2`, is not among them
    targets = (
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "attn.to_k",
        "attn.to_out.0",
        "attn.to_q",
        "attn.to_v",
    )

    def encode_media(self, members: Sequence[tuple[Comparison, int]]) -> list[Piece]:
        """See `LatentModality.encode_media`.

        Raises:
            UserError: `resolution` is no whole number of patches, or beyond the position table; the VAE overflows.
        """
        config = self.unwrapped.config
        patch = self.pipeline.vae_scale_factor * config.patch_size
        limit = patch * config.pos_embed_max_size
        if self.resolution % patch or self.resolution > limit:
            raise UserError(
                f"resolution {self.resolution}: {self.source or 'this model'} takes multiples of {patch} pixels up to"
                f" {limit}."
            )
        return super().encode_media(members)

    def _embed(self, prompts: list[str]) -> Cond:
        """Prompt embeddings [N, L, D], zeros where T5 is absent, and the pooled ones [N, D] of the two CLIPs."""
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts,
            None,
            None,
            device=self.pipeline.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=T5_TOKENS,
        )
        return Cond({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})

    def _arguments(self, latents: Tensor, t: Tensor, cond: Cond) -> dict[str, Any]:
        """Time counts to 1000 as the scheduler's does, not rounded; the output is the velocity as it stands."""
        return {
            "hidden_states": latents,
            "timestep": t * self.pipeline.scheduler.config.num_train_timesteps,
            "encoder_hidden_states": cond["prompt_embeds"],
            "pooled_projections": cond["pooled_prompt_embeds"],
        }

    @staticmethod
    def example(
        config: Any, scale: int, samples: int, resolution: int | None, dtype: torch.dtype, length: float | None = None
    ) -> dict[str, Any]:
        """See the base."""
        side = resolution // scale if resolution else config.sample_size
        tokens = CLIP_TOKENS + T5_TOKENS
        return {
            "hidden_states": torch.zeros(samples, config.in_channels, side, side, dtype=dtype),
            "timestep": torch.zeros(samples),
            "encoder_hidden_states": torch.zeros(samples, tokens, config.joint_attention_dim, dtype=dtype),
            "pooled_projections": torch.zeros(samples, config.pooled_projection_dim, dtype=dtype),
        }


KINDS: dict[str, type[TransformerModality]] = {"StableDiffusion3Pipeline": SD3Modality}
