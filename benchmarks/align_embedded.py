"""Does quickstart's alignment work? Settings chosen on development prompts, the test set looked at once.

    python benchmarks/align_embedded.py develop --output DIR --learning-rates 3e-4 1e-3 --betas 1000 3000 --steps 60 120
    python benchmarks/align_embedded.py test --output DIR --seeds 0 1 2 3 4

`develop` tries every combination on 120 development prompts and prints a row for each. `test` runs the recipe as it
stands (recipes/embedded_diffusion_dpo.py) and SFT on the winners with the same settings, for every seed: own
candidates, own pairs, own training; 400 test prompts, one picture each, the same start noise for base and all. Every
seed is a row, then all seeds pooled with a bootstrap over prompts. Writes DIR/NAME.json and DIR/NAME.md.
Training, development and test prompts share no combination of object and ground (mmalign/embedded/scenes.py).
"""

import argparse
import itertools
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import mmalign
from mmalign.commands import quiet_libraries
from mmalign.embedded import prompts as embedded_prompts
from mmalign.evaluation.compare import pool, score_sides
from mmalign.evaluation.metrics import colourfulness, wins
from mmalign.objectives import SFT
from mmalign.quickstart import ALIGNMENT_SCORER, HELD_OUT_SCORER, TRAINING_SCORER, Size, make_pairs, spread
from mmalign.recipe import load_recipe
from mmalign.training.loop import train
from mmalign.training.views import WeightViews

SCORERS = (TRAINING_SCORER, HELD_OUT_SCORER, ALIGNMENT_SCORER)
HEADER = (
    "| run | scorer | n | win rate | 95 % | mean before | mean after | change, 95 % | colourfulness win |\n"
    + "| --- " * 9
    + "|"
)


def rows(name: str, result, colour: float) -> list[str]:
    """Table rows of one comparison."""
    return [
        f"| {name} | {r.scorer} | {r.n} | {r.win_rate:.1%} | {r.win_low:.1%} to {r.win_high:.1%} | {r.base_mean:.4g} |"
        f" {r.aligned_mean:.4g} | {r.change_low:+.3g} to {r.change_high:+.3g} | {colour:.1%} |"
        for r in result.rows()
    ]


class Judge:
    """The base's pictures of a split, made once, and what the scorers say of others beside them."""

    def __init__(self, split: str, count: int, steps: int, model: str):
        self.prompts = spread(embedded_prompts(split), count, seed=0)
        assert len(set(self.prompts)) == count, f"{split} has fewer than {count} prompts"
        self.settings = {"seeds": list(range(count)), "num_inference_steps": steps, "batch_size": 40}
        self.scorers = {name: mmalign.load_scorer(name) for name in SCORERS}
        self.base = mmalign.load(model).generate(self.prompts, **self.settings)

    def __call__(self, modality):
        """Result and the share of pictures that became more colourful."""
        with WeightViews(modality)("policy"):
            pictures = modality.generate(self.prompts, **self.settings)
        result = score_sides(self.prompts, self.base, pictures, self.scorers)
        return result, wins([colourfulness(p) for p in self.base], [colourfulness(p) for p in pictures]).mean()


def trained(run, pairs, folder: Path):
    """The modality after a fresh run."""
    shutil.rmtree(folder, ignore_errors=True)
    modality = mmalign.load(run.pretrained_model_name_or_path)
    started = time.monotonic()
    train(replace(run, output_dir=str(folder)), modality=modality, comparisons=pairs)
    return modality, time.monotonic() - started


def develop(arguments, run, size: Size) -> None:
    """Every combination of the given settings on development prompts."""
    pairs, counts = make_pairs(mmalign.load(run.pretrained_model_name_or_path), size, seed=1000)
    print(counts, flush=True)
    judge = Judge("development", 120, size.num_inference_steps, run.pretrained_model_name_or_path)
    lines = [HEADER]
    for rate, beta, steps in itertools.product(arguments.learning_rates, arguments.betas, arguments.steps):
        objective = replace(run.objective, beta=beta) if beta else SFT()
        tried = replace(run, objective=objective, learning_rate=rate, max_train_steps=steps, checkpointing_steps=steps)
        modality, seconds = trained(tried, pairs, arguments.output / "run")
        name = f"lr {rate:g}, {f'beta {beta:g}' if beta else 'SFT'}, {steps} steps ({seconds:.0f} s)"
        new = rows(name, *judge(modality))
        print("\n".join(new), flush=True)
        lines += new
        (arguments.output / "develop.md").write_text("\n".join(lines) + "\n")


def test(arguments, run, size: Size) -> None:
    """The recipe as it stands and SFT beside it, over seeds; the test prompts are looked at here alone."""
    judge = Judge("test", 400, size.num_inference_steps, run.pretrained_model_name_or_path)
    found: dict[str, list] = {"DPO": [], "SFT": []}
    lines, record = [HEADER], {}
    for seed in arguments.seeds:
        pairs, counts = make_pairs(mmalign.load(run.pretrained_model_name_or_path), size, seed)
        for name, objective in (("DPO", run.objective), ("SFT", SFT())):
            modality, seconds = trained(replace(run, objective=objective, seed=seed), pairs, arguments.output / "run")
            result, colour = judge(modality)
            found[name].append((result, colour))
            record[f"{name} seed {seed}"] = {
                "pairs": counts,
                "seconds": seconds,
                "colourfulness_win": colour,
                "rows": [row._asdict() for row in result.rows()],
            }
            lines += rows(f"{name} seed {seed}", result, colour)
            print("\n".join(lines[-3:]), flush=True)
    for name, results in found.items():
        pooled, colour = pool([result for result, _ in results]), sum(c for _, c in results) / len(results)
        lines += rows(f"**{name} pooled**", pooled, colour)
        record[f"{name} pooled"] = {"colourfulness_win": colour, "rows": [row._asdict() for row in pooled.rows()]}
    print("\n".join(lines[-6:]))
    (arguments.output / "test.md").write_text("\n".join(lines) + "\n")
    (arguments.output / "test.json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["develop", "test"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[5e-4])
    parser.add_argument("--betas", type=float, nargs="+", default=[2000], help="0 means SFT")
    parser.add_argument("--steps", type=int, nargs="+", default=[120])
    parser.add_argument("--model", help="another base than the embedded one")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    quiet_libraries()
    run = load_recipe("embedded_diffusion_dpo")
    if arguments.model:
        run = replace(run, pretrained_model_name_or_path=arguments.model)
    (develop if arguments.stage == "develop" else test)(arguments, run, Size())


if __name__ == "__main__":
    main()
