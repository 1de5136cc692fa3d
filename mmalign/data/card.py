"""The card of a data set made from scores: what is in it, in words, numbers and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from mmalign.data.label import extremes
from mmalign.data.scored import Scored
from mmalign.records import Comparison, Text, UserError, open_image
from mmalign.storage import atomic_file, write_json

BINS = 40
SIDE = 256  # pixels of a sample picture
SCORER = "| {} | {n:,} | {mean:.4g} | {std:.4g} | {min:.4g} | {max:.4g} |"


def write_card(folder: Path, data: Scored, rule: Any, made: Any) -> dict[str, Any]:
    """Writes README.md, card.json, the histograms and sample pictures into a data set's folder.

    Args:
        folder: Of the comparisons.
        data: What they were made from.
        rule: The `mmalign.data.pairs.Rule`.
        made: The `mmalign.data.pairs.Made`.

    Returns:
        What card.json holds.
    """
    histograms = {name: _histogram(data, n) for n, name in enumerate(data.scorers)}
    pairs, margins = dict(made.pairs), np.frombuffer(made.margins)
    quantiles = np.quantile(margins, [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1])
    card = {
        "source": data.name,
        "kind": data.kind,
        "command": command(data, rule),
        "settings": asdict(rule),
        "candidates": dict(made.candidates),
        "prompts": {"prompts": 0, "kept": 0, "too_few": 0, "no_pair": 0} | dict(made.prompts),
        "lists" if rule.mode == "ranked" else "pairs": pairs,
        "tie_share": pairs.get("ties", 0) / pairs["pairs"],
        "disagreements_with_people": made.disagreements,
        "score_scale": [made.low, made.high],
        "margin": dict(zip(("min", "p10", "p25", "median", "p75", "p90", "max"), quantiles.tolist(), strict=True)),
        "scores": histograms,
        "provenance": data.provenance,
    }
    samples = [item for *_, item in sorted(made.samples, key=lambda sample: -sample[0])]
    write_json(folder / "card.json", card)
    with atomic_file(folder / "scores.png") as temp:
        _plot(temp, histograms)
    shown = _grid([item for item in samples if not isinstance(item.media[0], Text)])
    if shown:
        with atomic_file(folder / "samples.png") as temp:
            shown.save(temp)
    with atomic_file(folder / "README.md") as temp:
        temp.write_text(_page(card, samples, bool(shown)), encoding="utf-8")
    return card


def command(data: Scored, rule: Any) -> str:
    """What makes the same comparisons again."""
    default = type(rule)()
    given = {name: value for name, value in asdict(rule).items() if value != getattr(default, name)}
    flags = [f"--{name.replace('_', '-')} {value}" for name, value in given.items()]
    return " ".join(
        ["mmalign pairs", data.name, f"--scores {data.scores}", *(f"--scorer {name}" for name in data.scorers), *flags]
    )


def _histogram(data: Scored, number: int) -> dict[str, Any]:
    """n, mean, std, min, max and [BINS] counts between min and max of a scorer's scores."""
    name = f"s{number}"
    finite = f"FROM {{rows}} WHERE isfinite({name})"
    n, mean, std, low, high = data.ask(
        f"SELECT count(*), avg({name}), stddev_pop({name}), min({name}), max({name}) {finite}"
    )[0]
    width = (high - low) / BINS or 1.0
    place = f"least(CAST(floor(({name} - {low!r}) / {width!r}) AS INTEGER), {BINS - 1})"
    counts = dict(data.ask(f"SELECT {place} AS bin, count(*) {finite} GROUP BY bin"))
    found = {"n": n, "mean": mean, "std": std, "min": low, "max": high}
    return {**found, "counts": [counts.get(bin, 0) for bin in range(BINS)]}


def _plot(path: Path, histograms: dict[str, dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(histograms), 3), layout="constrained")
    for place, (name, found) in enumerate(histograms.items(), 1):
        axes = figure.add_subplot(1, len(histograms), place)
        edges = np.linspace(found["min"], found["max"] if found["max"] > found["min"] else found["min"] + 1, BINS + 1)
        axes.stairs(found["counts"], edges, fill=True)
        axes.set(title=name, xlabel="score", ylabel="media")
    figure.savefig(path, dpi=100, format="png")


def _grid(items: Sequence[Comparison]) -> Image.Image | None:
    """A row a comparison, its best medium left and its worst right; None without pictures."""
    try:
        rows = [[open_image(item.media[n]) for n in extremes(item.score)] for item in items]
    except UserError:  # a sound or a video
        return None
    grid = Image.new("RGB", (2 * SIDE, len(rows) * SIDE), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            shown = ImageOps.pad(picture, (SIDE - 8, SIDE - 8), color="white")
            grid.paste(shown, (x * SIDE + 4, y * SIDE + 4))
    return grid if rows else None


def _page(card: dict[str, Any], samples: Sequence[Comparison], has_grid: bool) -> str:
    kind = "lists" if "lists" in card else "pairs"
    counts = {"Candidates": card["candidates"], "Prompts": card["prompts"], kind.capitalize(): card[kind]}
    lines = [
        "# Preference data",
        "",
        f"{card[kind]['kept']:,} {kind} of {card['prompts']['kept']:,} prompts, made from `{card['source']}` by",
        "",
        f"    {card['command']}",
        "",
        "Licence: add it; it depends on the models, prompts and scorers.",
        "",
        "## Counts",
        "",
        *(f"- {name}: {', '.join(f'{key} {value:,}' for key, value in row.items())}" for name, row in counts.items()),
        f"- Ties: {card['tie_share']:.1%}. Against people's order: {card['disagreements_with_people']:,}.",
        "",
        "## Scores",
        "",
        f"Kept scores lie in [{card['score_scale'][0]:.6g}, {card['score_scale'][1]:.6g}]: a recipe's `score_scale`.",
        "Margins: " + ", ".join(f"{name} {value:.4g}" for name, value in card["margin"].items()) + ".",
        "",
        "| scorer | n | mean | std | min | max |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        *(SCORER.format(name, **row) for name, row in card["scores"].items()),
        "",
        "![Histograms of the scores](scores.png)",
        "",
        "The scorers' weights and preprocessing are in `card.json` under `provenance`.",
        "",
        "## Samples",
        "",
        "The best left, the worst right." if has_grid else "The best first, the worst last.",
        "",
    ]
    for item in samples:
        lines.append(f"- {item.prompt}: " + " against ".join(f"{item.score[n]:.4g}" for n in extremes(item.score)))
        if isinstance(item.media[0], Text):
            lines += [f"  - {item.media[n]}" for n in extremes(item.score)]
    return "\n".join([*lines, "", *(["![Samples](samples.png)", ""] if has_grid else [])])
