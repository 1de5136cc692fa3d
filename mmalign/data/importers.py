"""Preference data in known layouts, read into comparisons.

A data set is a folder with `comparisons.jsonl`; a .jsonl, .json or .csv file with media beside it; a folder of pairs,
w/ and l/ or chosen/ and rejected/; parquet; Arrow; or a data set of the Hub. `layouts` says what their rows mean.
Media stay encoded until they are used, and the rows of all but .csv files and folders of pairs stay on the disk.
"""

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmalign.data.export import write_comparisons
from mmalign.data.layouts import OURS, Layout, layout_of
from mmalign.data.rows import Beside, Lines, Listed, Table, read_csv
from mmalign.data.tables import read_table, share
from mmalign.records import Comparison, UserError

__all__ = ["Comparisons", "Dataset", "LeftOut", "read_comparisons", "write_comparisons"]

JSONL = "comparisons.jsonl"
LISTINGS = (".jsonl", ".json", ".csv")
PAIRS = (("w", "l"), ("chosen", "rejected"))  # sd-scripts' pull request 1427; by name
CAPTIONS = (".txt", ".caption")


class LeftOut(NamedTuple):
    """A row that gave no comparison.

    Attributes:
        row: As errors call it: lines count from 1, rows from 0.
        id: The comparison's, or "".
        reason: "tie" (all scores equal), "no_label", "repeated" (an id seen before), "identical" (all media the same),
            "not_utf8", "missing_file" or "bad_row".
        detail: What is wrong, for the last three.
    """

    row: int
    id: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Dataset:
    """Comparisons, and what became of every row.

    Attributes:
        comparisons: Those that say something; an item's media are read when the item is. Its `rows` are [len] the
            numbers of its items' rows.
        counts: read = kept + ties + no_label + repeated + what else was left out, by its reason.
        left_out: The rows left out, in order.
    """

    comparisons: Sequence[Comparison]
    counts: dict[str, int]
    left_out: Sequence[LeftOut] = ()


def read_comparisons(
    source: str | Path,
    *,
    split: str = "train",
    limit: int | None = None,
    fraction: float | None = None,
    strict: bool = True,
    aspect: str | None = None,
) -> Dataset:
    """Read a data set whose layout is found out by looking.

    Args:
        source: A folder, a .jsonl, .json, .csv, .parquet or .arrow file, or the id of a data set on the Hub.
        split: Which part, where files or the Hub name several.
        limit: Read no more rows than this, the first; of parquet and the Hub only these are fetched, and kept in the
            cache of `datasets`.
        fraction: Read this share of the rows, in (0, 1], rounded up; as `limit`.
        strict: Raise at a bad row. Otherwise it is left out, counted and listed. In a table what is wrong with the
            media shows only when the item is asked for: `comparisons[i]` then raises in either case.
        aspect: Score by this aspect instead of overall.

    Raises:
        UserError: Nothing there, an unknown layout, a bad row if `strict`, or nothing left to learn from.
    """
    if fraction is not None and not 0 < fraction <= 1:
        raise UserError(f"fraction {fraction}: must be above 0 and at most 1.")
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit}: must be 1 or more.")
    rows, beside = _find(Path(source), split, limit, fraction)
    everything = Comparisons(rows, _layout(rows), beside, aspect, np.arange(len(rows)))
    kept, left_out = _sift(everything, strict)
    counts = {"read": len(rows), "kept": len(kept), "ties": 0, "no_label": 0, "repeated": 0}
    reasons = Counter("ties" if row.reason == "tie" else row.reason for row in left_out)
    counts.update(reasons)
    if not kept:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        first = next((f" The first: {row.detail}" for row in left_out if row.detail), "")
        raise UserError(f"{source}: holds nothing to learn from ({listed}); give data with a preference.{first}")
    return Dataset(everything[np.frombuffer(kept, np.int64)], counts, left_out)


class Comparisons(Sequence):
    """Comparisons made from rows at the moment they are asked for; threads may share them."""

    def __init__(
        self, source: Lines | Listed | Table, layout: Layout, beside: Beside, aspect: str | None, kept: np.ndarray
    ):
        self.source, self.layout, self.beside, self.aspect, self.kept = source, layout, beside, aspect, kept

    def __len__(self):
        return len(self.kept)

    def __getitem__(self, index: Any) -> Any:
        """A comparison; or, of a slice or an array of places, such a sequence.

        Raises:
            UserError: Its row is bad; `reason` says in a word how.
        """
        if isinstance(index, slice | np.ndarray):
            return Comparisons(self.source, self.layout, self.beside, self.aspect, self.kept[index])
        place = int(self.kept[index])
        try:
            return self.make(place, self.source[place], whole=True)
        except UserError as error:
            raise self.named(place, error) from error

    @property
    def rows(self) -> np.ndarray:
        """[len] int64 what errors call the items' rows: lines of a file from 1, rows of a table or list from 0."""
        return self.source.numbers[self.kept]

    def named(self, place: int, error: UserError) -> UserError:
        """The error with the row's name before it."""
        where = f"{self.source.name}, {self.source.unit} {self.source.numbers[place]}"
        return UserError(f"{where}: {error}", error.reason)

    def make(self, place: int, row: dict, whole: bool) -> Comparison | None:
        """The comparison of a row, None without a label; a row that is not `whole` may lack its media.

        Raises:
            UserError: The row is bad.
        """
        try:
            fields = self.layout.read(row, self.beside)
            name = fields.get("id")
            fields["id"] = self.source.key(place) if name is None else str(name)
            fields["user"] = None if fields.get("user") is None else str(fields["user"])
            if fields["score"] is None:
                return None
            same = fields.pop("same", False)
            if self.aspect is not None:
                fields["score"] = _aspect(fields, self.aspect)
            if fields["media"] is None and not whole:
                fields["media"] = [same or place for place in range(len(fields["score"]))]
            if fields["media"] is None:
                raise UserError("field media is missing or is no list; add it.")
            (fields["id"] + fields["prompt"]).encode()
            return Comparison(**{name: value for name, value in fields.items() if value is not None})
        except UnicodeEncodeError as error:
            raise UserError(f"is not UTF-8 text ({error}); mend or remove the row.", "not_utf8") from error
        except (TypeError, KeyError, ValueError, AttributeError, IndexError) as error:
            raise UserError(f"{error}; the row is not as {self.layout.name} has it.") from error


def _aspect(fields: dict, name: str) -> Sequence[float]:
    aspects = fields.get("aspects") or {}
    if name not in aspects:
        raise UserError(f"has no aspect {name!r}, but {', '.join(aspects) or 'none'}; choose one of these.")
    return aspects[name]


def _sift(everything: Comparisons, strict: bool) -> tuple[array, list[LeftOut]]:
    """The places of the rows that prefer something, and the other rows."""
    kept, left_out, seen = array("q"), [], set()
    source = everything.source
    for place, row in enumerate(source.scan()):
        name = str(row.get("id", row.get("ranking_id", ""))) if isinstance(row, dict) else ""
        reason, detail = "", ""
        try:
            if isinstance(row, UserError):
                raise row
            item = everything.make(place, row, whole=source.scans_whole)
        except UserError as error:
            if strict:
                raise everything.named(place, error) from error
            reason, detail = error.reason, str(everything.named(place, error))
        else:
            if item is None:
                reason = "no_label"
            else:
                name = item.id
                reason = _fate(item, seen)
                seen.add(name)
        if reason:
            left_out.append(LeftOut(int(source.numbers[place]), name, reason, detail))
        else:
            kept.append(place)
    return kept, left_out


def _fate(item: Comparison, seen: set[str]) -> str:
    if item.id in seen:
        return "repeated"
    if len(item.score) > 1 and len(set(item.score)) == 1:
        return "tie"
    if len(item.media) > 1 and all(medium == item.media[0] for medium in item.media[1:]):
        return "identical"
    return ""


def _layout(rows: Lines | Listed | Table) -> Layout:
    if Path(rows.name).name == JSONL:
        return OURS
    for place in range(len(rows)):
        try:
            return layout_of(rows[place], rows.name)
        except UserError as error:
            if error.reason == "layout":
                raise
    return OURS  # no row can be read, which is what the reader will say


# --- finding the rows ---


def _find(path: Path, split: str, limit: int | None, fraction: float | None) -> tuple[Any, Beside]:
    listings = [path]
    if path.is_dir():
        listings = [path / JSONL, *(path / f"{split}{suffix}" for suffix in LISTINGS)]
    for listing in listings:
        if listing.suffix in LISTINGS and listing.is_file():
            rows = read_csv(listing) if listing.suffix == ".csv" else Lines(listing)
            return _first(rows, limit, fraction), Beside(listing.parent, (listing.stem, "images"))
    for names in PAIRS:
        if all((path / name).is_dir() for name in names):
            return _first(_paired(path, *names), limit, fraction), Beside(path)
    table = read_table(str(path), split, limit, fraction)
    return Table(str(path), table), Beside(path if path.is_dir() else path.parent)


def _first(rows: Any, limit: int | None, fraction: float | None) -> Any:
    return rows.first(share(len(rows), limit, fraction))


def _paired(path: Path, chosen: str, rejected: str) -> Listed:
    """The pairs of two folders: files with the same stem, and a caption beside the chosen one or the rejected."""
    files = [_by_stem(path / name) for name in (chosen, rejected)]
    captions = {
        stem: file for name in (rejected, chosen) for stem, file in _by_stem(path / name, captions=True).items()
    }
    rows = [_pair(path, stem, *files, captions) for stem in sorted(files[0].keys() | files[1].keys())]
    return Listed(str(path), rows)


def _by_stem(folder: Path, captions: bool = False) -> dict[str, Path]:
    files = (file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith("."))
    return {file.stem: file for file in files if (file.suffix in CAPTIONS) == captions}


def _pair(path: Path, stem: str, chosen: dict, rejected: dict, captions: dict) -> dict | UserError:
    for found, what in ((chosen, "chosen file"), (rejected, "rejected file"), (captions, "caption (.txt)")):
        if stem not in found:
            return UserError(f"{stem!r} has no {what}; add it, or remove its other files.", "missing_file")
    try:
        prompt = captions[stem].read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        return UserError(f"{captions[stem].name} is not UTF-8 text ({error}); save it as UTF-8.", "not_utf8")
    names = (found[stem].relative_to(path).as_posix() for found in (chosen, rejected))
    return dict(zip(("id", "prompt", "chosen", "rejected"), (stem, prompt, *names), strict=True))
