"""Videos from text: Wan, a rectified flow, and CogVideoX, a v-predicting diffusion, through diffusers.

`VideoModality` reads clips and shows what was made. A family adds its own clip's size, how its prompts are embedded,
how its latents are scaled and the transformer's arguments by name; a row of `KINDS` then names it.

A training clip is the beginning of a video: `num_frames` frames at the model's own rate, whatever the file's. Its shape
is the model's own too; `resolution` is the shorter side in pixels, and the longer one follows in proportion.

Shapes: N samples, C latent channels, F latent frames, H W latent size, L tokens (512 for Wan, 226 for CogVideoX).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmalign.media import frames_of, make_video
from mmalign.modalities import Skeleton, class_name
from mmalign.modalities.latent import LatentModality, frozen, load_modality, makers, model_index, on_meta
from mmalign.modalities.latent_image import cover, pixels, pixels_per_latent
from mmalign.records import Comparison, Sound, Text, UserError, Video
from mmalign.surrogate.likelihood import Cond
from mmalign.surrogate.paths import RectifiedFlow, VariancePreserving

WAN_TOKENS, COG_TOKENS = 512, 226  # what the pipelines generate with; Wan's `encode_prompt` alone would take 226


@dataclass(frozen=True)
class Clip:
    """What videos are brought to, and what becomes of them.

    Attributes:
        num_frames: of the clip.
        height: in pixels.
        width: in pixels.
        fps: frames a second that the model was trained at.
        stride: frames a latent frame stands for; the first one stands for one.
        step: a clip has 1 and a multiple of these frames.
        scale: pixels a latent.
        patch: latents, high and wide, that the transformer takes together.
    """

    num_frames: int
    height: int
    width: int
    fps: float
    stride: int
    step: int
    scale: int
    patch: int

    def of(self, num_frames: int | None = None, height: int | None = None, width: int | None = None) -> Clip:
        """The clip with another length and size, where they are given.

        Raises:
            UserError: they are no whole number of latent frames or patches.
        """
        changes = {"num_frames": num_frames, "height": height, "width": width}
        clip = replace(self, **{name: value for name, value in changes.items() if value is not None})
        if (clip.num_frames - 1) % clip.step:
            less = clip.fitting(clip.num_frames)
            raise UserError(
                f"num_frames {clip.num_frames}: this model takes 1 and multiples of {clip.step} more, such as {less} or"
                f" {less + clip.step}."
            )
        unit = clip.scale * clip.patch
        if clip.height % unit or clip.width % unit:
            raise UserError(f"{clip.width} x {clip.height} pixels: this model takes multiples of {unit}.")
        return clip

    def at(self, resolution: int | None, num_frames: float | None) -> Clip:
        """The clip with the shorter side at `resolution`, the longer one in proportion; None leaves as it is."""
        frames = None if num_frames is None else int(num_frames)
        if resolution is None:
            return self.of(frames)
        unit, short = self.scale * self.patch, min(self.height, self.width)
        height, width = (
            resolution if side == short else round(side * resolution / short / unit) * unit
            for side in (self.height, self.width)
        )
        return self.of(frames, height, width)

    def fitting(self, frames: int) -> int:
        """The most that a clip out of so many frames can have."""
        return (frames - 1) // self.step * self.step + 1

    @property
    def latents(self) -> tuple[int, int, int]:
        """F, H and W of the latents."""
        return (self.num_frames - 1) // self.stride + 1, self.height // self.scale, self.width // self.scale


def load(source: str | Path, **settings: Any) -> VideoModality:
    """Loads a text-to-video pipeline; see `load_modality` for the settings.

    Raises:
        UserError: as there, or there are two transformers (Wan 2.2 A14B).
    """
    return load_modality(_kind(source), partial(skeleton, source), source, **settings)


def _kind(source: str | Path) -> type[VideoModality]:
    kind = KINDS[class_name(source)]
    if "transformer_2" in frozen(model_index(source), kind.part):
        raise UserError(
            f"{source}: has two transformers, one for high noise and one for low, of which mmalign would train one"
            " alone; take Wan 2.1 or Wan 2.2 TI2V-5B."
        )
    return kind


def skeleton(source: str | Path) -> Skeleton:
    """Transformer ("network") and frozen parts as shapes without memory, for the memory plan."""
    kind = _kind(source)
    parts = on_meta(makers(source), kind.part)
    config = parts["network"].config
    own = kind.clip(config, *_factors(parts["vae"]))

    def example(samples: int, resolution: int | None, dtype: torch.dtype, length: float | None) -> dict[str, Any]:
        return kind.example(config, own.at(resolution, length), samples, dtype)

    def media(samples: int, resolution: int | None, length: float | None) -> tuple[int, ...]:
        clip = own.at(resolution, length)
        return samples, 3, clip.num_frames, clip.height, clip.width

    return Skeleton(
        parts,
        example,
        kind.targets,
        frozen(model_index(source), kind.part),
        media,
        encoded_at_once=kind.encoded_at_once,
    )


def _factors(vae: Any) -> tuple[int, int]:
    """How many frames and pixels a latent stands for."""
    if "scale_factor_temporal" in vae.config:
        return vae.config.scale_factor_temporal, vae.config.scale_factor_spatial
    return int(vae.config.temporal_compression_ratio), pixels_per_latent(vae)


class VideoModality(LatentModality):
    """A text-to-video pipeline as the trainer sees it.

    Attributes:
        resolution: shorter side of the training clips in pixels.
        num_frames: of the training clips.
    """

    part = "transformer"
    medium = "video"
    encoded_at_once = 1
    targets = ("to_k", "to_q", "to_v", "to_out.0")  # of diffusers' and VideoGPA's LoRAs for CogVideoX; for Wan alike

    def __init__(self, pipeline: Any, source: str = "") -> None:
        super().__init__(pipeline, source)
        factors = pipeline.vae_scale_factor_temporal, pipeline.vae_scale_factor_spatial
        self.own = self.clip(self.unwrapped.config, *factors)
        self.resolution: int = min(self.own.height, self.own.width)
        self.num_frames: int = self.own.num_frames

    @staticmethod
    def clip(config: Any, stride: int, scale: int) -> Clip:
        """The model's own clip, by the transformer's configuration and what a latent of its VAE stands for."""
        raise NotImplementedError

    @staticmethod
    def example(config: Any, clip: Clip, samples: int, dtype: torch.dtype) -> dict[str, Any]:
        """The transformer's arguments by name for N clips, for the memory plan."""
        raise NotImplementedError

    @classmethod
    def without_vae(cls, pipeline: Any, vae: Any) -> None:
        """See `LatentModality.without_vae`: it guesses 4 frames and 8 pixels a latent."""
        pipeline.vae_scale_factor_temporal, pipeline.vae_scale_factor_spatial = _factors(vae)

    def frame(self, item: Comparison) -> tuple[int, int]:
        """Height and width of the clips, the same for all.

        Raises:
            UserError: `num_frames` or `resolution` is none that the model takes.
        """
        clip = self.own.at(self.resolution, self.num_frames)
        return clip.height, clip.width

    def _read(self, item: Comparison, number: int, frame: tuple[int, ...]) -> tuple[Tensor, list[float]]:
        """[3, frames, *frame] in [-1, 1], each picture covering the frame as a picture model's does; the frame."""
        medium, name = item.media[number], self.name(item, number)
        if not isinstance(medium, Video):
            kind = type(medium).__name__.lower() if isinstance(medium, Sound | Text) else "picture"
            raise UserError(f"{name}: is a {kind} where a video is needed; take a model of {kind}s.")
        if isinstance(medium.source, str | Path):
            name += f" ({medium.source})"

        def covered(picture: Image.Image) -> Image.Image:
            return cover(picture, frame, name=name)[0]

        own = self.own
        pictures = frames_of(medium, own.fps, first=self.num_frames, each=covered, name=name)
        if (count := len(pictures)) < self.num_frames:
            advice = f"set num_frames to {own.fitting(count)} or less, or remove it"
            if count < own.stride:
                advice = f"that is less than a latent frame of {own.stride}, so remove it"
            raise UserError(
                f"{name}: has {count} frames at {own.fps:g} a second where {self.num_frames} are needed; {advice}.",
                reason="too_short",
            )
        return torch.stack([pixels(picture) for picture in pictures], 1), [float(side) for side in frame]

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        fps: float | None = None,
        batch_size: int = 4,
        user: Tensor | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Video]:
        """Videos, one a prompt; the arguments are those of `LatentModality._generated`, None the pipeline's own.

        Length and size are those of the training clips where they are not given. `fps` is how fast a video is shown;
        default the model's own.

        Raises:
            UserError: `num_frames`, `height` or `width` is none that the model takes.
        """
        clip = self.own.at(self.resolution, self.num_frames).of(num_frames, height, width)
        settings = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "num_frames": clip.num_frames,
            "height": clip.height,
            "width": clip.width,
        }
        told = {"negative_prompt": negative_prompt, "batch_size": batch_size, "user": user, "progress": progress}
        return self._generated(prompts, seeds, settings, decode=partial(self._videos, fps or clip.fps), **told)

    def _videos(self, fps: float, latents: Tensor, settings: Mapping[str, Any]) -> list[Video]:
        shown = self.pipeline.video_processor.postprocess_video(self._decode(latents, settings), output_type="pil")
        return [make_video(frames, fps) for frames in shown]

    def _decode(self, latents: Tensor, settings: Mapping[str, Any]) -> Any:
        """[N, 3, frames, height, width] of the pipeline's latents."""
        raise NotImplementedError


class WanModality(VideoModality):
    """Wan 2.1 and Wan 2.2 TI2V-5B, text to video (arXiv 2503.20314)."""

    def __init__(self, pipeline: Any, source: str = "") -> None:
        super().__init__(pipeline, source)
        config = pipeline.scheduler.config
        # The density is SD3's, whose paper Wan's follows; that Wan was trained so was not checked. The shift is the
        # sampler's: UniPC calls it flow_shift (3 for 480p, 5 for 720p), the Euler scheduler shift
        self.path = RectifiedFlow(density="logit-normal", shift=config.get("flow_shift", config.get("shift", 1.0)))

    @staticmethod
    def clip(config: Any, stride: int, scale: int) -> Clip:
        """See the base; Wan-Video/Wan2.2, wan/configs/shared_config.py and wan_ti2v_5B.py."""
        ti2v = config.in_channels == 48
        own = (121, 704, 1280, 24) if ti2v else (81, 480, 832, 16)
        return Clip(*own, stride, stride, scale, config.patch_size[1])

    @staticmethod
    def example(config: Any, clip: Clip, samples: int, dtype: torch.dtype) -> dict[str, Any]:
        """See the base."""
        return {
            "hidden_states": torch.zeros(samples, config.in_channels, *clip.latents, dtype=dtype),
            "timestep": torch.zeros(samples),
            "encoder_hidden_states": torch.zeros(samples, WAN_TOKENS, config.text_dim, dtype=dtype),
        }

    def _embed(self, prompts: list[str]) -> Cond:
        """Prompt embeddings [N, 512, D], zeros behind a prompt's end."""
        device = self.pipeline.text_encoder.device
        embeds, _ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=WAN_TOKENS, device=device
        )
        return Cond({"prompt_embeds": embeds})

    def _moments(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the latents' channels, [1, C, 1, 1, 1]."""
        config = self.pipeline.vae.config
        mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
        return mean.to(like), std.to(like)

    def _posterior(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """[N, C, F, H, W], each channel brought to mean 0 and deviation 1."""
        posterior = self.pipeline.vae.encode(batch).latent_dist
        mean, std = self._moments(posterior.mean)
        return (posterior.mean - mean) / std, posterior.std / std

    def _arguments(self, latents: Tensor, t: Tensor, cond: Cond) -> dict[str, Any]:
        """Time counts to 1000 as the scheduler's does, not rounded; the output is the velocity as it stands.

        TI2V-5B's pipeline gives each token a time, but from text to video all tokens of a sample have the same one.
        """
        return {
            "hidden_states": latents,
            "timestep": t * self.pipeline.scheduler.config.num_train_timesteps,
            "encoder_hidden_states": cond["prompt_embeds"],
        }

    def _decode(self, latents: Tensor, settings: Mapping[str, Any]) -> Any:
        latents = latents.to(self.pipeline.vae.dtype)
        mean, std = self._moments(latents)
        return self.pipeline.vae.decode(latents / (1 / std) + mean, return_dict=False)[0]  # as the pipeline rounds


class CogVideoXModality(VideoModality):
    """CogVideoX 2b and 5b, text to video (arXiv 2408.06072); its latents are [N, F, C, H, W]."""

    def __init__(self, pipeline: Any, source: str = "") -> None:
        super().__init__(pipeline, source)
        # With the shift of its signal-to-noise ratio, and the last step without signal, that the scheduler applies
        self.path = VariancePreserving(pipeline.scheduler.alphas_cumprod, pipeline.scheduler.config.prediction_type)

    @staticmethod
    def clip(config: Any, stride: int, scale: int) -> Clip:
        """See the base; 8 frames a second. The VAE gives a clip of 8 n + 1 frames back as it was, and no other."""
        if config.patch_size_t:
            raise UserError("CogVideoX 1.5 takes frames in pairs, which is not supported; take CogVideoX 2b or 5b.")
        size = config.sample_height * scale, config.sample_width * scale
        return Clip(config.sample_frames, *size, 8, stride, 2 * stride, scale, config.patch_size)

    @staticmethod
    def example(config: Any, clip: Clip, samples: int, dtype: torch.dtype) -> dict[str, Any]:
        """See the base."""
        frames, height, width = clip.latents
        made: dict[str, Any] = {
            "hidden_states": torch.zeros(samples, frames, config.in_channels, height, width, dtype=dtype),
            "timestep": torch.zeros(samples, dtype=torch.int64),
            "encoder_hidden_states": torch.zeros(samples, COG_TOKENS, config.text_embed_dim, dtype=dtype),
        }
        if config.use_rotary_positional_embeddings:
            tokens = frames * height * width // config.patch_size**2
            made["image_rotary_emb"] = (torch.zeros(tokens, config.attention_head_dim),) * 2
        return made

    def _embed(self, prompts: list[str]) -> Cond:
        """Prompt embeddings [N, 226, D], of the padding too."""
        device = self.pipeline.text_encoder.device
        embeds, _ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=COG_TOKENS, device=device
        )
        return Cond({"prompt_embeds": embeds})

    def _posterior(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """[N, F, C, H, W]. `invert_scale_latents` is of the picture that 1.5's image-to-video starts from alone."""
        mean, std = super()._posterior(batch)
        return mean.transpose(1, 2), std.transpose(1, 2)

    def _arguments(self, latents: Tensor, t: Tensor, cond: Cond) -> dict[str, Any]:
        """5b turns its positions; 2b's are in the network."""
        made = {"hidden_states": latents, "timestep": t, "encoder_hidden_states": cond["prompt_embeds"]}
        if self.unwrapped.config.use_rotary_positional_embeddings:
            height, width = (side * self.own.scale for side in latents.shape[-2:])
            made["image_rotary_emb"] = self.pipeline._prepare_rotary_positional_embeddings(
                height, width, latents.shape[1], latents.device
            )
        return made

    def _decode(self, latents: Tensor, settings: Mapping[str, Any]) -> Any:
        return self.pipeline.decode_latents(latents.to(self.pipeline.vae.dtype))


KINDS: dict[str, type[VideoModality]] = {"CogVideoXPipeline": CogVideoXModality, "WanPipeline": WanModality}
