"""Does quickstart's alignment work? Settings chosen on development prompts, the test set looked at once.

    python benchmarks/align_embedded.py develop --output DIR --learning-rates 3e-4 1e-3 --betas 1000 3000 --steps 60 120
    python benchmarks/align_embedded.py test --output DIR --seeds 0 1 2 3 4     # seeds can be shared out to processes
    python benchmarks/align_embedded.py table --output DIR

With `--modality audio` or `vlm` the same for the other embedded models (mmalign/tasks.py).
`develop` tries every combination on 120 development prompts and prints a row for each. `test` runs the recipe as it
stands (recipes/embedded_diffusion_dpo.py) and SFT on the winners with the same settings, for every seed: own
candidates, own pairs, own training; 400 test prompts, one medium each, the same start noise for base and all. `table`
shows every seed and all of them pooled, and writes test.md and test.json.
Training, development and test prompts share no combination of what they speak of (mmalign/embedded/).
"""

import argparse
import itertools
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

import mmalign
from mmalign.commands import quiet_libraries
from mmalign.data.importers import read_comparisons, write_comparisons
from mmalign.evaluation.compare import Result, pool
from mmalign.evaluation.metrics import colourfulness
from mmalign.media import sound_of
from mmalign.objectives import SFT
from mmalign.quickstart import judged, make_pairs, settings_of, spread
from mmalign.recipe import load_recipe
from mmalign.storage import read_json, write_json
from mmalign.surrogate import FreshNoise
from mmalign.tasks import AUDIO, IMAGE, TASKS, Size, Task
from mmalign.training.loop import train, versions
from mmalign.training.views import WeightViews

HEADER = "| run | judge | n | win rate | 95 % | mean before | mean after | change, 95 % |\n" + "| --- " * 8 + "|"


def rows(name: str, result) -> list[str]:
    """Table rows of one comparison."""
    return [
        f"| {name} | {r.scorer} | {r.n} | {r.win_rate:.1%} | {r.win_low:.1%} to {r.win_high:.1%} | {r.base_mean:.4g} |"
        f" {r.aligned_mean:.4g} | {r.change_low:+.3g} to {r.change_high:+.3g} |"
        for r in result.rows()
    ]


def loudness(sound) -> float:
    """Of the whole sound, in dB below a full-scale square wave."""
    return 10 * float(np.log10(np.square(sound_of(sound, sound.sample_rate_hz)[0]).mean() + 1e-9))


class Judge:
    """The base's media of a split, made once, and what the judges say of others beside them."""

    def __init__(self, task: Task, split: str, count: int, size: Size, model: str):
        self.asked = spread(task.asked(split), count, seed=0)  # a split with fewer prompts goes round: clusters
        self.settings = {"seeds": list(range(count)), **settings_of(self.asked, size)}
        self.judges = task.judges()
        if task is IMAGE:
            self.judges["colourfulness"] = lambda media, asked: [colourfulness(picture) for picture in media]
        if task is AUDIO:
            self.judges["loudness_db"] = lambda media, asked: [loudness(sound) for sound in media]
        self.base = self._made(mmalign.load(model))

    def _made(self, modality) -> list:
        return modality.generate([one.text for one in self.asked], **self.settings)

    def __call__(self, modality) -> Result:
        """The policy beside the base."""
        with WeightViews(modality)("policy"):
            return judged(self.asked, self.base, self._made(modality), self.judges)


def trained(run, pairs, folder: Path, watch=None):
    """The modality after a fresh run, and the seconds it took; `watch(modality, step)` is called after every step."""
    shutil.rmtree(folder, ignore_errors=True)
    modality = mmalign.load(run.pretrained_model_name_or_path)
    started = time.monotonic()
    told = (lambda step, metrics: watch(modality, step)) if watch else None
    train(replace(run, output_dir=str(folder)), modality=modality, comparisons=pairs, watch=told)
    return modality, time.monotonic() - started


def develop(arguments, run, task: Task) -> None:
    """Every combination of the given settings on development prompts, looked at after each of the given steps."""
    folder = arguments.output / "pairs"
    if not folder.exists():
        pairs, counts = make_pairs(mmalign.load(run.pretrained_model_name_or_path), task, task.size, seed=1000)
        write_comparisons(folder, pairs)
        print(counts, flush=True)
    pairs = read_comparisons(folder).comparisons
    judge = Judge(task, "development", 120, task.size, run.pretrained_model_name_or_path)
    last = max(arguments.steps)
    for rate, beta in itertools.product(arguments.learning_rates, arguments.betas):
        draw = run.objective.draw if arguments.low is None else FreshNoise(low=arguments.low)
        objective = replace(run.objective, beta=beta, draw=draw) if beta else SFT(draw=draw)
        tried = replace(run, objective=objective, learning_rate=rate, max_train_steps=last, checkpointing_steps=last)
        name = f"lr {rate:g}, {f'beta {beta:g}' if beta else 'SFT'}" + (f", low {draw.low:g}" if draw else "")

        def look(modality, step, name=name):
            if step in arguments.steps:
                print("\n".join(rows(f"{name}, {step} steps", judge(modality))), flush=True)

        trained(tried, pairs, arguments.output / name.replace(" ", "-"), look)


def test(arguments, run, task: Task) -> None:
    """The recipe as it stands and SFT beside it, over seeds; the test prompts are looked at here alone."""
    judge = Judge(task, "test", 400, task.size, run.pretrained_model_name_or_path)
    for seed in arguments.seeds:
        pairs, counts = make_pairs(mmalign.load(run.pretrained_model_name_or_path), task, task.size, seed)
        record = {"pairs": counts, "run": run.resolved(), "versions": versions()}
        for name, objective in (("DPO", run.objective), ("SFT", SFT(draw=run.objective.draw))):
            folder = arguments.output / f"run-{seed}"
            modality, seconds = trained(replace(run, objective=objective, seed=seed), pairs, folder)
            result = judge(modality)
            record[name] = {"seconds": seconds, **json.loads(result.to_json())}
            print("\n".join(rows(f"{name}, seed {seed}", result)), flush=True)
        write_json(arguments.output / f"seed-{seed}.json", record)


def table(arguments, run, task: Task) -> None:
    """Every seed that `test` wrote, and all of them pooled with a bootstrap over prompts."""
    records = {int(f.stem.split("-")[1]): read_json(f) for f in sorted(arguments.output.glob("seed-*.json"))}
    lines, figures = [HEADER], {"seeds": sorted(records)}
    for name in ("DPO", "SFT"):
        results = {seed: _result(record[name]) for seed, record in sorted(records.items())}
        for seed, result in results.items():
            lines += rows(f"{name}, seed {seed}", result)
        pooled = pool(list(results.values()))
        lines += rows(f"**{name}, pooled**", pooled)
        for label, result in [*((f"{name} seed {seed}", result) for seed, result in results.items()), (name, pooled)]:
            figures[label] = [row._asdict() for row in result.rows()]
    any_record = next(iter(records.values()))
    settings = {name: value for name, value in any_record["run"].items() if name != "pretrained_model_name_or_path"}
    figures |= {"run": settings, "versions": any_record["versions"]}
    print("\n".join(lines))
    (arguments.output / "test.md").write_text("\n".join(lines) + "\n")
    write_json(arguments.output / "test.json", figures)


def _result(record) -> Result:
    scores = {n: {side: np.array(v) for side, v in sides.items()} for n, sides in record["scores"].items()}
    return Result(tuple(record["prompts"]), scores)


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["develop", "test", "table"])
    parser.add_argument("--modality", choices=list(TASKS), default="image")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[5e-4])
    parser.add_argument("--betas", type=float, nargs="+", default=[2000], help="0 means SFT")
    parser.add_argument("--steps", type=int, nargs="+", default=[120])
    parser.add_argument("--low", type=float, help="leave out this share of the cleanest timesteps")
    parser.add_argument("--model", help="another base than the embedded one")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    quiet_libraries()
    task = TASKS[arguments.modality]
    run = load_recipe(task.recipe)
    if arguments.model:
        run = replace(run, pretrained_model_name_or_path=arguments.model)
    {"develop": develop, "test": test, "table": table}[arguments.stage](arguments, run, task)


if __name__ == "__main__":
    main()
