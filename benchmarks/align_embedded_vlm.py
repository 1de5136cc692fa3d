"""Does DPO make the embedded vision-language model say what it sees? As align_embedded.py, for answers.

    python benchmarks/align_embedded_vlm.py develop --output DIR --learning-rates 1e-3 --betas 0.1 --steps 30 60
    python benchmarks/align_embedded_vlm.py test --output DIR --seeds 0 1 2     # seeds can be shared out to processes
    python benchmarks/align_embedded_vlm.py table --output DIR

Two answers of the model to each of 320 pictures, the one with more right facts chosen (`captions.score`), no ties.
`embedded-clip`, made before and for other things, judges picture and answer without reading facts; `exact` says whether
an answer is the picture's caption word for word. Pictures of pairs, development and test share no combination of object
and ground, and no training saw development or test ones. Base and aligned answer the same pictures with the same seeds.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from align_embedded import trained
from PIL import Image

import mmalign
from mmalign.commands import quiet_libraries
from mmalign.console import stage
from mmalign.data.label import comparison
from mmalign.embedded import VLM_SAMPLING, captions, scenes
from mmalign.evaluation.compare import Result, pool
from mmalign.objectives import SFT
from mmalign.quickstart import spread
from mmalign.recipe import load_recipe
from mmalign.records import Comparison, Text
from mmalign.storage import read_json, write_json
from mmalign.training.loop import versions
from mmalign.training.views import WeightViews

PAIR_PICTURES, DEVELOPMENT_PICTURES, TEST_PICTURES = 320, 120, 400


def answers(modality: Any, shown: Sequence[scenes.Scene], seeds: Sequence[int], title: str = "Answers") -> list[Text]:
    """The model's answer to the question about every scene."""
    pictures = [(Image.fromarray(scenes.render(scene)),) for scene in shown]
    with stage(title, len(shown)) as advance:
        asked = [captions.QUESTION] * len(shown)
        return modality.generate(asked, seeds=seeds, images=pictures, progress=advance, **VLM_SAMPLING)


def make_pairs(modality: Any, count: int, seed: int, split: str = "pairs") -> tuple[list[Comparison], dict[str, int]]:
    """Two answers to each of `count` pictures of a split, the better one first; without those that score alike."""
    shown = spread(captions.described(split), count, seed)
    seeds = [1_000_000 * (seed + 1) + i for i in range(2 * count)]
    said = answers(modality, [scene for scene in shown for _ in range(2)], seeds, "Candidates")
    pairs = []
    for n, scene in enumerate(shown):
        rows = sorted((2 * n, 2 * n + 1), key=lambda row: -captions.score(said[row], scene))
        scores = [captions.score(said[row], scene) for row in rows]
        if scores[0] > scores[1]:
            sources = [f"{split} seed {seeds[row]}" for row in rows]
            picture = Image.fromarray(scenes.render(scene))
            asked = captions.QUESTION
            pairs.append(comparison(asked, [said[row] for row in rows], scores, sources, condition=(picture,)))
    return pairs, {"pictures": count, "ties": count - len(pairs), "kept": len(pairs)}


def judged(shown: Sequence[scenes.Scene], base: Sequence[str], aligned: Sequence[str]) -> Result:
    """What the three judges say of both sides; equal captions are one cluster."""
    clip, pictures = mmalign.load_scorer("embedded-clip"), [Image.fromarray(scenes.render(scene)) for scene in shown]
    judges = {
        "facts": lambda said: [captions.score(*row) for row in zip(said, shown, strict=True)],
        "embedded-clip": lambda said: clip.score(pictures, said).tolist(),
        "exact": lambda said: [captions.exact(*row) for row in zip(said, shown, strict=True)],
    }
    scores = {
        name: {side: np.array(judge(said), float) for side, said in (("base", base), ("aligned", aligned))}
        for name, judge in judges.items()
    }
    return Result(tuple(map(scenes.caption, shown)), scores)


HEADER = "| run | judge | n | win rate | 95 % | mean before | mean after | change, 95 % |\n" + "| --- " * 8 + "|"


def rows(name: str, result: Result) -> list[str]:
    """Table rows of one comparison."""
    return [
        f"| {name} | {r.scorer} | {r.n} | {r.win_rate:.1%} | {r.win_low:.1%} to {r.win_high:.1%} | {r.base_mean:.4g} |"
        f" {r.aligned_mean:.4g} | {r.change_low:+.3g} to {r.change_high:+.3g} |"
        for r in result.rows()
    ]


class Judge:
    """The base's answers to pictures of a split, made once, and the comparison of others with them."""

    def __init__(self, split: str, count: int, model: str):
        self.shown, self.seeds = captions.described(split)[:count], range(count)
        self.base = answers(mmalign.load(model), self.shown, self.seeds, "Base answers")

    def __call__(self, modality: Any) -> Result:
        """What the judges say of the policy."""
        with WeightViews(modality)("policy"):
            return judged(self.shown, self.base, answers(modality, self.shown, self.seeds, "Aligned answers"))


def develop(arguments, run) -> None:
    """Every combination of the given settings on development pictures, looked at after each of the given steps."""
    pairs, counts = make_pairs(mmalign.load(run.pretrained_model_name_or_path), PAIR_PICTURES, seed=1000)
    judge, last = Judge("development", DEVELOPMENT_PICTURES, run.pretrained_model_name_or_path), max(arguments.steps)
    print(counts, HEADER, sep="\n", flush=True)
    for rate, beta in itertools.product(arguments.learning_rates, arguments.betas):
        objective = replace(run.objective, beta=beta) if beta else SFT()
        tried = replace(run, objective=objective, learning_rate=rate, max_train_steps=last, checkpointing_steps=last)
        name = f"lr {rate:g}, {f'beta {beta:g}' if beta else 'SFT'}"

        def look(modality, step, name=name):
            if step in arguments.steps:
                print("\n".join(rows(f"{name}, {step} steps", judge(modality))), flush=True)

        trained(tried, pairs, arguments.output / "develop", look)


def test(arguments, run) -> None:
    """The recipe as it stands and SFT beside it, over seeds; the test pictures are looked at here alone."""
    judge = Judge("test", TEST_PICTURES, run.pretrained_model_name_or_path)
    for seed in arguments.seeds:
        pairs, counts = make_pairs(mmalign.load(run.pretrained_model_name_or_path), PAIR_PICTURES, seed)
        record = {"pairs": counts, "run": run.resolved(), "versions": versions()}
        for name, objective in (("DPO", run.objective), ("SFT", SFT())):
            folder = arguments.output / f"run-{seed}"
            modality, seconds = trained(replace(run, objective=objective, seed=seed), pairs, folder)
            result = judge(modality)
            record[name] = {"seconds": seconds, **json.loads(result.to_json())}
            print("\n".join(rows(f"{name}, seed {seed}", result)), flush=True)
        write_json(arguments.output / f"seed-{seed}.json", record)


def table(arguments, run) -> None:
    """Every seed that `test` wrote, and all of them pooled with a bootstrap over pictures."""
    records = {int(f.stem.split("-")[1]): read_json(f) for f in sorted(arguments.output.glob("seed-*.json"))}
    lines = [HEADER]
    for name in ("DPO", "SFT"):
        results = [
            Result(
                tuple(record[name]["prompts"]),
                {n: {side: np.array(v) for side, v in sides.items()} for n, sides in record[name]["scores"].items()},
            )
            for record in records.values()
        ]
        for seed, result in zip(records, results, strict=True):
            lines += rows(f"{name}, seed {seed}", result)
        lines += rows(f"**{name}, pooled**", pool(results))
    print("\n".join(lines))


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["develop", "test", "table"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--betas", type=float, nargs="+", default=[0.1], help="0 means SFT")
    parser.add_argument("--steps", type=int, nargs="+", default=[60])
    parser.add_argument("--model", help="another base than the embedded one")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    quiet_libraries()
    run = load_recipe("embedded_vlm_dpo")
    if arguments.model:
        run = replace(run, pretrained_model_name_or_path=arguments.model)
    {"develop": develop, "test": test, "table": table}[arguments.stage](arguments, run)


if __name__ == "__main__":
    main()
