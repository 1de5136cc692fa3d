"""AudioLDM2 and Stable Audio: sounds as latents, through diffusers.

A family says how a sound becomes what its VAE takes (a log-mel spectrogram, samples themselves), how its prompts are
embedded, and its network's arguments by name; a row of `KINDS` then names it.

Sounds of another rate are resampled. Longer ones are cut at `audio_length_in_s`, shorter ones end in silence, as in
both families' training. A mono sound is both channels of a stereo model. A stereo sound for a mono model is refused:
AudioLDM2 and Tango were trained on the first channel, and a mean of both may cancel out, so the choice is the user's.

Neither pipeline of diffusers reads a LoRA, so its files are PEFT's own:

    PeftModel.from_pretrained(pipeline.unet, folder)  # pipeline.transformer for Stable Audio

Tango and Tango 2 (declare-lab/tango) have AudioLDM's front end and path, and a UNet2DConditionModel that reads FLAN-T5.
They are published as pickles for their own code. diffusers has no pipeline of theirs, so they cannot be loaded.

Shapes: N samples, T samples of a sound, F mel frames, M mel bins, L tokens, D features; latents [N, C, F / 4, M / 4] of
AudioLDM2 and [N, C, T / 2048] of Stable Audio.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmalign.media import make_sound, sound_of
from mmalign.modalities import Skeleton, class_name
from mmalign.modalities.latent import LatentModality, frozen, load_modality, makers, model_index, on_meta
from mmalign.records import Comparison, Sound, UserError
from mmalign.surrogate.likelihood import Cond
from mmalign.surrogate.paths import VariancePreserving, VDiffusion

WINDOW = 1024  # samples of the mel front end's Fourier transform
GPT2_TOKENS, FLAN_T5_TOKENS, T5_TOKENS = 8, 512, 128  # what the published models read, for the memory plan


def load(source: str | Path, **settings: Any) -> SoundModality:
    """Loads a pipeline of sounds; its LoRA is a folder of PEFT's files. See `load_modality` for the settings."""
    return load_modality(KINDS[class_name(source)], partial(skeleton, source), source, **settings)


def skeleton(source: str | Path) -> Skeleton:
    """Network and frozen parts as shapes without memory, for the memory plan."""
    kind = KINDS[class_name(source)]
    parts = on_meta(makers(source), kind.part)
    clock = kind.measure(parts["network"].config, parts)
    without = set(frozen(model_index(source), kind.part)) - set(kind.kept)

    def media(samples: int, resolution: int | None, length: float | None) -> tuple[int, ...]:
        return samples, *clock.shape(clock.count(length) * clock.hop)

    def example(
        samples: int, resolution: int | None, dtype: torch.dtype, length: float | None = None
    ) -> dict[str, Any]:
        return kind.example(parts, samples, clock.count(length), dtype)

    return Skeleton(parts, example, kind.targets, tuple(sorted(without)), media, kind.encoded_at_once)


class Clock(NamedTuple):
    """How a family measures sounds.

    Attributes:
        rate_hz: samples a second.
        hop: samples that a latent stands for.
        latents: what the network was made for.
        channels: 1 for mono, 2 for stereo.
        mel: samples that a frame of the mel spectrogram stands for, and its bins; None where the VAE takes samples.
    """

    rate_hz: int
    hop: int
    latents: int
    channels: int
    mel: tuple[int, int] | None = None

    def count(self, seconds: float | None) -> int:
        """Latents in so many seconds, the last one perhaps in part; None is what the network was made for."""
        return self.latents if seconds is None else math.ceil(round(seconds * self.rate_hz) / self.hop)

    def shape(self, length: int) -> tuple[int, ...]:
        """Of what the VAE takes for so many samples: [channels, T], or [1, F, M] of a mel spectrogram."""
        return (1, length // self.mel[0], self.mel[1]) if self.mel else (self.channels, length)


class SoundModality(LatentModality):
    """A diffusers pipeline that makes sounds, as the trainer sees it; the base of the families.

    Attributes:
        audio_length_in_s: of the training sounds, and of generated ones unless they are given another; None for the
            model's own.
        kept: parts that are needed beside the network where all else comes from a cache.
        duration: what the pipeline calls the length.
        extends: whether the model makes sounds longer than its own length.
    """

    medium = "sound"
    # No published LoRA of either family was found to follow; these are diffusers' usual ones
    targets = ("to_k", "to_q", "to_v", "to_out.0")
    audio_length_in_s: float | None = None
    kept: ClassVar[tuple[str, ...]] = ()
    duration: ClassVar[str]
    extends: ClassVar[bool]

    @staticmethod
    def measure(config: Any, parts: Mapping[str, Any]) -> Clock:
        """How the family measures sounds, of the network's configuration and the other parts by name."""
        raise NotImplementedError

    @staticmethod
    def example(parts: Mapping[str, Any], samples: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
        """The network's arguments by name, of `samples` sounds of `count` latents."""
        raise NotImplementedError

    @property
    def clock(self) -> Clock:
        """How the loaded model measures sounds."""
        return self.measure(self.unwrapped.config, self.whole().components)

    def _count(self, seconds: float | None) -> int:
        """Latents of a sound.

        Raises:
            UserError: less than one, or more than the model makes.
        """
        clock = self.clock
        shortest, own = clock.hop / clock.rate_hz, clock.latents * clock.hop / clock.rate_hz
        longest = math.inf if self.extends else own
        if not shortest <= (own if seconds is None else seconds) <= longest:
            span = f"{shortest:.3g} seconds or more" if self.extends else f"{shortest:.3g} to {longest:.5g} seconds"
            raise UserError(f"audio_length_in_s {seconds}: {self.source or 'this model'} takes {span}.")
        return clock.count(seconds)

    def frame(self, item: Comparison) -> tuple[int, ...]:
        """Samples that all sounds of a comparison are brought to: the same for all comparisons."""
        return (self._count(self.audio_length_in_s) * self.clock.hop,)

    def _read(self, item: Comparison, number: int, frame: tuple[int, ...]) -> tuple[Tensor, list[float]]:
        """What the VAE takes of a sound, and "size" [1]: the whole file's seconds, rounded up."""
        clock, name = self.clock, self.name(item, number)
        wave, _ = sound_of(item.media[number], clock.rate_hz, name=name)
        channels, length = wave.shape
        if channels not in (1, clock.channels):
            raise UserError(
                f"{name}: has {channels} channels, and {self.source or 'this model'} makes {clock.channels}; mix them"
                " or take one.",
                reason="channels",
            )
        if length < clock.hop:
            raise UserError(
                f"{name}: {length} samples are less than a latent ({clock.hop} of {clock.rate_hz} Hz); remove it.",
                reason="too_short",
            )
        heard = np.broadcast_to(wave, (clock.channels, length))[:, : frame[0]]
        return self._prepared(torch.from_numpy(heard.copy()), frame[0]), [float(math.ceil(length / clock.rate_hz))]

    def _prepared(self, wave: Tensor, length: int) -> Tensor:
        """What the VAE takes of samples [channels, T] in [-1, 1], which end in silence up to `length`."""
        raise NotImplementedError

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        audio_length_in_s: float | None = None,
        batch_size: int = 16,
        user: Tensor | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Sound]:
        """Sounds, one a prompt; the arguments are those of `LatentModality._generated`, None the pipeline's own.

        Raises:
            UserError: the model makes no sounds of that length, or cannot be told a user.
        """
        seconds = self.audio_length_in_s if audio_length_in_s is None else audio_length_in_s
        self._count(seconds)
        settings = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            self.duration: seconds,
        }
        told = {"negative_prompt": negative_prompt, "batch_size": batch_size, "user": user, "progress": progress}
        return self._generated(prompts, seeds, settings, **told)

    def _decode(self, latents: Tensor, settings: Mapping[str, Any]) -> list[Sound]:
        clock, seconds = self.clock, settings.get(self.duration)
        rate = clock.rate_hz
        length = clock.latents * clock.hop if seconds is None else int(seconds * rate)  # vocoders may add some
        return [make_sound(wave[..., :length].numpy(), rate) for wave in self._waves(latents).cpu().float()]

    def _waves(self, latents: Tensor) -> Tensor:
        """Samples [N, T] or [N, channels, T] of the pipeline's latents."""
        raise NotImplementedError


class AudioLDM2Modality(SoundModality):
    """AudioLDM 2 (arXiv 2308.05734): a UNet on a picture VAE's latents of log-mel spectrograms.

    It reads a prompt twice: as eight embeddings that GPT-2 makes of CLAP and FLAN-T5, and as FLAN-T5's own. GPT-2
    counts the padding of its input, so that in diffusers' pipeline a sound depends on the other prompts of its batch;
    here each prompt is read by itself, as the pipeline reads a single one.
    """

    part = "unet"
    duration = "audio_length_in_s"
    extends = True

    def __init__(self, pipeline: Any, source: str = "") -> None:
        super().__init__(pipeline, source)
        if pipeline.text_encoder_2 is not None and pipeline.text_encoder_2.config.model_type == "vits":
            raise UserError(f"{source}: speaks transcriptions, which no comparison has; take an AudioLDM2 of sounds.")
        scheduler = pipeline.scheduler
        self.path = VariancePreserving(scheduler.alphas_cumprod.clone(), scheduler.config.prediction_type)

    @staticmethod
    def measure(config: Any, parts: Mapping[str, Any]) -> Clock:
        """See the base."""
        vocoder, vae = parts["vocoder"].config, parts["vae"].config
        frame = math.prod(vocoder.upsample_rates)
        hop = frame * 2 ** (len(vae.block_out_channels) - 1)
        return Clock(vocoder.sampling_rate, hop, config.sample_size, 1, (frame, vocoder.model_in_dim))

    @staticmethod
    def example(parts: Mapping[str, Any], samples: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
        """See the base."""
        config, scale = parts["network"].config, 2 ** (len(parts["vae"].config.block_out_channels) - 1)
        bins = parts["vocoder"].config.model_in_dim // scale
        gpt2, t5 = parts["language_model"].config.n_embd, parts["text_encoder_2"].config.d_model
        return {
            "sample": torch.zeros(samples, config.in_channels, count, bins, dtype=dtype),
            "timestep": torch.zeros(samples, dtype=torch.int64),
            "encoder_hidden_states": torch.zeros(samples, GPT2_TOKENS, gpt2, dtype=dtype),
            "encoder_hidden_states_1": torch.zeros(samples, FLAN_T5_TOKENS, t5, dtype=dtype),
            "encoder_attention_mask_1": torch.ones(samples, FLAN_T5_TOKENS, dtype=torch.int64),
        }

    def _prepared(self, wave: Tensor, length: int) -> Tensor:
        """A log-mel spectrogram [1, F, M] of the sound at a peak of one half.

        Source: haoheliu/AudioLDM2 @ b5786c5 utilities/audio/tools.py:24 and utilities/data/dataset.py:371-397 (there a
        random segment, without silence at its ends); declare-lab/tango @ 34ecd38 tools/torch_tools.py.
        """
        clock = self.clock
        assert clock.mel
        wave = wave - wave.mean()
        wave = wave / (wave.abs().max() + 1e-8) * 0.5
        return log_mel(F.pad(wave, (0, length - wave.shape[-1])), clock.rate_hz, *clock.mel)

    def _embed(self, prompts: list[str]) -> Cond:
        """FLAN-T5's states [N, L, D] with their mask [N, L], and GPT-2's embeddings [N, 8, D]."""
        length = min(self.pipeline.tokenizer_2.model_max_length, FLAN_T5_TOKENS)
        return Cond(_joined([self._said(prompt) for prompt in prompts], length))

    def _said(self, prompt: str, negative: str | None = None) -> Sequence[Tensor]:
        """States, mask and embeddings of one prompt; with a negative one, as long, before it."""
        model = self.pipeline.language_model
        if not hasattr(model, "_update_model_kwargs_for_generation"):
            from transformers import GenerationMixin

            # Published folders name a GPT2Model, which transformers no longer lets generate (diffusers issue 12630)
            update = GenerationMixin._update_model_kwargs_for_generation
            model._update_model_kwargs_for_generation = MethodType(update, model)
        guided = {} if negative is None else {"negative_prompt": [negative]}
        return self.pipeline.encode_prompt([prompt], self.pipeline.text_encoder.device, 1, bool(guided), **guided)

    def _arguments(self, latents: Tensor, t: Tensor, cond: Cond) -> dict[str, Any]:
        return {
            "sample": latents,
            "timestep": t,
            "encoder_hidden_states": cond["generated_prompt_embeds"],
            "encoder_hidden_states_1": cond["prompt_embeds"],
            "encoder_attention_mask_1": cond["attention_mask"],
        }

    def _latents(self, *, prompt: list[str], negative_prompt: list[str] | None = None, **told: Any) -> Tensor:
        said = [self._said(*pair) for pair in zip(prompt, negative_prompt or [""] * len(prompt), strict=True)]
        length = max(states.shape[1] for states, *_ in said)
        told |= _joined([[part[1:] for part in one] for one in said], length)
        told |= _joined([[part[:1] for part in one] for one in said], length, "negative_")
        return super()._latents(**told)

    def add_user_layers(self, features: int, tokens: int, seed: int = 0) -> dict[str, nn.Parameter]:
        """See the base.

        The UNet's blocks hand on what attentions are told only where they checkpoint (diffusers 0.42.1); else it is
        put into the calls of their transformers here.
        """
        from diffusers import Transformer2DModel

        made = super().add_user_layers(features, tokens, seed)
        told: dict[str, Any] = {}

        def note(network: Any, args: Any, kwargs: dict[str, Any]) -> None:
            told["cross_attention_kwargs"] = kwargs.get("cross_attention_kwargs")

        def put(block: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            return None if len(args) > 1 else (args, {**kwargs, **told})  # a checkpoint has them all in args

        self.unwrapped.register_forward_pre_hook(note, with_kwargs=True)
        for module in self.unwrapped.modules():
            if isinstance(module, Transformer2DModel):
                module.register_forward_pre_hook(put, with_kwargs=True)
        return made

    def _waves(self, latents: Tensor) -> Tensor:
        vae, vocoder = self.pipeline.vae, self.pipeline.vocoder
        mel = vae.decode(1 / vae.config.scaling_factor * latents.to(vae.dtype), return_dict=False)[0]
        return self.pipeline.mel_spectrogram_to_waveform(mel.to(vocoder.dtype))


def log_mel(wave: Tensor, rate_hz: int, hop: int, bins: int) -> Tensor:
    """[..., T] samples -> [..., T / hop, bins] natural logarithms of mel bands of the magnitudes, at least 1e-5.

    Hann windows of 1024 samples, the ends mirrored; bands of equal area on Slaney's scale, from 0 to half the rate.
    Source: haoheliu/AudioLDM2 @ b5786c5 utilities/audio/stft.py, constants in utils.py:262-269 (16 kHz, 64 bins, hop
    160, 0 to 8000 Hz); its last frame, which stands for what is mirrored, is left out there too (`pad_spec`).
    """
    from torchaudio.functional import melscale_fbanks

    window = torch.hann_window(WINDOW).to(wave)
    magnitudes = torch.stft(wave, WINDOW, hop, window=window, pad_mode="reflect", return_complex=True).abs()
    bands = melscale_fbanks(WINDOW // 2 + 1, 0.0, rate_hz / 2, bins, rate_hz, norm="slaney", mel_scale="slaney")
    mel = magnitudes.transpose(-1, -2) @ bands.to(wave)
    return mel[..., : wave.shape[-1] // hop, :].clamp(min=1e-5).log()


def _joined(said: Sequence[Sequence[Tensor]], length: int, prefix: str = "") -> dict[str, Tensor]:
    """Prompts that were read one by one as a batch of `length` tokens; the mask hides what was added."""
    states, masks, embeds = zip(*said, strict=True)
    return {
        f"{prefix}prompt_embeds": torch.cat([F.pad(one, (0, 0, 0, length - one.shape[1])) for one in states]),
        f"{prefix}attention_mask": torch.cat([F.pad(one, (0, length - one.shape[1])) for one in masks]),
        f"{prefix}generated_prompt_embeds": torch.cat(embeds),
    }


class StableAudioModality(SoundModality):
    """Stable Audio Open (arXiv 2407.14358): a transformer on the latents of stereo samples.

    The network is told how many seconds the whole file has, rounded up, also where it is cut. It was trained on its
    full length, the rest being silence, and generates so; a shorter `audio_length_in_s` trains faster and is our own.
    """

    part = "transformer"
    encoded_at_once = 1  # its first convolutions hold a gigabyte for 47 seconds
    kept = ("projection_model",)
    duration = "audio_end_in_s"
    extends = False

    def __init__(self, pipeline: Any, source: str = "") -> None:
        super().__init__(pipeline, source)
        self.path = VDiffusion()

    @staticmethod
    def measure(config: Any, parts: Mapping[str, Any]) -> Clock:
        """See the base."""
        vae = parts["vae"].config
        return Clock(vae.sampling_rate, math.prod(vae.downsampling_ratios), config.sample_size, vae.audio_channels)

    @staticmethod
    def example(parts: Mapping[str, Any], samples: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
        """See the base."""
        config = parts["network"].config
        states = samples, T5_TOKENS + 2, config.cross_attention_input_dim
        return {
            "hidden_states": torch.zeros(samples, config.in_channels, count, dtype=dtype),
            "timestep": torch.zeros(samples),
            "encoder_hidden_states": torch.zeros(states, dtype=dtype),
            "global_hidden_states": torch.zeros(samples, 1, config.global_states_input_dim, dtype=dtype),
            "rotary_embedding": _positions(config, count),
        }

    def _prepared(self, wave: Tensor, length: int) -> Tensor:
        return F.pad(wave, (0, length - wave.shape[-1]))

    def _embed(self, prompts: list[str]) -> Cond:
        """The prompts' states [N, L, D], zeros where there is no token."""
        return Cond({"states": self.pipeline.encode_prompt(prompts, self.pipeline.text_encoder.device, False)})

    @torch.no_grad()
    def _sized(self, cond: Cond, sizes: Tensor) -> Cond:
        """Start (0) and seconds: two more states [N, L + 2, D], and side by side for the whole network [N, 1, 2 D]."""
        seconds = sizes[:, 0]
        said = self.pipeline.projection_model(start_seconds=torch.zeros_like(seconds), end_seconds=seconds)
        start, end = said.seconds_start_hidden_states, said.seconds_end_hidden_states
        return Cond({"states": torch.cat([cond["states"], start, end], 1), "seconds": torch.cat([start, end], 2)})

    def empty(self) -> Cond:
        """No prompt as guidance meets it: zeros for all states, the seconds' too; the whole network hears of them."""
        states = super().empty()["states"]
        return Cond({"states": torch.zeros_like(F.pad(states, (0, 0, 0, 2)))})

    def _arguments(self, latents: Tensor, t: Tensor, cond: Cond) -> dict[str, Any]:
        """The network is told the time as the folder's scheduler tells it: the published one says t itself."""
        sigma = (t * (math.pi / 2)).tan()
        return {
            "hidden_states": latents,
            "timestep": self.pipeline.scheduler.precondition_noise(sigma),
            "encoder_hidden_states": cond["states"],
            "global_hidden_states": cond["seconds"],
            "rotary_embedding": _positions(self.unwrapped.config, latents.shape[-1]),
        }

    def _waves(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        return vae.decode(latents.to(vae.dtype), return_dict=False)[0]


def _positions(config: Any, count: int) -> Any:
    """Rotary embedding of `count` latents and the one state before them, as StableAudioPipeline makes it."""
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    return get_1d_rotary_pos_embed(
        config.attention_head_dim // 2, count + 1, use_real=True, repeat_interleave_real=False
    )


KINDS: dict[str, type[SoundModality]] = {
    "AudioLDM2Pipeline": AudioLDM2Modality,
    "StableAudioPipeline": StableAudioModality,
}
