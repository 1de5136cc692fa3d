"""Does it matter that a sample's draws (timestep, noise) come round, as a cached reference needs it?

    python benchmarks/fixed_draws.py run --output DIR         # goes on where it was stopped
    python benchmarks/fixed_draws.py table --output DIR       # writes the table of fixed_draws.md to DIR/table.md

Diffusion-DPO on the embedded model as its recipe stands, 60 steps of 16 pairs, but with so few pairs that they are
gone through 15 times: with K fixed draws a sample a pair meets K different timesteps and noises, with fresh draws 15.
The pairs are the same for every K and seed; a seed orders them and draws. Runs with fixed draws read the reference's
answers from the cache. Judged on 120 development prompts, one picture each, the same start noise for base and all: the
recipe's settings were chosen on these prompts, and no test prompt is left that nobody has looked at.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from align_embedded import Judge, trained

import mmalign
from mmalign.commands import quiet_libraries
from mmalign.data.importers import write_comparisons
from mmalign.evaluation.compare import Result, pool
from mmalign.quickstart import make_pairs
from mmalign.recipe import load_recipe
from mmalign.storage import read_json, write_json
from mmalign.tasks import IMAGE
from mmalign.training.loop import versions

DRAWS = (1, 2, 4, 8, None)
SIZE = replace(IMAGE.size, pair_prompts=80)  # best and worst of four; a fifth, the closest, is dropped: 64 pairs
TRAINING_SCORER, HELD_OUT_SCORER, ALIGNMENT_SCORER = IMAGE.roles
LAST = 12  # steps, three epochs, over which training's figures are averaged
TRAINING = ("loss", "implicit_accuracy")


def run_all(arguments) -> None:
    """Every number of draws for every seed that has no record yet."""
    base = load_recipe("embedded_diffusion_dpo")
    data = arguments.output / "pairs"
    if not data.exists():
        pairs, counts = make_pairs(mmalign.load(base.pretrained_model_name_or_path), IMAGE, SIZE, seed=2000)
        write_comparisons(data, pairs)
        print(counts, flush=True)
    judge = Judge(IMAGE, "development", 120, SIZE, base.pretrained_model_name_or_path)
    base = replace(base, dataset_name=str(data), cache_dir=str(arguments.output / "cache"))
    for seed in arguments.seeds:
        for draws in arguments.draws:
            file = arguments.output / f"draws-{draws}-seed-{seed}.json"
            if file.exists():
                continue
            run = replace(base, seed=seed, draws_per_sample=draws, cache_reference=draws is not None)
            modality, seconds = trained(run, None, arguments.output / "run")
            lines = [json.loads(line) for line in (arguments.output / "run" / "metrics.jsonl").read_text().splitlines()]
            result = judge(modality)
            figures = {name: float(np.mean([row[name] for row in lines[-LAST:]])) for name in TRAINING}
            record = {"draws": draws, "seed": seed, "seconds": seconds, "versions": versions(), **figures}
            write_json(file, record | json.loads(result.to_json()))
            rates = {row.scorer: round(row.win_rate, 3) for row in result.rows(resamples=10)}
            print(f"{draws} draws, seed {seed}, {seconds:.0f} s: {rates} {figures}", flush=True)


def _result(record) -> Result:
    scores = {n: {side: np.array(v) for side, v in sides.items()} for n, sides in record["scores"].items()}
    return Result(tuple(record["prompts"]), scores)


def against(one: Result, other: Result) -> Result:
    """`one`'s aligned pictures beside `other`'s, same prompts, start noises and seeds."""
    sides = {n: {"base": other.scores[n]["aligned"], "aligned": scores["aligned"]} for n, scores in one.scores.items()}
    return Result(one.prompts, sides)


def table(arguments) -> None:
    """Seeds apart and pooled."""
    lines = [
        "| draws a sample | seed | n | training scorer, wins over base | held out, wins over base | text alignment,"
        " change | held out, wins over fresh draws | training scorer, wins over fresh draws | loss | implicit"
        " accuracy |",
        "| --- " * 10 + "|",
    ]
    records = {
        draws: [read_json(arguments.output / f"draws-{draws}-seed-{seed}.json") for seed in arguments.seeds]
        for draws in arguments.draws
    }
    fresh = [_result(record) for record in records[None]]
    for draws, several in records.items():
        results = [_result(record) for record in several]
        parts = [([record], result, other) for record, result, other in zip(several, results, fresh, strict=True)]
        for own, result, other in [*parts, (several, pool(results), pool(fresh))]:
            by = {row.scorer: row for row in result.rows()}
            beside = {row.scorer: row for row in against(result, other).rows()}
            text = by[ALIGNMENT_SCORER]
            cells = [
                "fresh" if draws is None else draws,
                own[0]["seed"] if len(own) == 1 else "**all**",
                text.n,
                *(rate(by[name]) for name in (TRAINING_SCORER, HELD_OUT_SCORER)),
                f"{text.change:+.3f} ({text.change_low:+.3f} to {text.change_high:+.3f})",
                *("" if draws is None else rate(beside[name]) for name in (HELD_OUT_SCORER, TRAINING_SCORER)),
                *(f"{np.mean([record[name] for record in own]):.3f}" for name in TRAINING),
            ]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    print("\n".join(lines))
    (arguments.output / "table.md").write_text("\n".join(lines) + "\n")


def rate(row) -> str:
    """Win rate with its interval."""
    return f"{row.win_rate:.1%} ({row.win_low:.1%} to {row.win_high:.1%})"


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["run", "table"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--draws", type=lambda text: int(text) or None, nargs="+", default=DRAWS, help="0 means fresh")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    quiet_libraries()
    {"run": run_all, "table": table}[arguments.stage](arguments)


if __name__ == "__main__":
    main()
