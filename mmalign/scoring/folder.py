"""Writing a scorer's folder, so that it can be taken elsewhere and loaded."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file
from torch import Tensor

from mmalign import storage
from mmalign.scoring.scorer import Card


def write_scorer(
    card: Card, folder: Path, *, head: dict[str, Tensor] | None = None, backbone: dict[str, Tensor] | None = None
) -> None:
    """Writes a whole scorer: its card and every local file that the card names, beside it.

    Args:
        card: of the scorer it came from; its `folder` is where files are found.
        folder: to fill.
        head: new weights of the head.
        backbone: new weights of the rest; without them those of the card, or their place on a hub, stay.
    """
    facts = {f.name: getattr(card, f.name) for f in dataclasses.fields(card) if f.name != "folder"}
    sections = {"weights": dict(card.weights), "score": dict(card.score)}
    if head is not None:
        sections["score"]["head"] = {**(card.score.get("head") or {}), **_saved(head, folder / "head.safetensors")}
    if backbone is not None:
        sections["weights"] = _saved(backbone, folder / "model.safetensors")
    facts |= {name: _beside(card, value, folder) for name, value in {"model": card.model, **sections}.items()}
    if "file" in facts["weights"] and "hub" not in facts["weights"]:
        facts["weights"]["sha256"] = storage.sha256(folder / facts["weights"]["file"])
    facts["published"] = list(card.published)
    (folder / "card.yaml").write_text(yaml.safe_dump(facts, sort_keys=False, allow_unicode=True, width=110))


def _saved(tensors: dict[str, Tensor], path: Path) -> dict[str, str]:
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)
    return {"file": path.name, "sha256": storage.sha256(path)}


def _beside(card: Card, value: Any, folder: Path) -> Any:
    """The value with every local file that it names copied into `folder` and named from there."""
    if isinstance(value, dict):
        return {name: _beside(card, inner, folder) for name, inner in value.items()}
    if not isinstance(value, str) or not value.strip("./"):
        return value
    path = card.path(value)
    if not Path(value).is_absolute() and (folder / value).exists():  # new weights, written already
        return value
    if path.is_file():
        shutil.copy(path, folder / path.name)
    elif path.is_dir():
        shutil.copytree(path, folder / path.name)
    return path.name if path.exists() else value
