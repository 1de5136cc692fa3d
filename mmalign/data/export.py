"""Comparisons written so that `importers.read_comparisons` gives them back."""

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

from PIL import Image

from mmalign.records import Comparison, Sound, Text, UserError, Video, open_image
from mmalign.storage import atomic_folder

SHARD_ROWS, GROUP_ROWS = 1000, 100  # comparisons in a parquet file, and in what a reader loads at once
KINDS = {Text: "text", Sound: "sound", Video: "video"}  # the column, or key, of media that are no pictures
ABOUT = {"sound": "sample_rate_hz", "video": "fps"}


def write_comparisons(folder: str | Path, comparisons: Iterable[Comparison], *, layout: str = "jsonl") -> None:
    """Write comparisons so that `read_comparisons` gives them back; a former export there is replaced.

    Args:
        folder: Where to.
        comparisons: What, read once and never held; pictures given encoded are kept byte by byte, others become PNG.
            `Text`, `Sound` and `Video` are written as they are.
        layout: "jsonl" (`comparisons.jsonl` and media/) or "parquet" (shards that `datasets` reads; all media of one
            kind).

    Raises:
        UserError: An unknown layout, a medium that cannot be read, or a folder that holds something else.
    """
    writers = {"jsonl": _write_jsonl, "parquet": _write_parquet}
    if layout not in writers:
        raise UserError(f"layout {layout!r}: there are {' and '.join(writers)}.")
    try:
        with atomic_folder(folder) as temp:
            writers[layout](temp, comparisons)
    except FileExistsError as error:
        raise UserError(f"{error}; choose another folder.") from error


def _write_jsonl(folder: Path, comparisons: Iterable[Comparison]) -> None:
    (folder / "media").mkdir()

    def stored(medium: Any, name: str) -> Any:
        kind = KINDS.get(type(medium))
        if kind == "text":
            return {"text": medium}
        data, ending = _encoded(medium, name)
        path = folder / "media" / f"{hashlib.sha256(data).hexdigest()[:24]}.{ending}"
        path.write_bytes(data)
        file = path.relative_to(folder).as_posix()
        return {kind: file, ABOUT[kind]: getattr(medium, ABOUT[kind])} if kind else file

    with (folder / "comparisons.jsonl").open("w", encoding="utf-8") as file:
        for row in _plain_rows(comparisons, stored):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_parquet(folder: Path, comparisons: Iterable[Comparison]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rest = iter(comparisons)
    first = next(rest, None)
    column = KINDS.get(type(first.media[0]), "media") if first else "media"
    schema = _schema(column)

    def rows() -> Iterator[dict[str, Any]]:
        for item in chain([first] if first else [], rest):
            if any(KINDS.get(type(medium), "media") != column for medium in item.media):
                raise UserError(f"comparison {item.id!r}: its media are not all {column}; write one kind a folder.")
            (row,) = _plain_rows([item], _in_table)
            row["aspects"] = [{"name": name, "score": values} for name, values in row["aspects"].items()]
            row[column] = row.pop("media")
            if column in ABOUT:
                row[ABOUT[column]] = [getattr(medium, ABOUT[column]) for medium in item.media]
            yield row

    plain, shard = rows(), 0
    group = list(islice(plain, GROUP_ROWS))
    while group or not shard:  # no comparisons make one empty file
        with pq.ParquetWriter(folder / f"train-{shard:05}.parquet", schema) as writer:
            written = 0
            while group and written < SHARD_ROWS:
                writer.write_table(pa.Table.from_pylist(group, schema))
                written += len(group)
                group = list(islice(plain, GROUP_ROWS))
        shard += 1


def _schema(column: str) -> Any:
    from datasets import Audio, Features, List, Value
    from datasets import Image as Picture
    from datasets import Video as Film

    number, text = Value("float64"), Value("string")
    kind = {"media": Picture(), "text": text, "sound": Audio(), "video": Film()}[column]
    about = {"sample_rate_hz": List(Value("int64"))} if column == "sound" else {"fps": List(number)}
    fields = {
        "id": text,
        "prompt": text,
        column: List(kind),
        **(about if column in ABOUT else {}),
        "score": List(number),
        "weight": number,
        "user": text,
        "condition": List(Picture()),
        "source": List(text),
        "aspects": List({"name": text, "score": List(number)}),
    }
    return Features(fields).arrow_schema


def _in_table(medium: Any, name: str) -> Any:
    return str(medium) if isinstance(medium, Text) else {"bytes": _encoded(medium, name)[0]}


def _plain_rows(comparisons: Iterable[Comparison], stored: Callable[[Any, str], Any]) -> Iterator[dict[str, Any]]:
    """The comparisons as dicts; `stored(medium, its name in an error)` says what stands for a medium."""
    for item in comparisons:
        where = f"comparison {item.id!r}"
        condition = item.condition and [stored(medium, f"{where}, condition") for medium in item.condition]
        yield {
            "id": item.id,
            "prompt": item.prompt,
            "media": [stored(medium, f"{where}, medium {n}") for n, medium in enumerate(item.media)],
            "score": list(item.score),
            "weight": item.weight,
            "user": item.user,
            "condition": condition,
            "source": list(item.source),
            "aspects": {name: list(values) for name, values in item.aspects.items()},
        }


def _encoded(medium: Any, name: str) -> tuple[bytes, str]:
    """A medium's file content and its ending ("png", "jpeg", "wav" …); a picture is checked to decode."""
    if isinstance(medium, Sound | Video):
        return _file(medium, name)
    image = open_image(medium, name=name)
    source = (medium.get("bytes") or medium.get("path")) if isinstance(medium, Mapping) else medium
    if isinstance(source, str | Path):
        source = Path(source).read_bytes()
    if not isinstance(source, bytes):
        stream = io.BytesIO()
        image.save(stream, "PNG", compress_level=1)
        source = stream.getvalue()
    return source, (Image.open(io.BytesIO(source)).format or "png").lower()


def _file(medium: Sound | Video, name: str) -> tuple[bytes, str]:
    """An encoded sound's or video's content; its ending is that of its file, or a usual one."""
    if isinstance(medium.source, bytes):
        return medium.source, "wav" if isinstance(medium, Sound) else "mp4"
    path = Path(medium.source)
    try:
        return path.read_bytes(), path.suffix.lstrip(".") or "bin"
    except OSError as error:
        raise UserError(f"{name}: {path} cannot be read ({error.strerror}); check the path.", "missing_file") from error
