"""Preference data in known layouts, read into comparisons.

Layouts: a folder with `comparisons.jsonl` and pictures beside it; parquet in our own columns; parquet,
Arrow or a Hub data set in the columns of Pick-a-Pic, or in those of TRL (text answers, to input pictures or to none).
Pictures stay encoded until they are used, and those in parquet and Arrow stay on the disk.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.data.export import write_comparisons
from mmalign.records import Comparison, Text, UserError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Dataset", "read_comparisons", "write_comparisons"]

JSONL = "comparisons.jsonl"
OURS = {"id", "prompt", "media", "score"}
PICK_A_PIC = {"caption", "jpg_0", "jpg_1"}
TRL = {"prompt", "chosen", "rejected"}
SPLITS = ("train", "validation", "val", "test", "dev")


@dataclass(frozen=True)
class Dataset:
    """Comparisons, and how many rows were read, kept and left out.

    Attributes:
        comparisons: Those that say something; an item's pictures are read when the item is.
        counts: read = kept + ties (all scores equal) + no_label + repeated (an id seen before).
    """

    comparisons: Sequence[Comparison]
    counts: dict[str, int]


def read_comparisons(source: str | Path, *, split: str = "train", limit: int | None = None) -> Dataset:
    """Read a data set whose layout is found out by looking.

    Args:
        source: A folder, a .jsonl, .parquet or .arrow file, or the id of a data set on the Hub.
        split: Which part, where files or the Hub name several.
        limit: Read no more rows than this; they are then held in memory, and a Hub data set is streamed.

    Raises:
        UserError: Nothing there, an unknown layout, a bad row, or nothing left to learn from.
    """
    path = Path(source)
    listing = path / JSONL if path.is_dir() else path
    if listing.suffix == ".jsonl" and listing.is_file():
        rows = list(islice(_read_jsonl(listing), limit))
        kept, counts = _keep((row.id, row.score) for row in rows)
        comparisons: Sequence[Comparison] = [rows[number] for number in kept]
    else:
        table = _read_table(str(source), split, limit)
        labels, make = _understand(table, str(source))
        kept, counts = _keep(labels)
        comparisons = _Rows(table, kept, make)
    if not comparisons:
        left_out = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise UserError(f"{source}: holds nothing to learn from ({left_out}); give data with a preference.")
    return Dataset(comparisons, counts)


class _Rows(Sequence):
    """Comparisons made from the rows of a table at the moment they are asked for."""

    def __init__(self, table: "pa.Table", kept: list[int], make: Callable[[dict, int], Comparison]):
        self.table, self.kept, self.make = table, kept, make

    def __len__(self):
        return len(self.kept)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return _Rows(self.table, self.kept[index], self.make)
        number = self.kept[index]
        return self.make(self.table.slice(number, 1).to_pylist()[0], number)


def _keep(labels: Iterable[tuple[str, Sequence[float] | None]]) -> tuple[list[int], dict[str, int]]:
    """The numbers of the rows (id, scores) that prefer something, and the counts of all."""
    seen: set[str] = set()
    kept = []
    counts = Counter(read=0, kept=0, ties=0, no_label=0, repeated=0)
    for number, (name, score) in enumerate(labels):
        if score is None:
            fate = "no_label"
        elif name in seen:
            fate = "repeated"
        elif len(score) > 1 and len(set(score)) == 1:
            fate = "ties"
        else:
            fate = "kept"
            kept.append(number)
        seen.add(name)
        counts.update(("read", fate))
    return kept, dict(counts)


def _comparison(where: str, **fields: Any) -> Comparison:
    try:
        return Comparison(**{name: value for name, value in fields.items() if value is not None})
    except (UserError, TypeError) as error:
        raise UserError(f"{where}: {error}") from error


# --- comparisons.jsonl ---


def _read_jsonl(path: Path) -> Iterable[Comparison]:
    with path.open(encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _from_line(path, number, line)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: is not UTF-8 text ({error}); save it as UTF-8.") from error


def _from_line(path: Path, number: int, line: str) -> Comparison:
    where = f"{path}, line {number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: is not JSON ({error}); write one object a line.") from error
    for name, kind in {"prompt": str, "media": list, "score": list}.items():
        if not isinstance(row, dict) or not isinstance(row.get(name), kind):
            raise UserError(f"{where}: field {name} is missing or is no {kind.__name__}; add it.")
    condition = row.get("condition")
    return _comparison(
        where,
        id=row.get("id", hashlib.sha256(line.strip().encode()).hexdigest()[:24]),
        prompt=row["prompt"],
        media=[_beside(path, name, f"{where}: field media") for name in row["media"]],
        score=row["score"],
        weight=row.get("weight"),
        user=row.get("user"),
        condition=condition and tuple(_beside(path, name, f"{where}: field condition") for name in condition),
        source=row.get("source"),
        aspects=row.get("aspects"),
    )


def _beside(listing: Path, name: Any, where: str) -> Path:
    """The file `name` in the listing's folder; never one outside it, as listings are passed around."""
    path = listing.parent / str(name)
    if not path.resolve().is_relative_to(listing.parent.resolve()):
        raise UserError(f"{where}: {name!r} lies outside the folder; give a path relative to {listing.name}.")
    if not path.is_file():
        raise UserError(f"{where}: there is no file {name!r}; add it, or remove the line.")
    return path


# --- tables: parquet, Arrow, the Hub ---


def _read_table(source: str, split: str, limit: int | None) -> "pa.Table":
    import datasets
    import pyarrow as pa

    path, streaming = Path(source), limit is not None
    try:
        if path.is_dir() and (path / "state.json").is_file():  # what save_to_disk writes
            data = datasets.load_from_disk(source)
        elif path.suffix == ".arrow" and path.is_file():
            data = datasets.Dataset.from_file(source)
        elif path.exists():
            files = {split: _parquet_files(path, split)}
            data = datasets.load_dataset("parquet", data_files=files, split=split, streaming=streaming)
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not path.parent.is_dir():
            data = datasets.load_dataset(source, split=split, streaming=streaming)
        else:
            raise UserError(f"{source}: there is no such file or folder; check the path.")
        if limit is not None:
            return pa.concat_tables(islice(data.with_format("arrow"), limit), promote_options="permissive")
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        known = "cannot be read" if path.exists() else "is no path here and not to be had from the Hub"
        raise UserError(f"{source} (split {split}): {known} ({reason}); check the name.") from error
    return data.data.table


def _parquet_files(path: Path, split: str) -> list[str]:
    """The parquet files of a split; a file whose name mentions no split belongs to every one."""
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files or not all(file.suffix == ".parquet" for file in files):
        raise UserError(f"{path}: holds neither {JSONL} nor parquet files; see the known layouts in the guide.")
    if path.is_file():
        return [str(path)]

    def split_of(file: Path) -> str:
        words = [*file.relative_to(path).parent.parts, re.split(r"[-_.]", file.stem)[0]]
        return next((word for word in words if word in SPLITS), split)

    found = [str(file) for file in files if split_of(file) == split]
    if not found:
        there = ", ".join(sorted({split_of(file) for file in files}))
        raise UserError(f"{path}: has no split {split!r}, but {there}; choose one of these.")
    return found


def _understand(table: "pa.Table", source: str) -> tuple[Iterable, Callable[[dict, int], Comparison]]:
    """The (id, scores) of every row, and what makes a comparison of a row; found by the columns."""
    columns = set(table.column_names)
    if columns >= OURS:
        labels = zip(*table.select(["id", "score"]).to_pydict().values(), strict=True)
        return labels, lambda row, number: _from_ours(row, f"{source}, row {number}")
    if columns >= PICK_A_PIC:
        if "label_0" not in columns:
            raise UserError(f"{source}: field label_0 is missing (1, 0, or 0.5 for a tie); add that column.")
        labels = _pick_a_pic_labels(table, source)
        return labels, lambda row, number: _from_pick_a_pic(row, number, labels[number], source)
    if columns >= TRL:
        return _trl_labels(table, source), lambda row, number: _from_trl(row, f"{source}, row {number}", str(number))
    listed = [", ".join(sorted(names)) for names in (OURS, PICK_A_PIC, TRL)]
    known = f"{listed[0]} (ours), {listed[1]}, label_0 (Pick-a-Pic) or {listed[2]} (TRL)"
    raise UserError(f"{source}: has columns {', '.join(sorted(columns))}; needed are {known}.")


def _from_ours(row: dict, where: str) -> Comparison:
    aspects = {aspect["name"]: aspect["score"] for aspect in row.get("aspects") or ()}
    condition = tuple(row["condition"]) if row.get("condition") else None
    known = {name: row.get(name) for name in (*sorted(OURS), "weight", "user", "source")}
    return _comparison(where, **known, condition=condition, aspects=aspects)


def _pick_a_pic_labels(table: "pa.Table", source: str) -> list[tuple[str, tuple[float, float] | None]]:
    columns = [name for name in ("ranking_id", "has_label") if name in table.column_names]
    labels = []
    for number, row in enumerate(table.select([*columns, "label_0"]).to_pylist()):
        label = row["label_0"] if row.get("has_label", True) else None
        if label not in (None, 0, 0.5, 1):
            raise UserError(f"{source}, row {number}: field label_0 is {label}; it must be 0, 0.5 or 1.")
        name = row.get("ranking_id")
        labels.append((str(number if name is None else name), None if label is None else (label, 1 - label)))
    return labels


def _from_pick_a_pic(row: dict, number: int, label: tuple, source: str) -> Comparison:
    models = tuple(str(row.get(name) or "") for name in ("model_0", "model_1"))
    return _comparison(
        f"{source}, row {number}",
        id=label[0],
        prompt=row["caption"],
        media=(row["jpg_0"], row["jpg_1"]),
        score=label[1],
        user=None if row.get("user_id") is None else str(row["user_id"]),
        source=models if all(models) else (),
    )


# --- TRL's prompt, chosen, rejected, images ---


def _trl_labels(table: "pa.Table", source: str) -> Iterable[tuple[str, tuple[float, float]]]:
    """A row's number stands for its id: the same words about other pictures are another row."""
    number = 0
    for batch in table.select(["chosen", "rejected"]).to_batches():
        for row in batch.to_pylist():
            chosen, rejected = (_said(row, name, f"{source}, row {number}") for name in ("chosen", "rejected"))
            yield str(number), (1.0, 1.0 if chosen == rejected else 0.0)
            number += 1


def _from_trl(row: dict, where: str, name: str) -> Comparison:
    return _comparison(
        where,
        id=name,
        prompt=_said(row, "prompt", where),
        media=tuple(Text(_said(row, field, where)) for field in ("chosen", "rejected")),
        score=(1.0, 0.0),
        condition=tuple(row.get("images") or ()) or None,
    )


def _said(row: dict, name: str, where: str) -> str:
    """The text of a field: a string, or a conversation of one turn, [{"role", "content"}].

    Its content is a string or a list of parts; parts that stand for pictures are left out, as those are in `images`.
    """
    value = row.get(name)
    role = "user" if name == "prompt" else "assistant"
    if isinstance(value, list) and value:
        if len(value) != 1 or not isinstance(value[0], dict) or value[0].get("role") != role:
            roles = ", ".join(str(turn.get("role")) if isinstance(turn, dict) else "text" for turn in value)
            raise UserError(f"{where}: field {name} has the turns {roles}; only one turn of the {role} can be learned.")
        value = value[0].get("content")
        if isinstance(value, list):
            value = "".join(part.get("text") or "" for part in value if isinstance(part, dict))
    if not isinstance(value, str) or not (value or name == "prompt"):
        raise UserError(f"{where}: field {name} is missing or holds no text; add it, or remove the row.")
    return value
