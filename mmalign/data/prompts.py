"""Prompts of a file, with their user and input pictures: one reader for every command."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mmalign.records import UserError

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
    prompts = list(islice(readers.get(path.suffix.lower(), _lines)(path), limit))
    if not prompts:
        raise UserError(f"{path}: has no prompts; write one a line.")
    return prompts


def _decoded(path: Path) -> Iterator[tuple[int, str]]:
    """Number from 1 and text of every line, with its end."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number}: is not UTF-8 text; save the file as UTF-8.") from error


def _lines(path: Path) -> Iterator[Prompt]:
    return (Prompt(line.strip()) for _, line in _decoded(path) if line.strip())


def _jsonl(path: Path) -> Iterator[Prompt]:
    for number, line in _decoded(path):
        if line.strip():
            yield _prompt(_loads(line, f"{path}, line {number}"), path, f"line {number}")


def _json(path: Path) -> Iterator[Prompt]:
    rows = _loads("".join(line for _, line in _decoded(path)), str(path))
    if not isinstance(rows, list):
        raise UserError(f"{path}: is no list; write a JSON list of prompts.")
    for number, row in enumerate(rows, 1):
        yield _prompt({TEXT[0]: row} if isinstance(row, str) else row, path, f"row {number}")


def _loads(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not JSON ({error}); mend it.") from error


def _csv(path: Path) -> Iterator[Prompt]:
    reader = csv.DictReader(line for _, line in _decoded(path))
    try:
        _check_columns(reader.fieldnames or [], path)
        for row in reader:
            images = row.get("images")
            if images and images.startswith("["):
                row["images"] = _loads(images, f"{path}, line {reader.line_num}, field images")
            yield _prompt(row, path, f"line {reader.line_num}")
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: is no CSV ({error}); mend it.") from error


def _parquet(path: Path) -> Iterator[Prompt]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _check_columns(names, path)
            columns = [name for name in (*TEXT, "user", "images") if name in names]
            number = 0
            for rows in file.iter_batches(2**13, columns=columns):
                for row in rows.to_pylist():
                    number += 1
                    yield _prompt(row, path, f"row {number}")
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: is no parquet file that can be read ({str(error).splitlines()[0]}).") from error


def _check_columns(names: Any, path: Path) -> None:
    if not set(TEXT) & set(names):
        raise UserError(f"{path}: has no column {' or '.join(TEXT)}; its columns are {', '.join(names) or 'none'}.")


def _prompt(row: Any, path: Path, where: str) -> Prompt:
    """The prompt of one row.

    Raises:
        UserError: A field is missing or no text, or an input picture is not there.
    """
    field = next((name for name in TEXT if isinstance(row, dict) and row.get(name) is not None), None)
    if field is None:
        raise UserError(f"{path}, {where}: has no {' or '.join(TEXT)}; give every row one.")
    text = row[field]
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{path}, {where}, field {field}: is {text!r}; write the prompt as text.")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(f"{path}, {where}, field {field}: has half a character (a lone surrogate); mend the text.")
    images = row.get("images") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise UserError(f"{path}, {where}, field images: is {str(images)[:60]}; give a list of paths beside the file.")
    for name in images:
        if not (path.parent / name).is_file():
            raise UserError(f"{path}, {where}, field images: there is no file {name!r}; add it, or mend the path.")
    user = row.get("user")
    return Prompt(text, None if user in (None, "") else str(user), tuple(path.parent / name for name in images))
