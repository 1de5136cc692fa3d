"""Makes a run fit into so many bytes, in the fastest way that the memory plan allows."""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

import mmalign
from mmalign.records import UserError
from mmalign.training.memory import GIB, plan
from mmalign.training.run import Run

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_KEPT, _EACH = {"gradient_checkpointing": False}, {"gradient_checkpointing": True, "gradient_checkpointing_every": 1}
_PLAIN, _TWO = {"backward": "plain"}, {"backward": "two-pass", "rows_at_once": 1}
# By the operations they take, fewest first: a checkpointed block runs forward twice, in two passes everything does
_WAYS: dict[str, dict[str, Any]] = {
    "everything kept": _KEPT | _PLAIN,
    "every second block checkpointed": _EACH | _PLAIN | {"gradient_checkpointing_every": 2},
    "gradient checkpointing": _EACH | _PLAIN,
    "two passes": _KEPT | _TWO,
    "two passes and gradient checkpointing": _EACH | _TWO,
}


def size_of(text: str) -> int:
    """Bytes of "24GB" (10^9 each) or "24GiB" (2^30 each)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)", text.strip().upper())
    if not found or not float(found[1]):
        raise UserError(f"--fit {text}: give a size above 0 with its unit, such as 24GB.")
    return int(float(found[1]) * _UNITS[found[2]])


def fit(
    run: Run, limit: int, dtype: torch.dtype, skeleton: Any = None, members: int = 2
) -> tuple[Run, tuple[str, ...]]:
    """The run as it is fastest under a limit, and lines that say what was chosen and why.

    Micro-batch times accumulation stays, so a step's gradient does as well. Ways are tried by their operations; of one
    way, the largest micro-batch that fits is taken. Another optimizer, which learns otherwise, comes last, and for
    whole networks only: a LoRA's is small. Ways that the run refuses are left out.

    Args:
        run: the recipe.
        limit: bytes of a process above the empty one.
        dtype: see `plan`.
        skeleton: see `plan`.
        members: see `plan`.

    Raises:
        UserError: nothing fits; the sentence says what the smallest plan takes.
    """
    skeleton = skeleton or mmalign.skeleton(run.pretrained_model_name_or_path)
    comparisons = run.train_batch_size * run.gradient_accumulation_steps
    divisors = [size for size in range(1, comparisons + 1) if comparisons % size == 0]
    rejected: dict[str, int] = {}

    def changed(changes: dict[str, Any], size: int) -> Run:
        return replace(run, **changes, train_batch_size=size, gradient_accumulation_steps=comparisons // size)

    for optimizer, other in _optimizers(run).items():
        sizes = [comparisons] if other.get("fused_backward", run.fused_backward) else divisors
        for name, way in _WAYS.items():
            changes = way | other
            try:
                changed(changes, sizes[0])
            except UserError:
                continue
            needed = cache(lambda size, changes=changes: plan(changed(changes, size), dtype, skeleton, members).needs)
            place = bisect_right(sizes, limit, key=needed)
            if not place:
                rejected[f"{name}, {optimizer}, {sizes[0]} at once"] = needed(sizes[0])
                continue
            size = sizes[place - 1]
            lines = [
                f"Fits {limit / GIB:.2f} GiB: {name}, {optimizer}, {size} at once, {comparisons // size} times a step;"
                f" needs {needed(size) / GIB:.2f} GiB, reserve included.",
                *(f"Too large: {what} ({b / GIB:.2f} GiB)." for what, b in rejected.items()),
            ]
            chosen = changed(changes, size)
            if chosen.optimizer != run.optimizer:
                lines.append(f"{chosen.optimizer} does not learn as {run.optimizer} does: look at the learning rate.")
            if chosen.max_grad_norm != run.max_grad_norm:
                lines.append(
                    "Gradients are not clipped, as they are never held together; Adafactor limits its updates."
                )
            return chosen, tuple(lines)
    smallest = min(rejected, key=rejected.__getitem__)
    raise UserError(
        f"--fit: nothing fits {limit / GIB:.2f} GiB; the smallest plan ({smallest}) needs"
        f" {rejected[smallest] / GIB:.2f} GiB, so take a smaller resolution, a cache_dir, a LoRA or another machine."
    )


def _optimizers(run: Run) -> dict[str, dict[str, Any]]:
    """The run's own, then those that take less, where they are there: name -> changes."""
    found: dict[str, dict[str, Any]] = {run.optimizer: {}}
    if run.use_lora or run.fused_backward:
        return found
    if run.optimizer == "adamw" and torch.cuda.is_available() and find_spec("bitsandbytes"):
        found["adamw_8bit"] = {"optimizer": "adamw_8bit"}
    adafactor = found["adafactor"] = {"optimizer": "adafactor"}
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        found["adafactor with fused backward"] = adafactor | {"fused_backward": True, "max_grad_norm": 0.0}
    return found
