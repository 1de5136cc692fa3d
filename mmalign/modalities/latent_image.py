"""What latent image models share: pictures to latents and back, LoRA files, generation, shapes for the plan.

A family adds how its prompts are embedded and how its network is called: see image_unet.py and image_dit.py.

Shapes: N samples, C latent channels, H W latent size, R the training pictures' side in pixels.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmalign.modalities import Encoded, Holder, Only, Piece, Skeleton
from mmalign.modalities.user import add_layers, arguments, has_layers, layers, save_layers
from mmalign.records import Comparison, UserError, image_size, open_image
from mmalign.surrogate.likelihood import Cond
from mmalign.surrogate.paths import Path as NoisePath
from mmalign.surrogate.probes import at_least_float32

LORA_FILE = "pytorch_lora_weights.safetensors"
MAX_ENLARGED = 16  # a picture that would have to grow by as much is none: a 1 x 1 placeholder, an icon


class LatentImageModality(Holder):
    """A diffusers pipeline with an AutoencoderKL as the trainer sees it; the base of the families.

    Attributes:
        part: the trained network's name in the pipeline, which is also the prefix of its LoRA keys.
        targets: module names that a LoRA trains by default.
        pipeline: the diffusers pipeline around the network.
        resolution: side of the training pictures in pixels.
        aspect_buckets: train on the nearest of several aspects, of about `resolution` squared pixels each.
    """

    part: ClassVar[str]
    targets: ClassVar[tuple[str, ...]]
    path: NoisePath
    rest: Callable[..., Any] | None = None  # what loads the pipeline around the network, where that is still to be done

    def __init__(self, pipeline: Any, source: str = "") -> None:
        self.pipeline = pipeline
        self.source = source
        self.network: nn.Module = getattr(pipeline, self.part)
        self.resolution: int = self.unwrapped.config.sample_size * pipeline.vae_scale_factor
        self.aspect_buckets = False
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()

    def lora_targets(self) -> list[str]:
        """Module names that a LoRA trains by default."""
        return list(self.targets)

    def whole(self) -> Any:
        """The pipeline with the network as it stands; the encoders that training did without are loaded now."""
        if self.rest:
            self.pipeline, self.rest = self.rest(**{self.part: self.unwrapped}), None
        setattr(self.pipeline, self.part, self.unwrapped)  # a view may have put other weights in place
        return self.pipeline

    # -- encoding ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_prompts(self, items: Sequence[Comparison]) -> list[Piece]:
        """The family's prompt embeddings; see `Modality.encode_prompts`."""
        prompts = sorted({item.prompt for item in items})
        self.whole()
        cond = self._embed(prompts)
        rows = {prompt: {name: value[row] for name, value in cond.items()} for row, prompt in enumerate(prompts)}
        return [rows[item.prompt] for item in items]

    @torch.no_grad()
    def encode_media(self, members: Sequence[tuple[Comparison, int]]) -> list[Piece]:
        """Posterior mean "x0" and deviation "x0_std" [C, H, W], scaled, and "size" [6]; see `Modality.encode_media`.

        A picture keeps its aspect: it is brought to cover the frame, the rest cropped at the centre. "size" is its
        original height and width, the crop's top and left, the frame's height and width.

        Raises:
            UserError: a picture cannot be read or is too small, or the VAE overflows.
        """
        vae = self.whole().vae
        scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
        frames = {id(item): self.frame(item) for item, _ in members}
        made: dict[int, Piece] = {}
        for frame in sorted(set(frames.values())):
            rows = [row for row, (item, _) in enumerate(members) if frames[id(item)] == frame]
            cropped = [self._crop(*members[row], frame) for row in rows]
            batch = torch.stack([pixels for pixels, _ in cropped]).to(vae.device, vae.dtype)
            posteriors = [vae.encode(part).latent_dist for part in batch.split(8)]
            mean = (at_least_float32(torch.cat([posterior.mean for posterior in posteriors])) - shift) * scale
            std = at_least_float32(torch.cat([posterior.std for posterior in posteriors])) * scale
            for place, row in enumerate(rows):
                made[row] = {"x0": mean[place], "x0_std": std[place], "size": torch.tensor(cropped[place][1])}
        bad = [_name(*members[row]) for row, piece in made.items() if not piece["x0"].isfinite().all()]
        if bad:
            raise UserError(
                f"The VAE gave non-finite latents for {', '.join(bad)}; run it in float32 or take the fp16-fix VAE.",
                reason="not_finite",
            )
        return [made[row] for row in range(len(members))]

    def assemble(self, prompts: Sequence[Piece], media: Sequence[Sequence[Piece]]) -> Encoded:
        """See `Modality.assemble`; all members of a comparison are told the size of its first picture."""

        def stacked(pieces: list[Piece], name: str) -> Tensor:
            return torch.stack([piece[name] for piece in pieces]).to(self.device)

        flat = [piece for group in media for piece in group]
        asked = [prompt for prompt, group in zip(prompts, media, strict=True) for _ in group]
        sizes = [group[0] for group in media for _ in group]
        x0_std = stacked(flat, "x0_std") if "x0_std" in flat[0] else None
        cond = Cond({name: stacked(asked, name) for name in asked[0]})
        return Encoded(stacked(flat, "x0"), x0_std, self._sized(cond, stacked(sizes, "size")))

    def frame(self, item: Comparison) -> tuple[int, int]:
        """A square of `resolution`, or with `aspect_buckets` the bucket nearest to the first picture's aspect."""
        if not self.aspect_buckets:
            return self.resolution, self.resolution
        width, height = image_size(item.media[0], name=_name(item, 0))
        return min(self.buckets(), key=lambda frame: (abs(math.log(frame[0] / frame[1] * width / height)), frame))

    def buckets(self) -> list[tuple[int, int]]:
        """Heights and widths of about the area of `resolution` squared, aspects up to 2, as SDXL was trained.

        Both are multiples of eight latents (64 pixels for SDXL; arXiv 2307.01952 appendix I).
        """
        unit = 8 * self.pipeline.vae_scale_factor
        area = (self.resolution / unit) ** 2  # in units
        sides = range(max(1, round(math.sqrt(area / 2))), round(math.sqrt(area * 2)) + 1)
        return [(side * unit, max(1, round(area / side)) * unit) for side in sides]

    def _crop(self, item: Comparison, number: int, frame: tuple[int, int]) -> tuple[Tensor, list[float]]:
        """[3, *frame] in [-1, 1], and "size"."""
        picture = open_image(item.media[number], name=_name(item, number))
        (width, height), (high, wide) = picture.size, frame
        if min(width, height) * MAX_ENLARGED <= min(frame):
            raise UserError(
                f"{_name(item, number)}: is {width} x {height} pixels, too small for {wide} x {high}; remove it.",
                reason="too_small",
            )
        factor = max(wide / width, high / height)
        resized = picture.resize(
            (max(wide, round(width * factor)), max(high, round(height * factor))), Image.Resampling.LANCZOS
        )
        left, top = (resized.width - wide) // 2, (resized.height - high) // 2
        array = np.asarray(resized.crop((left, top, left + wide, top + high)), dtype=np.float32)
        return torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1, [
            float(n) for n in (height, width, top, left, *frame)
        ]

    def _embed(self, prompts: list[str]) -> Cond:
        """The conditions of N prompts."""
        raise NotImplementedError

    def _sized(self, cond: Cond, sizes: Tensor) -> Cond:
        """The condition with what the family is told of sizes and crops; [N, 6], as `encode_media` has them."""
        return cond

    @torch.no_grad()
    def empty(self) -> Cond:
        """The empty prompt as guidance meets it."""
        self.whole()
        return self._embed([""])

    # -- generation ----------------------------------------------------------------------------------------

    @torch.no_grad()
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
        """Pictures, one a prompt; picture i starts from noise of `seeds[i]` whatever the batch size.

        None takes the pipeline's own default. `user` is whom they are for, an embedding [D] or [N, D]; it needs user
        layers. `progress` is told how many pictures a batch has finished.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds: give one seed a prompt")
        given = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "height": height,
            "width": width,
        }
        settings = {name: value for name, value in given.items() if value is not None}
        whose = None if user is None else user.to(self.device).expand(len(prompts), -1)
        training = self.network.training
        self.network.eval()
        self.whole()
        pictures: list[Image.Image] = []
        try:
            for start in range(0, len(prompts), batch_size):
                part = list(prompts[start : start + batch_size])
                noise = [torch.Generator().manual_seed(int(seed)) for seed in seeds[start : start + batch_size]]
                negative = None if negative_prompt is None else [negative_prompt] * len(part)
                told = arguments(self.pipeline.__call__, whose if whose is None else whose[start : start + batch_size])
                latents = self.pipeline(
                    prompt=part, negative_prompt=negative, generator=noise, output_type="latent", **settings, **told
                ).images
                pictures += self._decode(latents)
                if progress:
                    progress(len(part))
        finally:
            self.network.train(training)
        return pictures

    def _decode(self, latents: Tensor) -> list[Image.Image]:
        """Our own, as the pipeline would hand half-precision latents to the float32 VAE."""
        vae = self.pipeline.vae
        latents = latents.to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        return self.pipeline.image_processor.postprocess(vae.decode(latents, return_dict=False)[0], output_type="pil")

    def add_user_layers(self, features: int, tokens: int, seed: int = 0) -> dict[str, nn.Parameter]:
        """Puts untrained user layers on the network and returns their parameters; see `user.add_layers`."""
        add_layers(self.unwrapped, features, tokens, seed)
        return layers(self.unwrapped)

    # -- files ---------------------------------------------------------------------------------------------

    def _read_lora(self, file: str) -> tuple[dict[str, Tensor], Any, Any]:
        """State in diffusers keys, kohya's alphas where the family knows them, PEFT's settings."""
        state, metadata = self.pipeline.lora_state_dict(file, return_lora_metadata=True)
        return state, None, metadata

    def load_adapter(self, path: str | Path, name: str = "policy") -> None:
        """Puts a LoRA on the network, in the keys that the family's diffusers pipeline reads; it stays float32.

        Raises:
            UserError: the file is missing, holds no LoRA, or was made for another architecture.
        """
        path = Path(path)
        file = path / LORA_FILE if path.is_dir() else path
        local = file.exists() or path.is_absolute() or str(path).count("/") != 1
        if local and not file.is_file():
            raise UserError(f"{file}: no such LoRA file; give a .safetensors file or a folder with {LORA_FILE}.")
        network = self.unwrapped
        before = set(getattr(network, "peft_config", {}))
        first = ("lora_A.weight", "lora.down.weight")
        try:
            state, alphas, metadata = self._read_lora(str(file if local else path))
            expected = {key for key in state if key.startswith(f"{self.part}.") and key.endswith(first)}
            network.load_lora_adapter(
                state, prefix=self.part, network_alphas=alphas, adapter_name=name, metadata=metadata, _pipeline=None
            )
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{path}: this LoRA does not fit {self.source or 'the model'} ({reason}).") from error
        loaded = sum(name in getattr(module, "lora_A", {}) for module in network.modules())
        if name in before or not expected or loaded != len(expected):
            raise UserError(
                f"{path}: {loaded} of its {len(expected)} {self.part} layers fit {self.source or 'the model'};"
                " it was made for another architecture."
            )
        for key, parameter in network.named_parameters():
            if f".{name}." in key:
                parameter.data = at_least_float32(parameter.data)

    def save(self, folder: str | Path) -> None:
        """Writes the adapter in the family's own files, or the whole pipeline where there is no adapter."""
        folder = Path(folder)
        personal = has_layers(self.unwrapped)
        if personal:
            save_layers(self.unwrapped, folder)
        if "policy" in getattr(self.unwrapped, "peft_config", {}):
            self._save_lora(folder)
        elif not personal:
            self.whole().save_pretrained(folder)

    def _save_lora(self, folder: Path) -> dict[str, Tensor]:
        """Writes the adapter in diffusers keys, alpha and rank with it; returns its layers by their PEFT keys."""
        from peft.utils import get_peft_model_state_dict

        state = get_peft_model_state_dict(self.unwrapped, adapter_name="policy")
        layers = {key: value.contiguous() for key, value in state.items()}
        given = {
            f"{self.part}_lora_layers": layers,
            f"{self.part}_lora_adapter_metadata": self.unwrapped.peft_config["policy"].to_dict(),
        }
        type(self.pipeline).save_lora_weights(folder, weight_name=LORA_FILE, **given)
        return layers


def _name(item: Comparison, number: int) -> str:
    return f"comparison {item.id!r}, picture {number}"


M = TypeVar("M", bound=LatentImageModality)


def load_modality(
    kind: type[M],
    shapes: Callable[[], Skeleton],
    source: str | Path,
    lora: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    vae: str | Path | None = None,
    only: Only = None,
    read: Callable[..., Any] | None = None,
) -> M:
    """Loads a pipeline, its VAE and an adapter; the families' `load` say what the arguments are.

    Args:
        kind: what to make of the pipeline.
        shapes: the family's skeleton of the source.
        source: pipeline folder or hub id.
        lora: LoRA file or folder.
        dtype: of network and text encoders.
        device: where it shall run.
        vae: another VAE.
        only: see `mmalign.load`.
        read: (dtype, parts) -> pipeline with these parts for its own, None leaving one out; default diffusers'
            `from_pretrained` of the source.

    Raises:
        UserError: a part is missing or does not fit.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type != "cpu" else torch.float32)

    def made(**parts: Any) -> Any:
        """The pipeline on its device, with these parts for its own."""
        from diffusers import AutoencoderKL

        try:
            pipeline = (read or partial(_read_folder, source))(dtype, parts)
            if vae and pipeline.vae:
                pipeline.vae = AutoencoderKL.from_pretrained(str(vae), dtype=dtype)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{vae or source}: cannot be loaded ({str(error).splitlines()[0]}).") from error
        if pipeline.vae and not vae and dtype.itemsize < 4:
            pipeline.vae.to(torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module) and name not in parts:
                part.to(device)
        return pipeline

    if only:
        skeleton = shapes()
    if only == "encoders":
        modality = kind(made(**{kind.part: skeleton.parts["network"]}), str(source))
    elif only == "network":
        pipeline = made(**dict.fromkeys(skeleton.frozen))
        pipeline.vae_scale_factor = pixels_per_latent(skeleton.parts["vae"])  # it guesses 8 where it has no VAE
        modality = kind(pipeline, str(source))
        modality.rest = made
    else:
        modality = kind(made(), str(source))
    if lora:
        modality.load_adapter(lora)
    return modality


def _read_folder(source: str | Path, dtype: torch.dtype, parts: Mapping[str, Any]) -> Any:
    from diffusers import DiffusionPipeline

    entries = model_index(source).items()
    # diffusers leaves out a part that the index gives as null only when it is told so again (SD3 without its T5)
    absent = {name: None for name, entry in entries if isinstance(entry, list | tuple) and not any(entry)}
    return DiffusionPipeline.from_pretrained(str(source), dtype=dtype, **absent, **parts)


def model_index(source: str | Path) -> dict[str, Any]:
    """A pipeline's `model_index.json`: the name of a part -> its library and class, both null where it is absent."""
    from diffusers import DiffusionPipeline

    return dict(DiffusionPipeline.load_config(str(source)))


def frozen(index: Mapping[str, Any], part: str) -> tuple[str, ...]:
    """The parts of a `model_index.json` that training from a cache does without."""
    named = {name for name, entry in index.items() if isinstance(entry, list | tuple) and any(entry)}
    return tuple(sorted(named - {part, "scheduler"}))


def makers(source: str | Path) -> dict[str, Callable[[], nn.Module]]:
    """Name -> what makes each network that a pipeline folder or hub id names, from its configuration alone."""
    found: dict[str, Callable[[], nn.Module]] = {}
    for name, entry in model_index(source).items():
        library, kind = entry if isinstance(entry, list | tuple) and len(entry) == 2 else (None, None)
        if library not in ("diffusers", "transformers"):  # absent parts, settings, a pipeline's own helper classes
            continue
        made = getattr(importlib.import_module(library), kind, None)
        if not (isinstance(made, type) and issubclass(made, nn.Module)):
            continue
        if library == "diffusers":
            found[name] = partial(made.from_config, made.load_config(str(source), subfolder=name))
        else:
            found[name] = partial(made, made.config_class.from_pretrained(str(source), subfolder=name))
    return found


def on_meta(made: Mapping[str, Callable[[], nn.Module]], part: str) -> dict[str, nn.Module]:
    """Makes the networks on the meta device; the trained one, `part`, is called "network"."""
    with torch.device("meta"):
        return {"network" if name == part else name: make() for name, make in made.items()}


def pixels_per_latent(vae: Any) -> int:
    """How many pixels high and wide a latent is."""
    return 2 ** (len(vae.config.block_out_channels) - 1)
