"""Prompts of a file, with their user and input pictures: one reader for every command."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mmalign.data.rows import Beside
from mmalign.records import UserError

Rows = Iterator[tuple[str, Any]]  # each with its name in an error
TEXT = ("prompt", "caption")  # columns that may hold the prompt; the first that is there counts


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is asked of a model.

    Attributes:
        text: The prompt itself.
        user: Who asks, when known.
        images: Input pictures: things that `open_image` takes.
    """

    text: str
    user: str | None = None
    images: tuple[Any, ...] = ()


def read_prompts(path: str | Path, limit: int | None = None) -> list[Prompt]:
    """Prompts in the order of their file.

    Args:
        path: Text, one prompt a line (blank lines are none); or .jsonl, .csv or .parquet with `prompt` or `caption`,
            and optionally `user` and `images` (paths beside the file); or a .json list of texts or of such rows, as
            HPDv2's benchmark files are.
        limit: Read only the first so many.

    Raises:
        UserError: No such file, nothing in it, or a row that cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such prompt file; give a text file with one prompt a line.")
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    rows = islice(readers.get(path.suffix.lower(), _lines)(path), limit)
    prompts = [_prompt(row, path.parent, where) for where, row in rows]
    if not prompts:
        raise UserError(f"{path}: has no prompts; write one a line.")
    return prompts


def _decoded(path: Path) -> Rows:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield f"{path}, line {number}", line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number}: is not UTF-8 text; save the file as UTF-8.") from error


def _lines(path: Path) -> Rows:
    return ((where, {"prompt": line.strip()}) for where, line in _decoded(path) if line.strip())


def _jsonl(path: Path) -> Rows:
    return ((where, _loads(line, where)) for where, line in _decoded(path) if line.strip())


def _json(path: Path) -> Rows:
    rows = _loads("".join(line for _, line in _decoded(path)), str(path))
    if not isinstance(rows, list):
        raise UserError(f"{path}: is no list; write a JSON list of prompts.")
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", {"prompt": row} if isinstance(row, str) else row


def _loads(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not JSON ({error}); mend it.") from error


def _csv(path: Path) -> Rows:
    reader = csv.DictReader(line for _, line in _decoded(path))
    try:
        _check_columns(reader.fieldnames or [], path)
        for row in reader:
            where, images = f"{path}, line {reader.line_num}", row.get("images")
            if images and images.startswith("["):
                row["images"] = _loads(images, f"{where}, field images")
            yield where, row
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: is no CSV ({error}); mend it.") from error


def _parquet(path: Path) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _check_columns(names, path)
            columns = [name for name in (*TEXT, "user", "images") if name in names]
            rows = (row for batch in file.iter_batches(2**13, columns=columns) for row in batch.to_pylist())
            yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: is no parquet file that can be read ({str(error).splitlines()[0]}).") from error


def _check_columns(names: Any, path: Path) -> None:
    if not set(TEXT) & set(names):
        raise UserError(f"{path}: has no column {' or '.join(TEXT)}; its columns are {', '.join(names) or 'none'}.")


def _prompt(row: Any, folder: Path, where: str) -> Prompt:
    """The prompt of one row.

    Raises:
        UserError: A field is missing or no text, or an input picture is not there.
    """
    field = next((name for name in TEXT if isinstance(row, dict) and row.get(name) is not None), None)
    if field is None:
        raise UserError(f"{where}: has no {' or '.join(TEXT)}; give every row one.")
    text = row[field]
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}, field {field}: is {text!r}; write the prompt as text.")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(f"{where}, field {field}: has half a character (a lone surrogate); mend the text.")
    images = row.get("images") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise UserError(f"{where}, field images: is {str(images)[:60]}; give a list of paths beside the file.")
    try:
        found = tuple(Beside(folder)(name, "images") for name in images)
    except UserError as error:
        raise UserError(f"{where}, {error}", error.reason) from error
    user = row.get("user")
    return Prompt(text, None if user in (None, "") else str(user), found)
