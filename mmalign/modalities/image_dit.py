"""SD3, FLUX.1, PixArt and what came after them: transformers over latents, through diffusers.

image_transformer.py has what they share. A family adds how its prompts are embedded, the transformer's arguments by
name with its own count of time, and what a LoRA trains; where it differs, its path, what comes back, and how its VAE
scales latents. A row of `KINDS` then names it.

There is one LoRA file, in diffusers' keys: diffusers converts no transformer's LoRA to kohya's names, and ComfyUI reads
these keys as they are. For PixArt, whose pipelines read no LoRA, it is PEFT's: `PeftModel.from_pretrained` puts it on.

Shapes: N samples, C latent channels, H W latent size (an eighth of the picture's), L tokens of a prompt, D features.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pixel_unshuffle
from torch.nn.utils.rnn import pad_sequence

from mmalign.modalities import Skeleton, class_name
from mmalign.modalities.image_transformer import BinnedModality, PackedModality, TransformerModality, pack
from mmalign.modalities.latent import frozen, load_modality, makers, model_index, on_meta
from mmalign.modalities.latent_image import pixels_per_latent
from mmalign.surrogate.likelihood import Cond
from mmalign.surrogate.paths import Path as NoisePath
from mmalign.surrogate.paths import RectifiedFlow, VariancePreserving
from mmalign.surrogate.probes import at_least_float32

# Tokens of a prompt that the pipelines generate with
CLIP_TOKENS, SD3_T5_TOKENS, FLUX_T5_TOKENS = 77, 256, 512
# What dev is told in training: the pipeline's default, and that of diffusers' train_dreambooth_lora_flux.py (58eb52c)
# and of Flow-Factory (a0b2bc5)
FLUX_GUIDANCE = 3.5
JOINT_ATTENTION = (
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "attn.to_k",
    "attn.to_out.0",
    "attn.to_q",
    "attn.to_v",
)


def load(source: str | Path, **settings: Any) -> TransformerModality:
    """Loads a transformer's pipeline; PixArt's LoRA is a folder of PEFT's. See `load_modality` for the settings."""
    return load_modality(KINDS[class_name(source)], partial(skeleton, source), source, **settings)


def skeleton(source: str | Path) -> Skeleton:
    """Transformer ("network") and frozen parts as shapes without memory, for the memory plan."""
    kind = KINDS[class_name(source)]
    parts = on_meta(makers(source), kind.part)
    scale = pixels_per_latent(parts["vae"]) * kind.folded
    given = parts["network"].config, scale
    without = frozen(model_index(source), kind.part)
    return Skeleton(parts, partial(kind.example, *given), kind.targets, without, partial(kind.media, *given))


class SD3Modality(TransformerModality):
    """Stable Diffusion 3 and 3.5: two CLIPs and T5, which may be absent, read a prompt (arXiv 2403.03206)."""

    # yifan123/flow_grpo scripts/train_sd3_dpo.py:389; of SD3.5's dual attention the second, `attn2`, is not among them
    targets = JOINT_ATTENTION

    def _embed(self, prompts: list[str]) -> Cond:
        """Prompt embeddings [N, L, D], zeros where T5 is absent, and the pooled ones [N, D] of the two CLIPs."""
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts,
            None,
            None,
            device=self.pipeline.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=SD3_T5_TOKENS,
        )
        return Cond({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})

    @staticmethod
    def named(config: Any, scale: int, latents: Tensor, t: Tensor, cond: Mapping[str, Any]) -> dict[str, Any]:
        """Time counts to 1000 as the scheduler's does, not rounded; the output is the velocity as it stands."""
        return {
            "hidden_states": latents,
            "timestep": 1000 * t,
            "encoder_hidden_states": cond["prompt_embeds"],
            "pooled_projections": cond["pooled_prompt_embeds"],
        }

    @classmethod
    def shapes(cls, config: Any) -> dict[str, tuple[int, ...]]:
        """See the base."""
        return {
            "x0": (config.in_channels, config.sample_size, config.sample_size),
            "prompt_embeds": (CLIP_TOKENS + SD3_T5_TOKENS, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }


class FluxModality(PackedModality):
    """FLUX.1 dev and schnell: T5 reads a prompt, and CLIP as a whole (Black Forest Labs, 2024; no paper)."""

    # The defaults of Flow-Factory (a0b2bc5 models/flux/flux1.py:77); those of diffusers' train_dreambooth_lora_flux.py
    # (58eb52c) have the two feed-forwards of a block besides
    targets = JOINT_ATTENTION

    def _embed(self, prompts: list[str]) -> Cond:
        """T5's embeddings [N, L, D] and CLIP's pooled one [N, D]."""
        embeds, pooled, _ = self.pipeline.encode_prompt(prompts, device=self.pipeline.text_encoder.device)
        return Cond({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})

    @staticmethod
    def named(config: Any, scale: int, latents: Tensor, t: Tensor, cond: Mapping[str, Any]) -> dict[str, Any]:
        """Time is t itself; dev is told the guidance that it was distilled from."""
        embeds = cond["prompt_embeds"]
        return {
            "hidden_states": pack(latents),
            "timestep": t,
            "guidance": torch.full_like(t, FLUX_GUIDANCE) if config.guidance_embeds else None,
            "encoder_hidden_states": embeds,
            "pooled_projections": cond["pooled_prompt_embeds"],
            "txt_ids": embeds.new_zeros(embeds.shape[1], 3),
            "img_ids": places(latents),
        }

    @classmethod
    def shapes(cls, config: Any) -> dict[str, tuple[int, ...]]:
        """See the base; the size is the pipeline's default."""
        return {
            "x0": (config.in_channels // 4, 128, 128),
            "prompt_embeds": (FLUX_T5_TOKENS, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }


def places(latents: Tensor) -> Tensor:
    """[H/2 W/2, 3]: 0, row and column of each token."""
    counts = (torch.arange(n, device=latents.device) for n in (1, latents.shape[-2] // 2, latents.shape[-1] // 2))
    return torch.cartesian_prod(*counts).to(latents)


class PixArtModality(BinnedModality):
    """PixArt-Sigma (arXiv 2403.04692): T5 reads a prompt; the transformer says epsilon, and a variance after it."""

    # PixArt-alpha/PixArt-sigma train_scripts/train_pixart_lora_hf.py @ 6ec1500
    targets = ("ff.net.2", "linear", "linear_1", "linear_2", "proj", "proj_out", "to_k", "to_out.0", "to_q", "to_v")
    tokens: ClassVar[int] = 300

    @staticmethod
    def _path(scheduler: Any) -> NoisePath:
        return VariancePreserving(scheduler.alphas_cumprod.clone(), scheduler.config.prediction_type)

    def _embed(self, prompts: list[str]) -> Cond:
        """T5's embeddings [N, L, D] and mask [N, L], of captions cleaned as the pipeline does when it generates."""
        embeds, mask, *_ = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.pipeline.text_encoder.device,
            clean_caption=True,
        )
        return Cond({"prompt_embeds": embeds, "prompt_mask": mask})

    @staticmethod
    def named(config: Any, scale: int, latents: Tensor, t: Tensor, cond: Mapping[str, Any]) -> dict[str, Any]:
        """Alpha for 1024 pixels is told the picture's height and width, and their ratio, as its pipeline tells it."""
        asked = config.use_additional_conditions
        asked = config.sample_size == 128 if asked is None else asked
        size = scale * latents.new_tensor(latents.shape[-2:]).expand(len(latents), 2)
        told = {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}
        return {
            "hidden_states": latents,
            "timestep": t,
            "encoder_hidden_states": cond["prompt_embeds"],
            "encoder_attention_mask": cond["prompt_mask"],
            "added_cond_kwargs": told if asked else dict.fromkeys(told),
        }

    @classmethod
    def shapes(cls, config: Any) -> dict[str, tuple[int, ...]]:
        """See the base."""
        return {
            "x0": (config.in_channels, config.sample_size, config.sample_size),
            "prompt_embeds": (cls.tokens, config.caption_channels),
            "prompt_mask": (cls.tokens,),
        }


class PixArtAlphaModality(PixArtModality):
    """PixArt-alpha (arXiv 2310.00426): as Sigma, with shorter prompts."""

    tokens = 120


class SanaModality(BinnedModality):
    """Sana (arXiv 2410.10629): Gemma reads a prompt, behind an instruction; an autoencoder of 32 pixels a latent."""

    targets = ("to_k", "to_q", "to_v")  # diffusers' train_dreambooth_lora_sana.py (58eb52c)
    patch = 1

    @staticmethod
    def _path(scheduler: Any) -> NoisePath:
        """Density and shift are the paper's (NVlabs/Sana configs/sana_config/1024ms/Sana_1600M_img1024.yaml)."""
        return RectifiedFlow(density="logit-normal", shift=scheduler.config.flow_shift)

    def _posterior(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """The autoencoder gives no deviation."""
        mean = at_least_float32(self.pipeline.vae.encode(batch).latent) * self.pipeline.vae.config.scaling_factor
        return mean, torch.zeros_like(mean)

    def _embed(self, prompts: list[str]) -> Cond:
        """Gemma's embeddings [N, L, D] and mask [N, L]."""
        instruction = inspect.signature(self.pipeline.__call__).parameters["complex_human_instruction"].default
        embeds, mask, *_ = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.pipeline.text_encoder.device,
            complex_human_instruction=instruction,
        )
        return Cond({"prompt_embeds": embeds, "prompt_mask": mask})

    @staticmethod
    def named(config: Any, scale: int, latents: Tensor, t: Tensor, cond: Mapping[str, Any]) -> dict[str, Any]:
        """Time counts to 1000, times what the configuration says."""
        return {
            "hidden_states": latents,
            "timestep": 1000 * config.timestep_scale * t,
            "encoder_hidden_states": cond["prompt_embeds"],
            "encoder_attention_mask": cond["prompt_mask"],
        }

    @classmethod
    def shapes(cls, config: Any) -> dict[str, tuple[int, ...]]:
        """See the base."""
        return {
            "x0": (config.in_channels, config.sample_size, config.sample_size),
            "prompt_embeds": (300, config.caption_channels),
            "prompt_mask": (300,),
        }


class QwenImageModality(PackedModality):
    """Qwen-Image (arXiv 2508.02324): Qwen2.5-VL reads a prompt; a video's VAE, of which a picture is one frame."""

    targets = ("to_k", "to_out.0", "to_q", "to_v")  # diffusers' train_dreambooth_lora_qwen_image.py (58eb52c)
    guidance = "true_cfg_scale"  # without a negative prompt it does not guide
    ragged = frozenset({"prompt_embeds"})

    def _posterior(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Each channel has a mean and a deviation of its own."""
        posterior = self.pipeline.vae.encode(batch[:, :, None]).latent_dist
        mean, std = self._scales()
        return (at_least_float32(posterior.mean)[:, :, 0] - mean) / std, at_least_float32(posterior.std)[:, :, 0] / std

    def _scales(self) -> tuple[Tensor, Tensor]:
        config, device = self.pipeline.vae.config, self.pipeline.vae.device
        mean, std = (torch.tensor(x, device=device)[:, None, None] for x in (config.latents_mean, config.latents_std))
        return mean, std

    def _pixels(self, latents: Tensor) -> Tensor:
        mean, std = self._scales()
        latents = (at_least_float32(latents) * std + mean).to(self.pipeline.vae.dtype)
        return self.pipeline.vae.decode(latents[:, :, None], return_dict=False)[0][:, :, 0]

    def _embed(self, prompts: list[str]) -> Cond:
        """The embeddings of each prompt's own tokens: N of [L, D]."""
        embeds, mask = self.pipeline.encode_prompt(
            prompts, device=self.pipeline.text_encoder.device, max_sequence_length=512
        )
        rows = embeds if mask is None else [row[known.bool()] for row, known in zip(embeds, mask, strict=True)]
        return Cond({"prompt_embeds": list(rows)})

    @staticmethod
    def named(config: Any, scale: int, latents: Tensor, t: Tensor, cond: Mapping[str, Any]) -> dict[str, Any]:
        """Time is t itself."""
        rows = list(cond["prompt_embeds"])
        known = [torch.ones(len(row), dtype=torch.int64, device=row.device) for row in rows]
        height, width = latents.shape[-2:]
        return {
            "hidden_states": pack(latents),
            "timestep": t,
            "encoder_hidden_states": pad_sequence(rows, batch_first=True),
            "encoder_hidden_states_mask": pad_sequence(known, batch_first=True),
            "img_shapes": [[(1, height // 2, width // 2)]] * len(latents),
        }

    @classmethod
    def shapes(cls, config: Any) -> dict[str, tuple[int, ...]]:
        """See the base; the size is the pipeline's default."""
        return {"x0": (config.in_channels // 4, 128, 128), "prompt_embeds": (512, config.joint_attention_dim)}

    @classmethod
    def media(
        cls, config: Any, scale: int, samples: int, resolution: int | None, length: float | None = None
    ) -> tuple[int, ...]:
        """See the base; one frame."""
        samples, channels, *size = super().media(config, scale, samples, resolution)
        return samples, channels, 1, *size


class ZImageModality(TransformerModality):
    """Z-Image (arXiv 2511.22699): Qwen3 reads a prompt; time and velocity run the other way."""

    # Flow-Factory (a0b2bc5 models/z_image/z_image.py:70), and diffusers' train_dreambooth_lora_z_image.py (58eb52c)
    targets = ("attention.to_k", "attention.to_out.0", "attention.to_q", "attention.to_v")
    ragged = frozenset({"prompt_embeds"})

    def _embed(self, prompts: list[str]) -> Cond:
        """The embeddings of each prompt's own tokens: N of [L, D]."""
        device = self.pipeline.text_encoder.device
        embeds, _ = self.pipeline.encode_prompt(list(prompts), device=device, do_classifier_free_guidance=False)
        return Cond({"prompt_embeds": embeds})

    @staticmethod
    def named(config: Any, scale: int, latents: Tensor, t: Tensor, cond: Mapping[str, Any]) -> dict[str, Any]:
        """Pictures, of one frame, and prompts are lists."""
        return {"x": list(latents[:, :, None]), "t": 1 - t, "cap_feats": list(cond["prompt_embeds"])}

    def _prediction(self, output: Sequence[Tensor], latents: Tensor) -> Tensor:
        return -torch.stack(list(output))[:, :, 0]

    @classmethod
    def shapes(cls, config: Any) -> dict[str, tuple[int, ...]]:
        """See the base; the size is the pipeline's default."""
        return {"x0": (config.in_channels, 128, 128), "prompt_embeds": (512, config.cap_feat_dim)}


class Flux2Modality(TransformerModality):
    """FLUX.2 klein (Black Forest Labs, 2025): Qwen3 reads a prompt; latents are patches of 2 x 2, normalised."""

    # Flow-Factory (a0b2bc5 models/flux/flux2_klein.py:92), without its feed-forwards
    targets = (*JOINT_ATTENTION, "attn.to_qkv_mlp_proj")
    folded = 2

    def _posterior(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """What the VAE's batch normalisation has as mean and deviation is the latents' scale."""
        posterior, known = self.pipeline.vae.encode(batch).latent_dist, self.pipeline.vae.bn
        mean, std = (pixel_unshuffle(at_least_float32(values), 2) for values in (posterior.mean, posterior.std))
        own = (known.running_var + self.pipeline.vae.config.batch_norm_eps).sqrt()[:, None, None]
        return (mean - known.running_mean[:, None, None]) / own, std / own

    def _pixels(self, latents: Tensor) -> Tensor:
        """The pipeline's latents are the VAE's already."""
        return self.pipeline.vae.decode(latents.to(self.pipeline.vae.dtype), return_dict=False)[0]

    def _embed(self, prompts: list[str]) -> Cond:
        """Embeddings [N, L, D]; padding is read as well."""
        embeds, _ = self.pipeline.encode_prompt(prompts, device=self.pipeline.text_encoder.device)
        return Cond({"prompt_embeds": embeds})

    @staticmethod
    def named(config: Any, scale: int, latents: Tensor, t: Tensor, cond: Mapping[str, Any]) -> dict[str, Any]:
        """Time is t itself; places are (0, row, column, 0) of a picture's tokens, (0, 0, 0, number) of a prompt's."""
        embeds = cond["prompt_embeds"]
        sizes = (1, *latents.shape[-2:], embeds.shape[1])
        one, rows, columns, words = (torch.arange(n, device=latents.device) for n in sizes)
        return {
            "hidden_states": latents.flatten(2).transpose(1, 2),
            "timestep": t,
            "guidance": None,
            "encoder_hidden_states": embeds,
            "txt_ids": torch.cartesian_prod(one, one, one, words),
            "img_ids": torch.cartesian_prod(one, rows, columns, one),
        }

    def _prediction(self, output: Tensor, latents: Tensor) -> Tensor:
        return output.transpose(1, 2).reshape(latents.shape)

    @classmethod
    def shapes(cls, config: Any) -> dict[str, tuple[int, ...]]:
        """See the base; the size is the pipeline's default."""
        return {"x0": (config.in_channels, 64, 64), "prompt_embeds": (512, config.joint_attention_dim)}


KINDS: dict[str, type[TransformerModality]] = {
    "Flux2KleinPipeline": Flux2Modality,
    "FluxPipeline": FluxModality,
    "PixArtAlphaPipeline": PixArtAlphaModality,
    "PixArtSigmaPipeline": PixArtModality,
    "QwenImagePipeline": QwenImageModality,
    "SanaPipeline": SanaModality,
    "StableDiffusion3Pipeline": SD3Modality,
    "ZImagePipeline": ZImageModality,
}
