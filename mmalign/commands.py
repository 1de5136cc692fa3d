"""What the commands share: libraries kept quiet, both sides generated, report written; and compare and score."""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mmalign
from mmalign import storage
from mmalign.console import stage, table
from mmalign.records import UserError, open_image


def quiet_libraries() -> None:
    """Their loading bars and notes are not news to a person who watches ours."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")


def both_sides(
    modality: Any, views: Any, prompts: Sequence[str], seeds: Sequence[int], user: Any = None, **settings: Any
) -> tuple[list[Any], list[Any]]:
    """Pictures of the reference and of the policy for the same prompts and seeds; the policy's are for `user`."""
    sides = []
    for view, title in (("reference", "Base pictures"), ("policy", "Aligned pictures")):
        with stage(title, len(prompts)) as advance, views(view):
            told = {"user": user} if user is not None and view == "policy" else {}
            sides.append(modality.generate(prompts, seeds=seeds, progress=advance, **settings, **told))
    return sides[0], sides[1]


def report(
    folder: Path,
    title: str,
    result: Any,
    prompts: Sequence[str],
    base: Sequence[Any],
    aligned: Sequence[Any],
    *,
    run: Any = None,
    facts: Mapping[str, Any] | None = None,
    roles: Mapping[str, str] | None = None,
    headline: str | None = None,
    count: int = 0,
) -> None:
    """Writes report.html and grid.png, prints the table, and completes the model card.

    Args:
        folder: of the report.
        title: of the report.
        result: scores of both sides.
        prompts: of the pictures.
        base: pictures.
        aligned: pictures.
        run: the training behind it, if there was one.
        facts: name -> what it was, for the foot of the report.
        roles: scorer -> what it is here, shown behind its name.
        headline: the scorer of the report's first sentence; default the first.
        count: of the comparisons that were trained on.
    """
    from mmalign.evaluation.report import write_report
    from mmalign.training.card import write_card

    metrics, files = [], {}
    if run is not None:
        output_dir = Path(run.output_dir)
        metrics = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
        files = {
            f"{output_dir.name}/pytorch_lora_weights.safetensors": "the LoRA, for diffusers",
            f"{output_dir.name}/pytorch_lora_weights_kohya.safetensors": "the LoRA, for ComfyUI and A1111",
            f"{output_dir.name}/README.md": "its model card",
            f"{output_dir.name}/metrics.jsonl": "the log of every step",
            "pairs": "the preference data",
        }
    page = write_report(
        folder,
        title=title,
        result=result,
        prompts=prompts,
        base=base,
        aligned=aligned,
        metrics=metrics,
        facts={**(facts or {}), **_versions()},
        files=files,
        roles=roles,
        headline=headline,
    )
    rows = [
        [
            f"{row.scorer} ({roles[row.scorer]})" if roles and row.scorer in roles else row.scorer,
            f"{row.win_rate:.1%}",
            f"{row.win_low:.1%} to {row.win_high:.1%}",
            f"{row.base_mean:.4g}",
            f"{row.aligned_mean:.4g}",
            f"{row.change_low:+.3g} to {row.change_high:+.3g}",
        ]
        for row in result.rows()
    ]
    header = ["scorer", "win rate", "95 % interval", "before", "after", "change, 95 %"]
    table(f"Aligned against base, {len(prompts)} pictures of the same prompts and seeds", header, rows)
    if run is not None:
        lines = ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows)]
        write_card(Path(run.output_dir), run, metrics, comparisons_count=count, results="\n".join(lines))
    print(f"Report   {page}\nPictures {folder / 'grid.png'}")
    if run is not None:
        print(f"LoRA     {Path(run.output_dir) / 'pytorch_lora_weights.safetensors'}")


def _versions() -> dict[str, str]:
    from mmalign.training.loop import versions

    return versions()


def read_prompts(source: str) -> list[str]:
    """Prompts of a text file, one a line, or of a split of the embedded ones ("embedded:test").

    Raises:
        UserError: no such file or split, or nothing in it.
    """
    if source.startswith("embedded:"):
        from mmalign.embedded import prompts as embedded_prompts

        return embedded_prompts(source.removeprefix("embedded:"))
    path = Path(source)
    if not path.is_file():
        raise UserError(f"{source}: no such prompt file; give a text file with one prompt a line.")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{source}: has no prompts; write one a line.")
    return lines


def compare_models(
    base: str,
    aligned: str,
    prompts: str,
    scorers: Sequence[str],
    output_dir: str,
    *,
    seed: int = 0,
    limit: int | None = None,
    whose: tuple[str | None, str | None] = (None, None),
    **settings: Any,
) -> None:
    """What `mmalign compare` does: a LoRA is compared with its base on one set of weights, models one by one."""
    from mmalign.embedded import path as embedded_path
    from mmalign.evaluation.compare import score_sides
    from mmalign.training.views import WeightViews

    quiet_libraries()
    if any(whose) and not (Path(aligned) / "user_layers.safetensors").is_file():
        raise UserError(f"{aligned}: has no user layers, so it cannot make pictures for a user; leave --user out.")
    texts = read_prompts(prompts)[:limit]
    judges = {name: mmalign.load_scorer(name) for name in scorers}
    base = str(embedded_path()) if base == "embedded" else base
    seeds = list(range(seed, seed + len(texts)))
    if (Path(aligned) / "model_index.json").is_file():
        sides = []
        for title, source in (("Base pictures", base), ("Aligned pictures", aligned)):
            with stage(title, len(texts)) as advance:
                sides.append(mmalign.load(source).generate(texts, seeds=seeds, progress=advance, **settings))
    elif (Path(aligned) / "user_layers.safetensors").is_file():
        has_lora = (Path(aligned) / "pytorch_lora_weights.safetensors").is_file()
        who = _embedding(aligned, *whose)
        modality = mmalign.load(base, lora=aligned if has_lora else None, user_layers=aligned)
        views = WeightViews(modality, same_weights=True)
        sides = both_sides(modality, views, texts, seeds, user=who, **settings)
    else:
        modality = mmalign.load(base, lora=aligned)
        sides = both_sides(modality, WeightViews(modality), texts, seeds, **settings)
    result = score_sides(texts, *sides, judges)
    facts = {"base": base, "aligned": aligned, "prompts": f"{len(texts)} of {prompts}", "first seed": seed}
    facts |= {name: value for name, value in {"user": whose[0], **settings}.items() if value is not None}
    report(
        Path(output_dir),
        f"{Path(aligned).name} against {Path(base).name}",
        result,
        texts,
        *sides,
        facts=facts,
    )


def _embedding(aligned: str, user: str | None, users: str | None) -> Any:
    """The embedding of a user, from a file or from what a run saved."""
    from mmalign.data.users import USERS_FILE, read_users

    known = read_users(users or Path(aligned) / USERS_FILE)
    if user is None:
        some = ", ".join(sorted(known.vectors)[:3])
        raise UserError(f"{aligned}: was trained for users; say whose pictures by --user, for example one of {some}.")
    return known[user]


PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def score_pictures(path: str, scorers: Sequence[str], prompt: str | None, output: str | None) -> None:
    """What `mmalign score` does. A picture that does not decode is a row with its reason in the column `error`.

    Raises:
        UserError: nothing at the path, a prompt is missing, or no picture could be scored.
    """
    source = Path(path)
    if not source.exists():
        raise UserError(f"{path}: no such picture or folder.")
    files = [source] if source.is_file() else sorted(f for f in source.rglob("*") if f.suffix.lower() in PICTURES)
    if not files:
        raise UserError(f"{path}: has no pictures ({', '.join(sorted(PICTURES))}).")
    judges = {name: mmalign.load_scorer(name) for name in scorers}
    rows = [{"file": str(file), "prompt": prompt or _beside(file)} for file in files]
    for start in range(0, len(rows), 256):
        _score_rows(rows[start : start + 256], judges)
    target = Path(output) if output else (source if source.is_dir() else source.parent) / "scores.csv"
    with storage.atomic_file(target) as temp, temp.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["file", "prompt", *judges, "error"])
        writer.writeheader()
        writer.writerows(rows)
    shown = [
        [Path(row["file"]).name, *(f"{row[n]:.4f}" if n in row else "" for n in judges), row.get("error", "")]
        for row in rows
    ]
    table(f"Scores of {len(rows)} pictures", ["picture", *judges, "error"], shown[:50])
    failed = sum("error" in row for row in rows)
    print(f"{len(rows) - failed} scored, {failed} not decoded; all rows are in {target}.")
    if failed == len(rows):
        raise UserError(f"{path}: none of its pictures could be decoded.")


def _beside(file: Path) -> str:
    text = file.with_suffix(".txt")
    if not text.is_file():
        raise UserError(f"{file}: has no prompt; give --prompt, or put it into {text.name} beside the picture.")
    return text.read_text(encoding="utf-8").strip()


def _score_rows(rows: list[dict[str, Any]], judges: dict[str, Any]) -> None:
    """Decodes once for all scorers and writes scores or the error into the rows."""
    opened = []
    for row in rows:
        try:
            opened.append((row, open_image(row["file"])))
        except UserError as error:
            row["error"] = str(error)
    if opened:
        for name, judge in judges.items():
            scores = judge.score([picture for _, picture in opened], [row["prompt"] for row, _ in opened])
            for (row, _), value in zip(opened, scores.tolist(), strict=True):
                row[name] = value
