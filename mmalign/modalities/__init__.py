"""One file a kind of model. A modality knows diffusers or transformers; it knows no objective.

A family is found by the class name that its `model_index.json` (a diffusers pipeline) or its `config.json` (a
transformers model) states: one table, below.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor, device, dtype, nn

from mmalign.records import Comparison, UserError
from mmalign.surrogate.likelihood import Cond
from mmalign.surrogate.paths import Path as NoisePath

Only = Literal["network", "encoders"] | None  # which parts are loaded; see `mmalign.load`

FAMILIES = {
    "AudioLDM2Pipeline": "mmalign.modalities.audio",
    "CogVideoXPipeline": "mmalign.modalities.video",
    "Gemma3ForConditionalGeneration": "mmalign.modalities.vlm",
    "Idefics3ForConditionalGeneration": "mmalign.modalities.vlm",
    "InternVLForConditionalGeneration": "mmalign.modalities.vlm",
    "LlavaForConditionalGeneration": "mmalign.modalities.vlm",
    "LlavaOnevisionForConditionalGeneration": "mmalign.modalities.vlm",
    "Qwen2VLForConditionalGeneration": "mmalign.modalities.vlm",
    "Qwen2_5_VLForConditionalGeneration": "mmalign.modalities.vlm",
    "Qwen3VLForConditionalGeneration": "mmalign.modalities.vlm",
    "SmolVLMForConditionalGeneration": "mmalign.modalities.vlm",
    "Flux2KleinPipeline": "mmalign.modalities.image_dit",
    "FluxPipeline": "mmalign.modalities.image_dit",
    "PixArtAlphaPipeline": "mmalign.modalities.image_dit",
    "PixArtSigmaPipeline": "mmalign.modalities.image_dit",
    "StableAudioPipeline": "mmalign.modalities.audio",
    "QwenImagePipeline": "mmalign.modalities.image_dit",
    "SanaPipeline": "mmalign.modalities.image_dit",
    "StableDiffusion3Pipeline": "mmalign.modalities.image_dit",
    "StableDiffusionPipeline": "mmalign.modalities.image_unet",
    "StableDiffusionXLPipeline": "mmalign.modalities.image_unet",
    "WanPipeline": "mmalign.modalities.video",
    "ZImagePipeline": "mmalign.modalities.image_dit",
}


@dataclass(frozen=True)
class Skeleton:
    """A model as shapes without memory: what the memory plan asks of a family.

    Attributes:
        parts: name -> module on the meta device; the trained one is "network".
        example: (samples, resolution or None, dtype, length or None) -> the network's arguments by name, made on the
            current device; the length is a video's frames or a sound's seconds.
        lora_targets: module names that a LoRA trains by default.
        frozen: parts, tokenizers among them, that training from a cache does without.
        media: (samples, resolution or None, length or None) -> shape of what the VAE takes; None for pictures, which
            are squares as large as the latents of `example` ask for.
        encoded_at_once: media that the VAE takes together.
    """

    parts: dict[str, nn.Module]
    example: Callable[[int, int | None, dtype, float | None], dict[str, Any]]
    lora_targets: tuple[str, ...]
    frozen: tuple[str, ...] = ()
    media: Callable[[int, int | None, float | None], tuple[int, ...]] | None = None
    encoded_at_once: int = 8

    @staticmethod
    def reading(network: nn.Module) -> Iterator[nn.Module]:
        """What makes keys and values of the text in every attention that reads it; user layers are as large."""
        from mmalign.modalities.user import text_attentions, text_keys

        for _, attention in text_attentions(network):
            keys = text_keys(attention)
            yield keys
            yield attention.to_v if keys is attention.to_k else attention.add_v_proj


# One thing encoded by itself, without a batch dimension: a medium, or a prompt with its condition. See data/cache.py
Piece = Mapping[str, Tensor]


class Encoded:
    """What the frozen encoders make of a batch; holds no randomness.

    Attributes:
        x0: [N, ...] posterior mean of the latents, or tokens [N, L].
        x0_std: [N, ...] posterior deviation; None for tokens.
        cond: N conditions.
    """

    def __init__(self, x0: Tensor, x0_std: Tensor | None, cond: Cond) -> None:
        self.x0, self.x0_std, self.cond = x0, x0_std, cond

    def __len__(self) -> int:
        return len(self.x0)

    @staticmethod
    def cat(parts: Sequence[Encoded]) -> Encoded:
        """Joins batches; those of tokens are brought to the length of the longest by zeros on the right."""
        import torch

        stds = [part.x0_std for part in parts if part.x0_std is not None]
        if not stds:
            length = max(part.x0.shape[1] for part in parts)
            parts = [part._padded(length) for part in parts]
        x0 = torch.cat([part.x0 for part in parts])
        return Encoded(x0, torch.cat(stds) if stds else None, Cond.cat([part.cond for part in parts]))

    def _padded(self, length: int) -> Encoded:
        """Tokens and what goes along them ([N, L] in the condition) with zeros up to `length`: masks end there."""
        from torch.nn.functional import pad

        def longer(value: Any) -> Any:
            along = isinstance(value, Tensor) and value.shape == self.x0.shape
            return pad(value, (0, length - value.shape[1])) if along else value

        entries = {name: longer(value) for name, value in self.cond.items()}
        return Encoded(longer(self.x0), None, Cond(entries, self.cond.policy_only))


class Holder:
    """What every modality does with its network, whatever was wrapped around it, and how it encodes piece by piece."""

    network: nn.Module
    attention = "sdpa"  # what is on the network

    def use_attention(self, name: str, inputs: Callable[[], dict[str, Any]]) -> str:
        """Puts an attention backend on the network; returns a line for the log. See `mmalign.modalities.attention`."""
        from mmalign.modalities.attention import use

        self.attention, line = use(self.unwrapped, name, inputs)
        return line

    def encode(self, items: Sequence[Comparison]) -> Encoded:
        """See `Modality.encode`: all pieces of a batch, each prompt once, put together."""
        asked = {(item.prompt, id(item.condition)): item for item in items}
        prompts = dict(zip(asked, self.encode_prompts(list(asked.values())), strict=True))
        media = iter(self.encode_media([(item, k) for item in items for k in range(len(item.media))]))
        return self.assemble(
            [prompts[item.prompt, id(item.condition)] for item in items],
            [[next(media) for _ in item.media] for item in items],
        )

    def encode_prompts(self, items: Sequence[Comparison]) -> list[Piece]:
        """See `Modality.encode_prompts`."""
        raise NotImplementedError

    def encode_media(self, members: Sequence[tuple[Comparison, int]]) -> list[Piece]:
        """See `Modality.encode_media`."""
        raise NotImplementedError

    def assemble(self, prompts: Sequence[Piece], media: Sequence[Sequence[Piece]]) -> Encoded:
        """See `Modality.assemble`."""
        raise NotImplementedError

    def frame(self, item: Comparison) -> tuple[int, ...]:
        """See `Modality.frame`."""
        return ()

    @property
    def unwrapped(self) -> Any:
        """The network without what accelerate or compile wrapped around it."""
        network = getattr(self.network, "module", self.network)
        return getattr(network, "_orig_mod", network)

    @property
    def device(self) -> device:
        """Where the network is."""
        return next(self.network.parameters()).device


class Modality(Protocol):
    """What the trainer, the demo and the commands ask of a model.

    Attributes:
        path: the noising process; None for token models.
        network: the one trained module. `predict` and `generate` call `self.network`, so whoever prepares it
            (accelerate, compile, PEFT) assigns it back.
        source: where it was loaded from.
        medium: what it makes, in a word: picture, video, sound, answer.
    """

    path: NoisePath | None
    medium: str
    network: nn.Module
    source: str
    resolution: int

    def encode(self, items: Sequence[Comparison]) -> Encoded:
        """Whole comparisons, one behind the other. Frozen parts only (VAE, text encoders, tokenizer); no randomness."""
        ...

    def encode_prompts(self, items: Sequence[Comparison]) -> list[Piece]:
        """One piece a comparison: what its prompt and condition alone become."""
        ...

    def encode_media(self, members: Sequence[tuple[Comparison, int]]) -> list[Piece]:
        """One piece a (comparison, number of its medium): what the medium alone becomes, in the comparison's frame.

        Where it has noise to be drawn by counter, a piece has "x0" and its deviation "x0_std".
        """
        ...

    def assemble(self, prompts: Sequence[Piece], media: Sequence[Sequence[Piece]]) -> Encoded:
        """Pieces of G comparisons of one frame, back to what `encode` gives: [G] prompts, [G][K] media."""
        ...

    def frame(self, item: Comparison) -> tuple[int, ...]:
        """What all media of a comparison are brought to, as height and width in pixels; () where each keeps its own.

        Of the media, only the first one's header is read.
        """
        ...

    def empty(self) -> Cond:
        """The empty prompt, for caption dropout."""
        ...

    def predict(self, probe: Any, view: str) -> Tensor:
        """The only call of the trained network, in the path's convention."""
        ...

    def generate(self, prompts: Sequence[str], *, seeds: Sequence[int], **settings: Any) -> list[Any]:
        """Media, one a prompt and seed; guidance lives here alone."""
        ...

    def lora_targets(self) -> list[str]:
        """Module names that a LoRA trains by default."""
        ...

    def save(self, folder: str | Path) -> None:
        """Writes the family's own file formats."""
        ...

    def load_adapter(self, path: str | Path, name: str = "policy") -> None:
        """Puts a LoRA on the network."""
        ...


def class_name(source: str | Path) -> str:
    """The class that a pipeline's or model's folder, a hub id or a single file states.

    Raises:
        UserError: nothing is there, or it states no class.
    """
    from diffusers import DiffusionPipeline

    path = Path(source)
    if path.suffix in (".safetensors", ".ckpt"):
        from mmalign.modalities.single_file import pipeline_class

        return pipeline_class(path)
    if path.is_dir() and not any((path / name).is_file() for name in ("model_index.json", "config.json")):
        raise UserError(
            f"{source}: has no model_index.json or config.json, so it is no diffusers pipeline and no transformers"
            " model; give its top folder."
        )
    if not path.exists() and (path.is_absolute() or str(source).count("/") != 1):
        raise UserError(f"{source}: no such folder or file; give a pipeline folder, a hub id or a .safetensors file.")
    try:
        return DiffusionPipeline.load_config(str(source))["_class_name"]
    except (OSError, ValueError) as error:
        stated = _architecture(source)
        if stated is None:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{source}: neither a local folder nor reachable on the hub ({reason}); check the name."
            ) from error
        return stated


def _architecture(source: str | Path) -> str | None:
    """What a model's config.json states; a part of a diffusers pipeline has another word for it."""
    from transformers import PreTrainedConfig

    try:
        config, _ = PreTrainedConfig.get_config_dict(str(source))
    except (OSError, ValueError):
        return None
    return next(iter(config.get("architectures") or ()), config.get("_class_name", "model without architectures"))


def _family(source: str | Path) -> Any:
    """The module of a source's family."""
    name = class_name(source)
    if not isinstance(name, str) or name not in FAMILIES:  # a list names code of its own
        raise UserError(f"{source}: a {name} is not supported yet; supported are {', '.join(sorted(FAMILIES))}.")
    return importlib.import_module(FAMILIES[name])


def load(
    source: str | Path,
    lora: str | Path | None = None,
    dtype: Any = None,
    device: Any = None,
    user_layers: str | Path | None = None,
    **options: Any,
) -> Any:
    """Loads a modality; see `mmalign.load`."""
    modality = _family(source).load(source, lora=lora, dtype=dtype, device=device, **options)
    if user_layers:
        from mmalign.modalities.user import load_layers

        load_layers(modality.network, user_layers, modality.add_user_layers)
    return modality


def skeleton(source: str | Path) -> Skeleton:
    """A model as shapes without memory; see `mmalign.skeleton`."""
    return _family(source).skeleton(source)
