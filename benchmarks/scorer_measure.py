"""Measures a scorer on captions that nothing was trained on (the `test` split)."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scorer_data import COST, answer, changed, combos, fresh, scene, utility

from mmalign.embedded.scenes import COLOURS, PLACES, SIZES, Scene, caption, prompts, render
from mmalign.evaluation.metrics import bootstrap_interval
from mmalign.scoring import Scorer, load_scorer

SOURCE = "measured by benchmarks/make_scorers.py measure"
SPLIT = "test"
PAIRS, TRUTH_PAIRS = 800, 500  # of finish and of both together; of each wrong attribute


def pictures(scenes: list[Scene]) -> list[Image.Image]:
    """Renders scenes as Pillow pictures."""
    return [Image.fromarray(render(s)) for s in scenes]


def pair_accuracy(scorer: Scorer, pairs: list[tuple[Scene, Scene, Scene]]) -> tuple[np.ndarray, list[str]]:
    """For (asked, better, worse): 1 where better scores higher, 0.5 for a tie; and the prompts."""
    asked = [caption(a) for a, _, _ in pairs]
    better, worse = (scorer.score(pictures([p[i] for p in pairs]), asked, batch_size=128).numpy() for i in (1, 2))
    return (better > worse) + 0.5 * (better == worse), asked


def figure(metric: str, values: np.ndarray, clusters: list[str], unit: str = "%") -> dict:
    """One line of a card: the mean in percent with its 95 % interval over prompts."""
    low, high = (round(100 * v, 1) for v in bootstrap_interval(values, clusters=clusters, resamples=2000))
    facts = {
        "metric": metric,
        "value": round(100 * float(values.mean()), 1),
        "unit": unit,
        "interval": [low, high],
    }
    return {"set": f"embedded scenes, {SPLIT} captions", **facts, "n": len(values), "source": SOURCE}


def finish_pairs(rng, allowed) -> list[tuple[Scene, Scene, Scene]]:
    """Both true to the prompt; the one with more finish is better."""
    out = []
    for _ in range(PAIRS):
        asked = scene(rng, allowed)
        two = sorted((fresh(rng, asked), fresh(rng, asked)), key=lambda s: s.q)
        out.append((asked, two[1], two[0]))
    return out


def truth_pairs(rng, allowed, name: str, count: int = TRUTH_PAIRS) -> list[tuple[Scene, Scene, Scene]]:
    """Equal finish; one picture has the named attribute wrong."""
    out = []
    for _ in range(count):
        asked = scene(rng, allowed)
        true = fresh(rng, asked)
        out.append((asked, true, replace(changed(rng, asked, name), q=true.q)))
    return out


def mixed_pairs(rng, allowed) -> list[tuple[Scene, Scene, Scene]]:
    """As in training: finish and wrong attributes together, ordered by the oracle's utility without noise."""
    out = []
    for _ in range(PAIRS):
        asked = scene(rng, allowed)
        two = sorted((answer(rng, asked), answer(rng, asked)), key=lambda s: utility(s, asked))
        out.append((asked, two[1], two[0]))
    return out


def retrieval(scorer: Scorer, rng, rounds: int = 4, size: int = 256) -> tuple[np.ndarray, list[str]]:
    """Top-1 of a fresh picture's own caption among 256 distinct captions, by cosine."""
    every = scenes_of_captions()
    hits, asked = [], []
    for _ in range(rounds):
        names = [str(n) for n in rng.choice(prompts(SPLIT), size, replace=False)]
        media = pictures([fresh(rng, every[n]) for n in names])
        pixels = [scorer.preprocess(m) for m in media]
        image = F.normalize(scorer.model.encode_image(torch.stack(pixels)), dim=-1)
        best = (image @ scorer.embed(names).T).argmax(1).numpy()
        hits.append(best == np.arange(size))
        asked += names
    return np.concatenate(hits).astype(float), asked


def scenes_of_captions() -> dict[str, Scene]:
    """The scene of each caption of the split."""
    every = (Scene(*both, size, place) for both, size, place in product(combos(SPLIT), SIZES, PLACES))
    return {caption(s): s for s in every}


def finish_correlation(scorer: Scorer, rng, allowed, captions: int = 150, each: int = 8) -> dict:
    """Correlation of score and finish among pictures of one caption, pooled after centring each caption."""
    asked = [scene(rng, allowed) for _ in range(captions)]
    scenes = [fresh(rng, s) for s in asked for _ in range(each)]
    names = [caption(s) for s in scenes]
    score = scorer.score(pictures(scenes), names, batch_size=128).numpy().reshape(captions, each)
    q = np.array([s.q for s in scenes]).reshape(captions, each)
    score, q = (v - v.mean(1, keepdims=True) for v in (score, q))
    norms = (score**2).sum(1), (q**2).sum(1)
    draws = np.random.default_rng(0).integers(captions, size=(2000, captions))
    products = (score * q).sum(1)
    many = products[draws].sum(1) / np.sqrt(norms[0][draws].sum(1) * norms[1][draws].sum(1))
    value = products.sum() / np.sqrt(norms[0].sum() * norms[1].sum())
    low, high = np.quantile(many, [0.025, 0.975])
    facts = {"metric": "correlation of score and finish within a caption", "value": round(float(value), 3)}
    interval = [round(float(low), 3), round(float(high), 3)]
    return {
        "set": f"embedded scenes, {SPLIT} captions",
        **facts,
        "interval": interval,
        "n": score.size,
        "source": SOURCE,
    }


def ground_spread(scorer: Scorer, rng, nouns: int = 48) -> dict:
    """How far apart ground colours lie at equal finish, in units of finish: largest less smallest mean."""
    colours, names = list(COLOURS), sorted({noun for noun, _ in combos(SPLIT)})[:nouns]

    def mean(q: float, colour: str) -> float:
        scenes = [Scene(n, colour, q=q, seed=int(rng.integers(2**31 - 1))) for n in names for _ in range(2)]
        return float(scorer.score(pictures(scenes), [caption(s) for s in scenes], batch_size=128).mean())

    table = np.array([[mean(q, colour) for colour in colours] for q in (0.25, 0.5, 0.75)])
    slope = (table[2].mean() - table[0].mean()) / 0.5  # score per unit of finish
    spread = (table[1].max() - table[1].min()) / slope
    by_colour = {c: round(float(v), 3) for c, v in zip(colours, (table[1] - table[1].mean()) / slope, strict=True)}
    facts = {"metric": "difference between ground colours at equal finish", "value": round(float(spread), 3)}
    return {
        "set": "embedded scenes, all grounds",
        **facts,
        "unit": "finish",
        "by_ground": by_colour,
        "source": SOURCE,
    }


def measure(folder: Path) -> list[dict]:
    """All figures of a scorer, in the order its card shows them."""
    scorer, rng, allowed = load_scorer(folder), np.random.default_rng(2026), combos(SPLIT)
    found = [figure("retrieval top-1 among 256 captions", *retrieval(scorer, rng))]
    found += [
        figure(
            f"pair accuracy, wrong {name}, equal finish",
            *pair_accuracy(scorer, truth_pairs(rng, allowed, name)),
        )
        for name in COST
    ]
    found.append(finish_correlation(scorer, rng, allowed))
    if scorer.card.name != "embedded-clip":
        found.append(figure("pair accuracy, finish only", *pair_accuracy(scorer, finish_pairs(rng, allowed))))
        found.append(figure("pair accuracy, oracle", *pair_accuracy(scorer, mixed_pairs(rng, allowed))))
        found.append(ground_spread(scorer, rng))
    for line in found:
        print(scorer.card.name, {k: v for k, v in line.items() if k not in ("set", "source")}, flush=True)
    return found
