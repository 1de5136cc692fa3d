"""All methods side by side on the embedded model: the same candidates and labels, the same number of training samples.

    python benchmarks/compare_methods.py develop --output DIR --methods MaPO InPO [--set objective.T=4000 ...]
    python benchmarks/compare_methods.py test --output DIR --seeds 0 1 2     # seeds can be shared out to processes
    python benchmarks/compare_methods.py memory --output DIR                 # after test: it takes seed 0's pairs
    python benchmarks/compare_methods.py table --output DIR                  # methods.md, methods.json, methods.png

A seed has its own 320 prompts with four candidates each, scored by embedded-hps. Pair methods get the best and the
worst of a prompt, RankDPO all four as a list; a step is 32 samples for each method, 60 steps. InPO and SmPO ask the
network more often, without gradient, to invert; the table shows it. PPD has one user here, whose taste is the scorer's
(several are in personal_embedded.py): embedded from four of the pairs, it trains user layers instead of a LoRA.
`develop` judges on 120 development prompts, `test` on the 320 test prompts that no earlier benchmark looked at, one
picture each, and 100 of them once more for the diversity. Training, development and test prompts share no combination
of object and ground.
"""

import argparse
import json
import resource
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import matplotlib
import numpy as np
import torch
from align_embedded import SCORERS, rows, trained

import mmalign
from mmalign.commands import quiet_libraries
from mmalign.data.importers import read_comparisons, write_comparisons
from mmalign.data.label import best_worst, ranked
from mmalign.data.users import Users, write_users
from mmalign.embedded import prompts as embedded_prompts
from mmalign.evaluation.compare import Result, pool, score_sides
from mmalign.evaluation.metrics import bootstrap_interval, colourfulness, wins
from mmalign.modalities.taste import embed
from mmalign.objectives import SFT
from mmalign.personal import load_encoder
from mmalign.quickstart import spread
from mmalign.recipe import load_recipe
from mmalign.storage import read_json, write_json
from mmalign.surrogate import FreshNoise
from mmalign.tasks import IMAGE
from mmalign.training.loop import versions
from mmalign.training.views import WeightViews

METHODS = {
    "DiffusionDPO": "embedded_diffusion_dpo",
    "MaPO": "embedded_mapo",
    "SmPO": "embedded_smpo",
    "InPO": "embedded_inpo",
    "RankDPO": "embedded_rankdpo",
    "PPD": "embedded_ppd",
    "SFT": "embedded_diffusion_dpo",
}
TRAINING_SCORER, HELD_OUT_SCORER, ALIGNMENT_SCORER = IMAGE.roles
FEATURES = {TRAINING_SCORER: "training scorer", HELD_OUT_SCORER: "held out", ALIGNMENT_SCORER: "text"}
SIZE = IMAGE.size


def recipe(method: str):
    """The method's run; SFT takes Diffusion-DPO's with the same draw."""
    run = load_recipe(METHODS[method])
    if method == "SFT":
        run = replace(run, objective=SFT(draw=FreshNoise(low=0.5)))
    # PPD's own recipe trains longer, for many users
    return replace(run, max_train_steps=60, checkpointing_steps=60)


def feedback(seed: int, folder: Path) -> tuple[list, list]:
    """Pairs and ranked lists of one seed's candidates; made once, and read again from `folder` afterwards."""
    files = [folder / f"pairs-{seed}", folder / f"lists-{seed}"]
    if not all(file.exists() for file in files):
        for file, made in zip(files, candidates(seed), strict=True):
            write_comparisons(file, made)
    pairs, lists = (list(read_comparisons(file).comparisons) for file in files)
    return pairs, lists


def candidates(seed: int) -> tuple[list, list]:
    """Pairs and ranked lists, anew."""
    prompts = spread(embedded_prompts("pairs"), SIZE.pair_prompts, seed)
    k = SIZE.candidates
    flat = [prompt for prompt in prompts for _ in range(k)]
    seeds = [1_000_000 * (seed + 1) + i for i in range(len(flat))]
    pictures = mmalign.load(load_recipe("embedded_diffusion_dpo").pretrained_model_name_or_path).generate(
        flat, seeds=seeds, **SIZE.sampling
    )
    scores = mmalign.load_scorer(TRAINING_SCORER).score(pictures, flat).tolist()
    parts = [slice(i * k, (i + 1) * k) for i in range(len(prompts))]
    media, scored = [pictures[part] for part in parts], [scores[part] for part in parts]
    sources = [[str(seed) for seed in seeds[part]] for part in parts]
    pairs, _ = best_worst(prompts, media, scored, sources=sources, drop_fraction=SIZE.drop_fraction)
    kept = {pair.prompt for pair in pairs}
    lists, _ = ranked(prompts, media, [scored], sources=sources)
    print(f"seed {seed}: {len(pairs)} pairs, scores {min(scores):.3f} to {max(scores):.3f}", flush=True)
    return pairs, [row for row in lists if row.prompt in kept]


def everybody(pairs: list, folder: Path) -> tuple[list, Path, torch.Tensor]:
    """The pairs as one user's, and that user's embedding from the first four, on the disk and as it is."""
    taste = load_encoder("embedded-clip", (), None, "mean")
    own = [replace(pair, user="everybody") for pair in pairs]
    vector = embed(own[:4], taste)
    file = folder / "everybody.safetensors"
    write_users(file, Users({"everybody": vector}, taste.facts))
    return own, file, vector


class Judge:
    """The base's pictures of a split, made once, and what can be said of others beside them."""

    def __init__(self, prompts: list[str], twice: int):
        # The first `twice` prompts come a second time, with another seed
        self.count, self.twice = len(prompts), twice
        self.prompts = prompts + prompts[:twice]
        self.settings = {"seeds": list(range(len(self.prompts))), **SIZE.sampling}
        self.scorers = {name: mmalign.load_scorer(name) for name in SCORERS}
        model = load_recipe("embedded_diffusion_dpo").pretrained_model_name_or_path
        self.base = mmalign.load(model).generate(self.prompts, **self.settings)
        self.base_embeddings, self.base_diversity = self.look(self.base)

    def look(self, pictures) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings, and the distance between the two pictures of each prompt that was drawn twice."""
        found = self.scorers[ALIGNMENT_SCORER].features(pictures, ())[0].double().numpy()
        return found, 1 - (found[: self.twice] * found[self.count :]).sum(1)

    def __call__(self, modality, user: torch.Tensor | None = None) -> tuple[Result, dict]:
        """Scores of both sides, and per-picture distance from the base, diversity and colourfulness."""
        told = {} if user is None else {"user": user.repeat(len(self.prompts), 1)}
        with WeightViews(modality)("policy"):
            pictures = modality.generate(self.prompts, **self.settings, **told)
        n = self.count
        result = score_sides(self.prompts[:n], self.base[:n], pictures[:n], self.scorers)
        embeddings, diversity = self.look(pictures)
        colour = wins(*([colourfulness(p) for p in side[:n]] for side in (self.base, pictures)))
        pixels = [
            np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() / 255
            for a, b in zip(self.base[:n], pictures, strict=False)
        ]
        return result, {
            "distance": (1 - (embeddings[:n] * self.base_embeddings[:n]).sum(1)).tolist(),
            "pixels": pixels,
            "diversity": diversity.tolist(),
            "base_diversity": self.base_diversity.tolist(),
            "colourfulness_win": float(colour.mean()),
        }


def develop(arguments) -> None:
    """Recipes as they stand, or with fields changed, on development prompts."""
    pairs, lists = feedback(1000, arguments.output)
    judge = Judge(spread(embedded_prompts("development"), 120, seed=0), twice=20)
    for method in arguments.methods:
        run = recipe(method)
        for setting in arguments.set:
            name, _, value = setting.partition("=")
            value = json.loads(value)
            if name.startswith("draw."):
                draw = replace(run.objective.draw, **{name.removeprefix("draw."): value})
                run = replace(run, objective=replace(run.objective, draw=draw))
            elif name.startswith("objective."):
                run = replace(run, objective=replace(run.objective, **{name.removeprefix("objective."): value}))
            else:
                run = replace(run, **{name: value})
        last = max(arguments.steps)
        run = replace(run, max_train_steps=last, checkpointing_steps=last)

        def look(modality, step, method=method):
            if step in arguments.steps:
                result, more = judge(modality)
                label = f"{method} {' '.join(arguments.set)} {step} steps"
                print("\n".join(rows(label, result, more["colourfulness_win"])), flush=True)

        _, seconds = trained(run, lists if method == "RankDPO" else pairs, arguments.output / method, look)
        print(f"{seconds:.0f} s", flush=True)


def test(arguments) -> None:
    """Every method as its recipe stands, for each seed; the test prompts are looked at here alone."""
    seen = set(spread(embedded_prompts("test"), 400, seed=0))  # by align_embedded.py
    unseen = [prompt for prompt in spread(embedded_prompts("test"), 720, seed=0) if prompt not in seen]
    judge = Judge(unseen, twice=100)
    for seed in arguments.seeds:
        pairs, lists = feedback(seed, arguments.output)
        for method in arguments.methods:
            run, data, user = replace(recipe(method), seed=seed), lists if method == "RankDPO" else pairs, None
            if method == "PPD":
                data, file, user = everybody(pairs, arguments.output)
                run = replace(run, users=str(file))
            modality, seconds = trained(run, data, arguments.output / f"run-{method}-{seed}")
            result, more = judge(modality, user)
            record = {
                "run": {k: v for k, v in run.resolved().items() if k not in ("pretrained_model_name_or_path", "users")},
                "data": len(data),
                "seconds": seconds,
                "versions": versions(),
                **more,
                **json.loads(result.to_json()),
            }
            write_json(arguments.output / f"{method}-{seed}.json", record)
            print("\n".join(rows(f"{method}, seed {seed}", result, more["colourfulness_win"])), flush=True)


def memory(arguments) -> None:
    """Peak memory of three steps of each method, each in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as workers:
        peaks = dict(
            zip(arguments.methods, workers.map(peak, arguments.methods, repeat(arguments.output)), strict=True)
        )
    print(peaks)
    write_json(arguments.output / "memory.json", peaks)


def peak(method: str, folder: Path) -> float:
    """GiB that a process held at most; pairs and lists must have been made."""
    pairs, lists = feedback(0, folder)
    run, data = recipe(method), lists if method == "RankDPO" else pairs
    if method == "PPD":
        data, file, _ = everybody(pairs, folder)
        run = replace(run, users=str(file))
    trained(replace(run, max_train_steps=3, checkpointing_steps=3), data, folder / "memory")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _result(record) -> Result:
    scores = {n: {side: np.array(v) for side, v in sides.items()} for n, sides in record["scores"].items()}
    return Result(tuple(record["prompts"]), scores)


def interval(values, prompts) -> str:
    """Mean and 95 % bootstrap over prompts."""
    low, high = bootstrap_interval(values, clusters=prompts)
    return f"{np.mean(values):.4f} ({low:.4f} to {high:.4f})"


def table(arguments) -> None:
    """Every seed and all pooled."""
    found = {method: sorted(arguments.output.glob(f"{method}-[0-9]*.json")) for method in METHODS}
    records = {method: [read_json(file) for file in files] for method, files in found.items() if files}
    pooled = {method: pool([_result(record) for record in several]) for method, several in records.items()}
    lines = [
        "| method | seed | n | training scorer | held out | change of text alignment | distance from base | diversity /"
        " base's | network calls a step | train s | peak GiB |",
        "| --- " * 11 + "|",
    ]
    peaks = read_json(arguments.output / "memory.json")
    figures = {"versions": next(iter(records.values()))[0]["versions"], "methods": {}}
    for method, several in records.items():
        singles = [(str(record["run"]["seed"]), _result(record), [record]) for record in several]
        for seed, result, own in [*singles, ("**all**", pooled[method], several)]:
            by = {row.scorer: row for row in result.rows()}
            hps, held, text = (by[name] for name in FEATURES)
            distance = [value for record in own for value in record["distance"]]
            ratio = np.mean([record["diversity"] for record in own]) / np.mean([r["base_diversity"] for r in own])
            inversion = own[0]["run"]["objective"].get("draw") or ""
            steps = 5 if "DDIMInversion" in inversion else 10 if "ReNoise" in inversion else 0
            views = 1 if method in ("SFT", "MaPO") else 2
            lines.append(
                f"| {method} | {seed} | {hps.n} | {hps.win_rate:.1%} ({hps.win_low:.1%} to {hps.win_high:.1%}) |"
                f" {held.win_rate:.1%} ({held.win_low:.1%} to {held.win_high:.1%}) |"
                f" {text.change_low:+.3f} to {text.change_high:+.3f} | {interval(distance, result.prompts)} |"
                f" {ratio:.3f} | {views + steps} | {np.mean([record['seconds'] for record in own]):.0f} |"
                f" {peaks[method]:.2f} |"
            )
            figures["methods"].setdefault(method, {"run": own[0]["run"]})[seed.strip("*")] = {
                "rows": [row._asdict() for row in result.rows()],
                "distance": float(np.mean(distance)),
                "diversity_ratio": float(ratio),
                "seconds": [record["seconds"] for record in own],
                "colourfulness_win": float(np.mean([record["colourfulness_win"] for record in own])),
            }
    print("\n".join(lines))
    (arguments.output / "methods.md").write_text("\n".join(lines) + "\n")
    write_json(arguments.output / "methods.json", figures)
    plot(pooled, records, arguments.output / "methods.png")


def plot(pooled, records, file: Path) -> None:
    """Win rates under both scorers and the change of text alignment, 95 % intervals, every seed as a dot."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), sharey=True)
    names = list(pooled)
    for axis, (scorer, title) in zip(axes, FEATURES.items(), strict=True):
        for y, method in enumerate(names):
            results = [pooled[method], *(_result(record) for record in records[method])]
            for place, result in enumerate(results):
                row = next(row for row in result.rows() if row.scorer == scorer)
                value, low, high = (
                    (row.change, row.change_low, row.change_high)
                    if scorer == ALIGNMENT_SCORER
                    else (row.win_rate, row.win_low, row.win_high)
                )
                if place:
                    axis.plot(value, y + 0.25, ".", color="#999", markersize=5)
                else:
                    axis.errorbar(value, y, xerr=[[value - low], [high - value]], fmt="o", color="#0a7d4b", capsize=3)
        axis.axvline(0 if scorer == ALIGNMENT_SCORER else 0.5, color="#ccc", zorder=0)
        axis.set_title("change of text alignment" if scorer == ALIGNMENT_SCORER else f"win rate, {title}")
        axis.set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["develop", "test", "memory", "table"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, nargs="+", default=[60])
    parser.add_argument("--set", nargs="+", default=[], help="field=value, objective.field=value or draw.field=value")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    quiet_libraries()
    {"develop": develop, "test": test, "memory": memory, "table": table}[arguments.stage](arguments)


if __name__ == "__main__":
    main()
