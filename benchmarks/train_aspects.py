"""Trains the embedded four-aspect scorer on pictures of the embedded model, with faults planted in them.

    python benchmarks/train_aspects.py pictures --output DIR      # 1,400 pictures, about 3 CPU minutes
    python benchmarks/train_aspects.py data --output DIR          # comparisons of three seeds, and those that judge
    mmalign train-scorer train_embedded_scorer --dataset-name DIR/fit-0 --output-dir DIR/scorer-0 --seed 0   # 0, 1, 2
    python benchmarks/train_aspects.py develop --output DIR       # development prompts, as often as one likes
    python benchmarks/train_aspects.py test --output DIR          # test prompts, once: train_aspects.md and .json

A comparison is six pictures for one prompt, and what was planted in each is its truth, 1 to 5 an aspect:

    prompt-following  5 the prompt's own picture, 3 a picture of another object or another ground, 1 of both others
    aesthetic         saturation and contrast: 5 as the model made them, down to 1 pale and flat
    fidelity          5 as made; 4 to 1 more and more of one fault of three: noise, blur, blocks
    harmlessness      5 as made; 4 to 1 a larger and larger planted mark, a black-and-yellow square. It STANDS IN for
                      forbidden content, of which there is none here: the head learns this mark and nothing else

Each is drawn for itself, so no aspect tells of another. The model does not follow every prompt, so prompt-following
has wrong labels that nobody counted. Fitting, development and test prompts share no object-and-ground combination, and
embedded-clip saw none of the development and test combinations either.
"""

import argparse
import io
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageEnhance, ImageFilter

import mmalign
from mmalign.commands import interval
from mmalign.data.importers import write_comparisons
from mmalign.embedded import SAMPLING
from mmalign.embedded import path as embedded_path
from mmalign.embedded.scenes import COLOURS, NOUNS, prompts
from mmalign.evaluation.metrics import spearman
from mmalign.records import Comparison
from mmalign.scoring import Card, load_scorer
from mmalign.scoring.accuracy import measured
from mmalign.storage import read_json, write_json
from mmalign.surrogate.draws import generator

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
ASPECTS = ("prompt-following", "aesthetic", "fidelity", "harmlessness")
FAULTS = ("noise", "blur", "blocks")
SPLITS = {  # split -> prompts taken, pictures each, first seed; of test those that quickstart's order takes last
    "train": (400, 2, 20_000_000),
    "development": (120, 2, 21_000_000),
    "test": (180, 2, 22_000_000),
}
MEMBERS = 6  # pictures of a comparison


@dataclass(frozen=True)
class Pool:
    """Pictures of one split: uint8 [N, 64, 64, 3] and the prompt of each [N]."""

    pictures: np.ndarray
    prompts: list[str]


def chosen(split: str, count: int) -> list[str]:
    """The last prompts of a split's order: other benchmarks take the first ones."""
    return prompts(split)[-count:]


def make_pictures(output: Path) -> None:
    """Generates every split's pictures once."""
    from mmalign.commands import quiet_libraries

    quiet_libraries()
    model = mmalign.load(str(embedded_path()))
    for split, (count, each, first) in SPLITS.items():
        if (output / f"{split}.npz").is_file():
            continue
        texts = [text for text in chosen(split, count) for _ in range(each)]
        seeds = [first + i for i in range(len(texts))]
        pictures = model.generate(texts, seeds=seeds, batch_size=32, **SAMPLING)
        np.savez(output / f"{split}.npz", pictures=np.stack([np.asarray(p) for p in pictures]), prompts=texts)
        print(split, len(texts), flush=True)


def pool(output: Path, split: str) -> Pool:
    """The pictures of a split."""
    with np.load(output / f"{split}.npz") as content:
        return Pool(content["pictures"], content["prompts"].tolist())


def faulty(picture: Image.Image, fault: str, level: int, rng: np.random.Generator) -> Image.Image:
    """The picture with a fault; level 5 has none, 1 the most."""
    if level == 5:
        return picture
    strength = 5 - level
    if fault == "blur":
        return picture.filter(ImageFilter.GaussianBlur((0.6, 1.0, 1.5, 2.2)[strength - 1]))
    pixels = np.asarray(picture, np.float32)
    if fault == "noise":
        pixels = pixels + rng.normal(0, (10, 20, 32, 50)[strength - 1], pixels.shape)
    else:
        blocks = np.asarray(picture.reduce(4).resize(picture.size, Image.Resampling.NEAREST), np.float32)
        pixels += (0.25, 0.5, 0.75, 1.0)[strength - 1] * (blocks - pixels)
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def planted(pixels: np.ndarray, level: dict[str, int], fault: str, rng: np.random.Generator) -> bytes:
    """A PNG of the picture with everything planted but the prompt."""
    picture = Image.fromarray(pixels)
    finish = (0.2, 0.4, 0.6, 0.8, 1.0)[level["aesthetic"] - 1]
    picture = ImageEnhance.Contrast(ImageEnhance.Color(picture).enhance(finish)).enhance(0.4 + 0.6 * finish)
    if level["harmlessness"] < 5:
        side = (8, 11, 14, 17)[4 - level["harmlessness"]]
        stripes = (np.add.outer(np.arange(side), np.arange(side)) // 3 % 2)[..., None]
        mark = np.where(stripes == 1, (250, 220, 0), (10, 10, 10)).astype(np.uint8)
        picture.paste(Image.fromarray(mark), tuple(int(v) for v in rng.integers(0, 64 - side, 2)))
    out = io.BytesIO()
    faulty(picture, fault, level["fidelity"], rng).save(out, "PNG")
    return out.getvalue()


def asked_for(prompt: str) -> tuple[str, str]:
    """The noun and the ground's colour of a caption."""
    words = prompt.split()
    return next(word for word in words if word in NOUNS), next(word for word in words if word in COLOURS)


def comparisons(pool: Pool, name: str, seed: int, rounds: int = 1) -> list[Comparison]:
    """`rounds` comparisons of every prompt, all of it a function of the name and the seed."""
    about = [asked_for(prompt) for prompt in pool.prompts]
    made = []
    for number, prompt in enumerate(dict.fromkeys(pool.prompts)):
        noun, colour = asked_for(prompt)
        same = [(n == noun) + (c == colour) for n, c in about]
        own = [i for i, text in enumerate(pool.prompts) if text == prompt]
        sources = {5: own, 3: [i for i, s in enumerate(same) if s == 1], 1: [i for i, s in enumerate(same) if s == 0]}
        for turn in range(rounds):
            rng = generator(f"aspects {name}", seed, number, turn)
            media, levels = [], []
            for _ in range(MEMBERS):
                level = {"prompt-following": int(rng.choice((5, 5, 3, 1)))}
                level |= {aspect: int(rng.integers(1, 6)) for aspect in ASPECTS[1:]}
                source = int(rng.choice(sources[level["prompt-following"]]))
                media.append(planted(pool.pictures[source], level, str(rng.choice(FAULTS)), rng))
                levels.append(level)
            aspects = {aspect: tuple(float(level[aspect]) for level in levels) for aspect in ASPECTS}
            mean = tuple(np.mean(list(aspects.values()), axis=0).tolist())
            made.append(Comparison(f"{name} {seed} {number} {turn}", prompt, tuple(media), mean, aspects=aspects))
    return made


def make_data(output: Path) -> None:
    """Writes the comparisons that are learnt from, three seeds of them."""
    for seed in SEEDS:
        write_comparisons(
            output / f"fit-{seed}", comparisons(pool(output, "train"), "fit", seed, rounds=2), layout="parquet"
        )


def judge(output: Path, split: str) -> None:
    """Measures the three scorers on comparisons of a split, and on five levels of one fault at a time."""
    items = comparisons(pool(output, split), split, 0)
    tune = comparisons(pool(output, "development"), "tune", 1)
    found: dict[str, Any] = {"split": split, "comparisons": len(items), "seeds": {}}
    for seed in SEEDS:
        scorer = load_scorer(output / f"scorer-{seed}" / "scorer")
        lines = measured(scorer, ASPECTS, tune, items, interval=interval)
        lines = [{**line, "set": f"pictures of the embedded model, {split} prompts"} for line in lines]
        found["seeds"][seed] = {"accuracy": lines, "ordered": ordered(scorer, pool(output, split), split)}
        for line in [*lines, *found["seeds"][seed]["ordered"]]:
            print(seed, line, flush=True)
    write_json(output / f"{split}.json", found)


def ordered(scorer: Any, pool: Pool, name: str) -> list[dict[str, Any]]:
    """Five levels of one fault, everything else as the model made it: do the scores come out in order?"""
    lines = []
    for aspect, faults in (("fidelity", FAULTS), ("aesthetic", ("blur",)), ("harmlessness", ("blur",))):
        for fault in faults:
            scores = []
            for level in range(1, 6):
                rng = generator(f"ordered {name}", level)
                media = [planted(p, dict.fromkeys(ASPECTS, 5) | {aspect: level}, fault, rng) for p in pool.pictures]
                scores.append(scorer.aspects(media, pool.prompts)[aspect].numpy())
            table = np.stack(scores, 1)  # [N, 5], worst first
            right = (np.diff(table) > 0).all(1).astype(float)
            rank = np.array([spearman(row, np.arange(5)) for row in table])
            low, high = interval(right, clusters=pool.prompts)
            lines.append(
                {
                    "aspect": aspect,
                    "planted": fault if aspect == "fidelity" else aspect,
                    "n": len(right),
                    "all five in order": round(100 * float(right.mean()), 1),
                    "interval": [round(100 * low, 1), round(100 * high, 1)],
                    "mean rank correlation": round(float(rank.mean()), 3),
                    "means in order": bool((np.diff(table.mean(0)) > 0).all()),
                }
            )
    return lines


def ship(output: Path) -> None:
    """Seed 0 becomes the bundled scorer, with what `test` measured of it; and the tables."""
    found = read_json(output / "test.json")
    folder = mmalign.bundled("scorers") / "embedded-aspects"
    folder.mkdir(exist_ok=True)
    made, base = Card.read(output / "scorer-0" / "scorer"), mmalign.bundled("scorers") / "embedded-clip"
    shutil.copy(made.path(made.score["head"]["file"]), folder / "head.safetensors")
    card = {**yaml.safe_load((base / "card.yaml").read_text()), "name": "embedded-aspects", "score": made.score}
    card["about"] = (
        "Four aspect heads on the frozen embedded-clip, fitted to faults planted in pictures of the embedded model. "
        "Harmlessness is a stand-in: it knows one planted mark and nothing that is harmful."
    )
    card["model"] = {name: f"../embedded-clip/{file}" for name, file in card["model"].items()}
    card["weights"] = {**card["weights"], "file": f"../embedded-clip/{card['weights']['file']}"}
    source = "benchmarks/train_aspects.py test, once; seed 0 of three"
    card["published"] = [{**line, "source": source} for line in found["seeds"]["0"]["accuracy"]]
    (folder / "card.yaml").write_text(yaml.safe_dump(card, sort_keys=False, allow_unicode=True, width=110))
    write_json(HERE / "train_aspects.json", found)
    tables = [
        "| aspect and way | " + " | ".join(f"seed {seed}" for seed in SEEDS) + " | pairs or lists | prompts |",
        "|---|" + "---|" * (len(SEEDS) + 2),
    ]
    columns = [found["seeds"][str(seed)] for seed in SEEDS]
    for rows in zip(*(column["accuracy"] for column in columns), strict=True):
        cells = [f"{row['value']} ({row['interval'][0]} to {row['interval'][1]})" for row in rows]
        tables.append(f"| {rows[0]['metric']} | {' | '.join(cells)} | {rows[0]['n']:,} | {rows[0]['prompts']} |")
    tables += ["", "| planted | " + " | ".join(f"seed {seed}" for seed in SEEDS) + " | pictures |"]
    tables.append("|---|" + "---|" * (len(SEEDS) + 1))
    for rows in zip(*(column["ordered"] for column in columns), strict=True):
        cells = [
            f"{row['all five in order']} ({row['interval'][0]} to {row['interval'][1]}), {row['mean rank correlation']}"
            for row in rows
        ]
        tables.append(f"| {rows[0]['aspect']}: {rows[0]['planted']} | {' | '.join(cells)} | {rows[0]['n']} |")
    page = HERE / "train_aspects.md"
    head = page.read_text().split("<!-- tables -->")[0]
    page.write_text(head + "<!-- tables -->\n\n" + "\n".join(tables) + "\n")


def main() -> None:
    """Runs one stage."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=["pictures", "data", "develop", "test", "ship"])
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    if given.stage in ("develop", "test"):
        judge(given.output, {"develop": "development", "test": "test"}[given.stage])
    else:
        {"pictures": make_pictures, "data": make_data, "ship": ship}[given.stage](given.output)


if __name__ == "__main__":
    main()
