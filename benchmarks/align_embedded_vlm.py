"""Does DPO make the embedded vision-language model say what it sees? As align_embedded.py, for answers.

    python benchmarks/align_embedded_vlm.py develop --output DIR --learning-rates 1e-3 --betas 0.1 --steps 30 60
    python benchmarks/align_embedded_vlm.py test --output DIR --seeds 0 1 2     # seeds can be shared out to processes
    python benchmarks/align_embedded_vlm.py table --output DIR

Pairs are the best and the worst of four answers of the model to each of 320 pictures, by facts (`captions.score`).
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

import make_embedded_vlm
import numpy as np
import torch
from align_embedded import trained
from PIL import Image

import mmalign
from mmalign.commands import quiet_libraries
from mmalign.data.label import comparison, extremes, margin
from mmalign.embedded import captions, scenes
from mmalign.evaluation.compare import Result, pool
from mmalign.objectives import SFT
from mmalign.quickstart import spread
from mmalign.recipe import load_recipe
from mmalign.records import Comparison, Text
from mmalign.storage import read_json, write_json
from mmalign.training.loop import versions
from mmalign.training.views import WeightViews

PAIR_PICTURES, CANDIDATES, DEVELOPMENT_PICTURES, TEST_PICTURES = 320, 4, 200, 400


def answers(modality: Any, shown: Sequence[scenes.Scene], seed: int) -> list[Text]:
    """Answers at temperature 1 in batches: as `modality.generate` draws them, but with one seed for all."""
    return list(map(Text, make_embedded_vlm.answers(modality.unwrapped, modality.processor, list(shown), seed)))


def make_pairs(modality: Any, count: int, seed: int, split: str = "pairs") -> tuple[list[Comparison], dict[str, int]]:
    """The best and the worst of some answers to each of `count` pictures of a split, if they do not score alike."""
    shown = spread(captions.described(split), count, seed)
    said = answers(modality, [scene for scene in shown for _ in range(CANDIDATES)], 1_000_000 * (seed + 1))
    pairs = []
    for n, scene in enumerate(shown):
        mine = said[n * CANDIDATES : (n + 1) * CANDIDATES]
        scores = [captions.score(answer, scene) for answer in mine]
        places = extremes(scores)
        if margin(scores) > 0:
            both = [mine[place] for place in places], [scores[place] for place in places]
            sources = [f"{split} seed {seed} picture {n} answer {place}" for place in places]
            picture = Image.fromarray(scenes.render(scene))
            pairs.append(comparison(captions.QUESTION, *both, sources, condition=(picture,)))
    return pairs, {"pictures": count, "ties": count - len(pairs), "kept": len(pairs)}


def judged(shown: Sequence[scenes.Scene], base: Sequence[str], aligned: Sequence[str]) -> Result:
    """What the three judges say of both sides; equal captions are one cluster."""
    clip, pictures = mmalign.load_scorer("embedded-clip"), [Image.fromarray(scenes.render(scene)) for scene in shown]
    judges = {
        "facts": lambda said: [captions.score(*row) for row in zip(said, shown, strict=True)],
        "embedded-clip": lambda said: clip.score(pictures, said).tolist(),
        "exact": lambda said: [captions.exact(*row) for row in zip(said, shown, strict=True)],
        "fluent": lambda said: [captions.fluent(*row) for row in zip(said, shown, strict=True)],
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
        self.shown = captions.described(split)[:count]
        self.base = answers(mmalign.load(model), self.shown, seed=0)

    def __call__(self, modality: Any) -> Result:
        """What the judges say of the policy."""
        with WeightViews(modality)("policy"):
            return judged(self.shown, self.base, answers(modality, self.shown, seed=0))


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
    """The recipe as it stands, or SFT on the chosen answers, over seeds; the test pictures are looked at here alone."""
    judge = Judge("test", TEST_PICTURES, run.pretrained_model_name_or_path)
    for seed in arguments.seeds:
        pairs, counts = make_pairs(mmalign.load(run.pretrained_model_name_or_path), PAIR_PICTURES, seed)
        for name in arguments.methods:
            aligned = replace(run, objective=run.objective if name == "DPO" else SFT(), seed=seed)
            modality, seconds = trained(aligned, pairs, arguments.output / f"run-{seed}")
            result = judge(modality)
            print("\n".join(rows(f"{name}, seed {seed}", result)), flush=True)
            record = {"pairs": counts, "seconds": seconds, "run": aligned.resolved(), "versions": versions()}
            write_json(arguments.output / f"{name}-{seed}.json", {**record, **json.loads(result.to_json())})


def table(arguments, run) -> None:
    """Every seed that `test` wrote, and all of them pooled with a bootstrap over pictures."""
    print(HEADER)
    for name in arguments.methods:
        files = sorted(arguments.output.glob(f"{name}-*.json"))
        results = [_result(read_json(file)) for file in files]
        for file, result in zip(files, results, strict=True):
            print("\n".join(rows(file.stem.replace("-", ", seed "), result)))
        print("\n".join(rows(f"**{name}, pooled**", pool(results))))


def _result(record: dict[str, Any]) -> Result:
    scores = {n: {side: np.array(v) for side, v in sides.items()} for n, sides in record["scores"].items()}
    return Result(tuple(record["prompts"]), scores)


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["develop", "test", "table"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=["DPO", "SFT"], choices=["DPO", "SFT"])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--betas", type=float, nargs="+", default=[0.1], help="0 means SFT")
    parser.add_argument("--steps", type=int, nargs="+", default=[60])
    parser.add_argument("--model", help="another base than the embedded one")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    quiet_libraries()
    run = load_recipe("embedded_vlm_dpo")
    if arguments.model:
        run = replace(run, pretrained_model_name_or_path=arguments.model)
    {"develop": develop, "test": test, "table": table}[arguments.stage](arguments, run)


if __name__ == "__main__":
    main()
