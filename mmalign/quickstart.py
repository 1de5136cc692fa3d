"""The whole loop on the embedded model.

candidates -> scores -> pairs -> LoRA Diffusion-DPO -> the same prompts and seeds again -> report. Prompts of the
pairs, of development and of the report share no object-and-colour combination (mmalign.embedded.scenes).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mmalign
from mmalign.commands import both_sides, quiet_libraries, report
from mmalign.console import stage
from mmalign.embedded import SAMPLING
from mmalign.records import Comparison

TRAINING_SCORER, HELD_OUT_SCORER, ALIGNMENT_SCORER = "embedded-hps", "embedded-heldout", "embedded-clip"
ROLES = {
    TRAINING_SCORER: "made the pairs",
    HELD_OUT_SCORER: "held out",
    ALIGNMENT_SCORER: "text alignment",
}


@dataclass(frozen=True)
class Size:
    """How much quickstart does. Chosen on development prompts (benchmarks/README.md)."""

    pair_prompts: int = 320
    candidates: int = 4
    drop_fraction: float = 0.2
    test_prompts: int = 200
    num_inference_steps: int = SAMPLING["num_inference_steps"]
    guidance_scale: float = SAMPLING["guidance_scale"]
    steps: int | None = None  # None: the recipe's

    @property
    def sampling(self) -> dict[str, Any]:
        """Settings of every generation."""
        return {
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "batch_size": 32,
        }


SMALL = Size(pair_prompts=8, candidates=2, drop_fraction=0.0, test_prompts=8, num_inference_steps=4, steps=4)


def spread(prompts: Sequence[str], count: int, seed: int) -> list[str]:
    """`count` prompts in an order that is a function of the seed; a list that is too short goes round again."""
    from mmalign.surrogate.draws import generator

    order = generator("prompts", seed).permutation(len(prompts))
    return [prompts[order[i % len(order)]] for i in range(count)]


def make_pairs(modality: Any, size: Size, seed: int, split: str = "pairs") -> tuple[list[Comparison], dict[str, int]]:
    """Candidates of the model for prompts of a split, scored, best against worst."""
    from mmalign.data.label import best_worst
    from mmalign.embedded import prompts as embedded_prompts

    prompts = spread(embedded_prompts(split), size.pair_prompts, seed)
    k = size.candidates
    flat = [prompt for prompt in prompts for _ in range(k)]
    seeds = [1_000_000 * (seed + 1) + i for i in range(len(flat))]
    with stage("Candidates", len(flat)) as advance:
        pictures = modality.generate(flat, seeds=seeds, progress=advance, **size.sampling)
    with stage("Scores", len(flat)) as advance:
        scores = mmalign.load_scorer(TRAINING_SCORER).score(pictures, flat).tolist()
        advance(len(flat))
    grouped = [slice(i * k, (i + 1) * k) for i in range(len(prompts))]
    sources = [f"{split} seed {s}" for s in seeds]
    pairs, counts = best_worst(
        prompts,
        [pictures[rows] for rows in grouped],
        [scores[rows] for rows in grouped],
        sources=[sources[rows] for rows in grouped],
        drop_fraction=size.drop_fraction,
    )
    return pairs, counts


def align(modality: Any, run: Any, pairs: Sequence[Comparison]) -> Path:
    """Trains with a progress bar."""
    from mmalign.training.loop import train

    with stage("Training steps", run.max_train_steps) as advance:
        return train(run, modality=modality, comparisons=pairs, watch=lambda step, metrics: advance(1))


def main(output_dir: str, *, small: bool = False, seed: int = 0) -> None:
    """Runs everything; see `mmalign quickstart --help`.

    Raises:
        UserError: the output folder holds another run.
    """
    started = time.monotonic()
    quiet_libraries()
    from mmalign.data.importers import write_comparisons
    from mmalign.embedded import prompts as embedded_prompts
    from mmalign.evaluation.compare import score_sides
    from mmalign.recipe import load_recipe
    from mmalign.training import checkpoint
    from mmalign.training.views import WeightViews

    size = SMALL if small else Size()
    folder = Path(output_dir)
    recipe = load_recipe("embedded_diffusion_dpo")
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
    modality = mmalign.load(run.pretrained_model_name_or_path)
    pairs, counts = make_pairs(modality, size, seed)
    write_comparisons(folder / "pairs", pairs)
    print("Pairs: " + ", ".join(f"{count} {name}" for name, count in counts.items()) + ".", flush=True)
    align(modality, run, pairs)

    prompts = spread(embedded_prompts("test"), size.test_prompts, seed=0)
    seeds = list(range(len(prompts)))
    base, aligned = both_sides(modality, WeightViews(modality), prompts, seeds, **size.sampling)
    scorers = {name: mmalign.load_scorer(name) for name in ROLES}
    result = score_sides(prompts, base, aligned, scorers)
    seconds = time.monotonic() - started
    facts = {
        "model": "the embedded SDXL-architecture model",
        "objective": str(run.objective),
        "training": f"{steps} steps of {run.train_batch_size} pairs, lr {run.learning_rate}, LoRA rank {run.rank}",
        "pairs": f"{len(pairs)}; {size.candidates} candidates of {size.pair_prompts} prompts, by {TRAINING_SCORER}",
        "test prompts": f"{len(prompts)}, of combinations that no training saw",
        "sampling": f"{size.num_inference_steps} steps, guidance {size.guidance_scale}",
        "seed": seed,
        "took": f"{seconds:.0f} s",
    }
    report(
        folder,
        "Diffusion-DPO on the embedded model",
        result,
        prompts,
        base,
        aligned,
        run=run,
        facts=facts,
        roles=ROLES,
        headline=HELD_OUT_SCORER,
        count=len(pairs),
    )
    print(f"{seconds:.0f} s in all.")
