"""One file a kind of model. A modality knows diffusers or transformers; it knows no objective.

A family is found by the class name that its `model_index.json` states: one table, below.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from mmalign.records import Comparison, UserError
from mmalign.surrogate.likelihood import Cond
from mmalign.surrogate.paths import Path as NoisePath

FAMILIES = {
    "StableDiffusionPipeline": "mmalign.modalities.image_unet",
    "StableDiffusionXLPipeline": "mmalign.modalities.image_unet",
}


class Encoded:
    """What the frozen encoders make of a batch; holds no randomness, so it can be stored.

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
        """Joins batches."""
        import torch

        stds = [part.x0_std for part in parts if part.x0_std is not None]
        x0 = torch.cat([part.x0 for part in parts])
        return Encoded(x0, torch.cat(stds) if stds else None, Cond.cat([part.cond for part in parts]))


class Modality(Protocol):
    """What the trainer, the demo and the commands ask of a model.

    Attributes:
        path: the noising process; None for token models.
        network: the one trained module. `predict` and `generate` call `self.network`, so whoever prepares it
            (accelerate, compile, PEFT) assigns it back.
        source: where it was loaded from.
    """

    path: NoisePath | None
    network: nn.Module
    source: str
    resolution: int

    def encode(self, items: Sequence[Comparison]) -> Encoded:
        """Frozen parts only (VAE, text encoders, tokenizer); no randomness."""
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
    """The pipeline class that a folder, hub id or single file states.

    Raises:
        UserError: nothing is there, or it states no class.
    """
    from diffusers import DiffusionPipeline

    path = Path(source)
    if path.suffix in (".safetensors", ".ckpt"):
        from mmalign.modalities.single_file import pipeline_class

        return pipeline_class(path)
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise UserError(
            f"{source}: has no model_index.json, so it is no diffusers pipeline; give the pipeline's top folder."
        )
    if not path.exists() and (path.is_absolute() or str(source).count("/") != 1):
        raise UserError(f"{source}: no such folder or file; give a pipeline folder, a hub id or a .safetensors file.")
    try:
        return DiffusionPipeline.load_config(str(source))["_class_name"]
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{source}: neither a local folder nor reachable on the hub ({reason}); check the name."
        ) from error


def _family(source: str | Path) -> Any:
    """The module of a source's family."""
    name = class_name(source)
    if name not in FAMILIES:
        raise UserError(f"{source}: a {name} is not supported yet; supported are {', '.join(sorted(FAMILIES))}.")
    return importlib.import_module(FAMILIES[name])


def load(
    source: str | Path, lora: str | Path | None = None, dtype: Any = None, device: Any = None, **options: Any
) -> Any:
    """Loads a modality; see `mmalign.load`."""
    return _family(source).load(source, lora=lora, dtype=dtype, device=device, **options)


def skeleton(source: str | Path) -> dict[str, nn.Module]:
    """The parts on the meta device; see `mmalign.skeleton`."""
    return _family(source).skeleton(source)
