"""The whole loop on an embedded model.

candidates -> scores -> pairs -> LoRA Diffusion-DPO -> the same prompts and seeds again -> report. Prompts of the
pairs, of development and of the report share no combination of what they speak of. What is aligned, and who judges, is
a `Task` (mmalign/tasks.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

import mmalign
from mmalign.commands import both_sides, quiet_libraries, report
from mmalign.console import stage
from mmalign.records import Comparison
from mmalign.tasks import TASKS, Asked, Judge, Size, Task

T = TypeVar("T")


def spread(items: Sequence[T], count: int, seed: int) -> list[T]:
    """`count` items in an order that is a function of the seed; a list that is too short goes round again."""
    from mmalign.surrogate.draws import generator

    order = generator("prompts", seed).permutation(len(items))
    return [items[order[i % len(order)]] for i in range(count)]


def settings_of(asked: Sequence[Asked], size: Size) -> dict[str, Any]:
    """What `generate` is told beside prompts and seeds."""
    return {**size.sampling, **({"images": [one.images for one in asked]} if asked[0].images else {})}


def make_pairs(
    modality: Any, task: Task, size: Size, seed: int, split: str = "pairs"
) -> tuple[list[Comparison], dict[str, int]]:
    """Candidates of the model for prompts of a split, scored, best against worst; or the task's own pairs."""
    from mmalign.data.label import best_worst

    if task.pairs:
        pairs = task.pairs(size.pair_prompts, seed, split)
        return pairs, {"kept": len(pairs)}
    asked, k = spread(task.asked(split), size.pair_prompts, seed), size.candidates
    flat = [one for one in asked for _ in range(k)]
    seeds = [1_000_000 * (seed + 1) + i for i in range(len(flat))]
    with stage("Candidates", len(flat)) as advance:
        told = settings_of(flat, size)
        media = modality.generate([one.text for one in flat], seeds=seeds, progress=advance, **told)
    with stage("Scores", len(flat)) as advance:
        scores = list(map(float, next(iter(task.judges().values()))(media, flat)))
        advance(len(flat))
    grouped = [slice(i * k, (i + 1) * k) for i in range(len(asked))]
    sources = [f"{split} seed {s}" for s in seeds]
    return best_worst(
        [one.text for one in asked],
        [media[rows] for rows in grouped],
        [scores[rows] for rows in grouped],
        sources=[sources[rows] for rows in grouped],
        conditions=[one.images for one in asked],
        drop_fraction=size.drop_fraction,
    )


def align(modality: Any, run: Any, pairs: Sequence[Comparison]) -> Path:
    """Trains with a progress bar."""
    from mmalign.training.loop import train

    with stage("Training steps", run.max_train_steps) as advance:
        return train(run, modality=modality, comparisons=pairs, watch=lambda step, metrics: advance(1))


def judged(asked: Sequence[Asked], base: Sequence[Any], aligned: Sequence[Any], judges: dict[str, Judge]) -> Any:
    """What the judges say of both sides, as a `Result`; what is called alike is one cluster."""
    from mmalign.evaluation.compare import Result

    sides = {"base": base, "aligned": aligned}
    scores = {
        name: {side: np.asarray(judge(media, asked), float) for side, media in sides.items()}
        for name, judge in judges.items()
    }
    return Result(tuple(one.name for one in asked), scores)


def main(output_dir: str, *, modality: str = "image", small: bool = False, seed: int = 0) -> None:
    """Runs everything; see `mmalign quickstart --help`.

    Raises:
        UserError: the output folder holds another run.
    """
    started = time.monotonic()
    quiet_libraries()
    from mmalign.data.importers import write_comparisons
    from mmalign.recipe import load_recipe
    from mmalign.training import checkpoint
    from mmalign.training.views import WeightViews

    task = TASKS[modality]
    size = task.small if small else task.size
    folder = Path(output_dir)
    recipe = load_recipe(task.recipe)
    steps = size.steps or recipe.max_train_steps
    run = replace(
        recipe,
        dataset_name=str(folder / "pairs"),
        output_dir=str(folder / "aligned"),
        max_train_steps=steps,
        checkpointing_steps=steps,
        seed=seed,
    )
    checkpoint.find(run)  # another run's folder is refused before any work
    model = mmalign.load(run.pretrained_model_name_or_path)
    pairs, counts = make_pairs(model, task, size, seed)
    write_comparisons(folder / "pairs", pairs)
    print("Pairs: " + ", ".join(f"{count} {name}" for name, count in counts.items()) + ".", flush=True)
    align(model, run, pairs)

    asked = spread(task.asked("test"), size.test_prompts, seed=0)
    texts, seeds = [one.text for one in asked], list(range(len(asked)))
    base, aligned = both_sides(model, WeightViews(model), texts, seeds, **settings_of(asked, size))
    result = judged(asked, base, aligned, task.judges())
    seconds = time.monotonic() - started
    sampling = ", ".join(f"{name} {value}" for name, value in size.sampling.items() if name != "batch_size")
    facts = {
        "model": task.model,
        "objective": str(run.objective),
        "training": f"{steps} steps of {run.train_batch_size} pairs, lr {run.learning_rate}, LoRA rank {run.rank}",
        "pairs": f"{len(pairs)}; {task.origin.format(size=size)}",
        "test prompts": f"{len(asked)}, of combinations that no training saw",
        "sampling": sampling,
        "seed": seed,
        "took": f"{seconds:.0f} s",
    }
    report(
        folder,
        f"Preference alignment of {task.model}",
        result,
        [one.name for one in asked],
        base,
        aligned,
        run=run,
        facts=facts,
        roles=task.roles,
        headline=task.headline,
        count=len(pairs),
        conditions=[one.images for one in asked],
    )
    print(f"{seconds:.0f} s in all.")
