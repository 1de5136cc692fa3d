"""What latent models share, of whatever medium: encoding, LoRA files, generation, loading, shapes for the plan.

A medium adds how it is read and what its VAE makes of it (latent_image.py, video.py, audio.py); a family adds how its
prompts are embedded and how its network is called.

Shapes: N samples; latents [N, C, ...], whose further dimensions are the medium's.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from mmalign.modalities import Encoded, Holder, Only, Piece, Skeleton, adapter_files
from mmalign.modalities.user import add_layers, arguments, has_layers, layers, save_layers, telling
from mmalign.records import Comparison, UserError
from mmalign.surrogate.likelihood import Cond
from mmalign.surrogate.paths import Path as NoisePath
from mmalign.surrogate.probes import at_least_float32

LORA_FILE = "pytorch_lora_weights.safetensors"


class LatentModality(Holder):
    """A diffusers pipeline with a VAE as the trainer sees it; the base of the families.

    Attributes:
        part: the trained network's name in the pipeline, which is also the prefix of its LoRA keys.
        targets: module names that a LoRA trains by default.
        medium: what it makes, in a word for errors.
        encoded_at_once: media that the VAE takes together.
        ragged: what of a prompt's condition has a length of its own; in a batch it is a list.
        pipeline: the diffusers pipeline around the network.
    """

    part: ClassVar[str]
    targets: ClassVar[tuple[str, ...]]
    medium: ClassVar[str]
    encoded_at_once: ClassVar[int] = 8
    ragged: ClassVar[frozenset[str]] = frozenset()
    path: NoisePath
    rest: Callable[..., Any] | None = None  # what loads the pipeline around the network, where that is still to be done

    def __init__(self, pipeline: Any, source: str = "") -> None:
        self.pipeline = pipeline
        self.source = source
        self.network: nn.Module = getattr(pipeline, self.part)
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

    @classmethod
    def without_vae(cls, pipeline: Any, vae: nn.Module) -> None:
        """Tells a pipeline that has no VAE what it then guesses; `vae` is on the meta device."""

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
        """Posterior mean "x0" and deviation "x0_std" [C, ...], scaled, and "size"; see `Modality.encode_media`.

        Raises:
            UserError: a medium cannot be read or does not fit, or the VAE overflows.
        """
        vae = self.whole().vae
        frames = {id(item): self.frame(item) for item, _ in members}
        made: dict[int, Piece] = {}
        for frame in sorted(set(frames.values())):
            rows = [row for row, (item, _) in enumerate(members) if frames[id(item)] == frame]
            for start in range(0, len(rows), self.encoded_at_once):
                part = rows[start : start + self.encoded_at_once]
                read = [self._read(*members[row], frame) for row in part]
                batch = torch.stack([values for values, _ in read]).to(vae.device, vae.dtype)
                for row, (_, size), mean, std in zip(part, read, *self._posterior(batch), strict=True):
                    made[row] = {"x0": mean, "x0_std": std, "size": torch.tensor(size)}
        bad = [self.name(*members[row]) for row, piece in sorted(made.items()) if not piece["x0"].isfinite().all()]
        if bad:
            raise UserError(
                f"The VAE gave non-finite latents for {', '.join(bad)}; run it in float32 or take the fp16-fix VAE.",
                reason="not_finite",
            )
        return [made[row] for row in range(len(members))]

    def name(self, item: Comparison, number: int) -> str:
        """What a medium is called in an error."""
        return f"comparison {item.id!r}, {self.medium} {number}"

    def _read(self, item: Comparison, number: int, frame: tuple[int, ...]) -> tuple[Tensor, list[float]]:
        """One medium as the VAE takes it, brought to the frame, and its "size": what the network is told of it."""
        raise NotImplementedError

    def _posterior(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation [N, C, ...] of the latents as the network knows them, in float32 or better.

        Default: an AutoencoderKL, or one like it, whose configuration may have a scale and a shift.
        """
        vae = self.pipeline.vae
        scale, shift = vae.config.get("scaling_factor", 1.0), vae.config.get("shift_factor") or 0.0
        posterior = vae.encode(batch).latent_dist
        return (at_least_float32(posterior.mean) - shift) * scale, at_least_float32(posterior.std) * scale

    def assemble(self, prompts: Sequence[Piece], media: Sequence[Sequence[Piece]]) -> Encoded:
        """See `Modality.assemble`; all members of a comparison are told the size of its first medium."""

        def stacked(pieces: list[Piece], name: str) -> Tensor:
            return torch.stack([piece[name] for piece in pieces]).to(self.device)

        flat = [piece for group in media for piece in group]
        asked = [prompt for prompt, group in zip(prompts, media, strict=True) for _ in group]
        sizes = [group[0] for group in media for _ in group]
        x0_std = stacked(flat, "x0_std") if "x0_std" in flat[0] else None
        lists = {name: [piece[name].to(self.device) for piece in asked] for name in self.ragged}
        cond = Cond({name: lists.get(name) or stacked(asked, name) for name in asked[0]})
        return Encoded(stacked(flat, "x0"), x0_std, self._sized(cond, stacked(sizes, "size")))

    def _embed(self, prompts: list[str]) -> Cond:
        """The conditions of N prompts."""
        raise NotImplementedError

    def _sized(self, cond: Cond, sizes: Tensor) -> Cond:
        """The condition with what the family is told of sizes; [N, ...], as `encode_media` has them."""
        return cond

    @torch.no_grad()
    def empty(self) -> Cond:
        """The empty prompt as guidance meets it."""
        self.whole()
        return self._embed([""])

    # -- the network ---------------------------------------------------------------------------------------

    def predict(self, probe: Any, view: str) -> Tensor:
        """[N, C, ...] as the path has it; the only call of the trained network."""
        dtype = self.unwrapped.dtype
        cond = probe.cond.view(view).to(self.device, dtype)
        named = self._arguments(probe.x_t.to(self.device, dtype), probe.t.to(self.device), cond)
        named |= arguments(self.unwrapped.forward, cond.get("user"))
        return self.network(**named, return_dict=False)[0]

    def _arguments(self, latents: Tensor, t: Tensor, cond: Cond) -> dict[str, Any]:
        """The network's arguments by name, of latents [N, C, ...] and t [N] as the path counts it."""
        raise NotImplementedError

    # -- generation ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _generated(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: Mapping[str, Any],
        *,
        decode: Callable[[Tensor, Mapping[str, Any]], list[Any]] | None = None,
        negative_prompt: str | None = None,
        batch_size: int = 16,
        user: Tensor | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Any]:
        """What `generate` gives; medium i starts from noise of `seeds[i]` whatever the batch size.

        Args:
            prompts: N texts.
            seeds: one a prompt.
            settings: for the pipeline; None takes its own default.
            decode: (latents, settings) -> media; default `_decode`.
            negative_prompt: of all.
            batch_size: prompts at once.
            user: whom they are for, an embedding [D] or [N, D]; it needs user layers.
            progress: is told how many media a batch has finished.

        Raises:
            UserError: the pipeline takes no such setting.
            ValueError: lengths differ.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds: give one seed a prompt")
        given = {name: value for name, value in settings.items() if value is not None}
        known = inspect.signature(self.pipeline.__call__).parameters
        for name in (*given, *([] if negative_prompt is None else ["negative_prompt"])):
            if name not in known:
                raise UserError(f"{name}: {self.source or 'this model'} takes none; leave it out.")
        whose = None if user is None else user.to(self.device).expand(len(prompts), -1)
        training = self.network.training
        self.network.eval()
        self.whole()
        media: list[Any] = []
        try:
            for start in range(0, len(prompts), batch_size):
                part = list(prompts[start : start + batch_size])
                noise = [torch.Generator().manual_seed(int(seed)) for seed in seeds[start : start + batch_size]]
                negative = {} if negative_prompt is None else {"negative_prompt": [negative_prompt] * len(part)}
                with telling(self.unwrapped, None if whose is None else whose[start : start + batch_size]):
                    latents = self._latents(prompt=part, generator=noise, **given, **negative)
                media += (decode or self._decode)(latents, given)
                if progress:
                    progress(len(part))
        finally:
            self.network.train(training)
        return media

    def _latents(self, **told: Any) -> Tensor:
        """What the pipeline makes of its arguments."""
        return self.pipeline(output_type="latent", return_dict=False, **told)[0]

    def _decode(self, latents: Tensor, settings: Mapping[str, Any]) -> list[Any]:
        """Media of the pipeline's latents; our own, as it would hand half-precision latents to the float32 VAE."""
        raise NotImplementedError

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

        Where the pipeline reads none, the files are PEFT's.

        Raises:
            UserError: the file is missing, holds no LoRA, or was made for another architecture.
        """
        if not hasattr(self.pipeline, "load_lora_weights"):
            return adapter_files.load_adapter(self.unwrapped, path, name, self.source)
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
            if hasattr(self.pipeline, "save_lora_weights"):
                self._save_lora(folder)
            else:
                adapter_files.save_adapter(self.unwrapped, folder, self.source)
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


M = TypeVar("M", bound=LatentModality)


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
    """Loads a pipeline, its VAE and an adapter; text encoders that its `model_index.json` leaves out stay out.

    Args:
        kind: what to make of the pipeline.
        shapes: the family's skeleton of the source.
        source: pipeline folder or hub id.
        lora: LoRA to put on as the policy's adapter, in diffusers keys or, where its pipeline reads none, PEFT's.
        dtype: of all but the pipeline's own VAE, which is float32; default bfloat16 on an accelerator, else float32.
        device: default the accelerator when there is one.
        vae: another VAE (hub id or folder); it runs in `dtype`.
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
        try:
            pipeline = (read or partial(_read_folder, source))(dtype, parts)
            if vae and pipeline.vae:
                pipeline.vae = type(pipeline.vae).from_pretrained(str(vae), dtype=dtype)
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{vae or source}: cannot be loaded ({reason}).") from error
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
        kind.without_vae(pipeline, skeleton.parts["vae"])
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
    from diffusers import ModelMixin, pipelines

    found: dict[str, Callable[[], nn.Module]] = {}
    for name, entry in model_index(source).items():
        library, kind = entry if isinstance(entry, list | tuple) and len(entry) == 2 else (None, None)
        if library in ("diffusers", "transformers"):
            made = getattr(importlib.import_module(library), kind, None)
        else:  # a pipeline's own networks (AudioLDM2's UNet); also absent parts, settings, safety checkers
            made = getattr(getattr(pipelines, library or "", None), kind or "", None)
        if not (isinstance(made, type) and issubclass(made, nn.Module)):
            continue
        if issubclass(made, ModelMixin):
            found[name] = partial(made.from_config, made.load_config(str(source), subfolder=name))
        else:
            found[name] = partial(made, made.config_class.from_pretrained(str(source), subfolder=name))
    return found


def on_meta(made: Mapping[str, Callable[[], nn.Module]], part: str) -> dict[str, nn.Module]:
    """Makes the networks on the meta device; the trained one, `part`, is called "network"."""
    with torch.device("meta"):
        return {"network" if name == part else name: make() for name, make in made.items()}
