"""Comparisons written so that `importers.read_comparisons` gives them back."""

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from mmalign.records import Comparison, UserError, open_image
from mmalign.storage import atomic_folder

SHARD_ROWS, GROUP_ROWS = 1000, 100  # comparisons in a parquet file, and in what a reader loads at once


def write_comparisons(folder: str | Path, comparisons: Sequence[Comparison], *, layout: str = "jsonl") -> None:
    """Write comparisons so that `read_comparisons` gives them back; a former export there is replaced.

    Args:
        folder: Where to.
        comparisons: What; pictures given encoded are kept byte by byte, others become PNG.
        layout: "jsonl" (`comparisons.jsonl` and media/) or "parquet" (shards that `datasets` reads).

    Raises:
        UserError: An unknown layout, a picture that cannot be read, or a folder that holds something else.
    """
    writers = {"jsonl": _write_jsonl, "parquet": _write_parquet}
    if layout not in writers:
        raise UserError(f"layout {layout!r}: there are {' and '.join(writers)}.")
    try:
        with atomic_folder(folder) as temp:
            writers[layout](temp, comparisons)
    except FileExistsError as error:
        raise UserError(f"{error}; choose another folder.") from error


def _write_jsonl(folder: Path, comparisons: Sequence[Comparison]) -> None:
    (folder / "media").mkdir()

    def stored(medium: Any, name: str) -> str:
        data, kind = _encoded(medium, name)
        path = folder / "media" / f"{hashlib.sha256(data).hexdigest()[:24]}.{kind}"
        path.write_bytes(data)
        return path.relative_to(folder).as_posix()

    with (folder / "comparisons.jsonl").open("w", encoding="utf-8") as file:
        for row in _plain_rows(comparisons, stored):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_parquet(folder: Path, comparisons: Sequence[Comparison]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features, List, Value
    from datasets import Image as Picture

    number, text = Value("float64"), Value("string")
    schema = Features(
        id=text,
        prompt=text,
        media=List(Picture()),
        score=List(number),
        weight=number,
        user=text,
        condition=List(Picture()),
        source=List(text),
        aspects=List({"name": text, "score": List(number)}),
    ).arrow_schema
    shards = -(-len(comparisons) // SHARD_ROWS)
    for shard in range(shards):
        rows = comparisons[shard * SHARD_ROWS : (shard + 1) * SHARD_ROWS]
        plain = _plain_rows(rows, lambda *medium: {"bytes": _encoded(*medium)[0]})
        with pq.ParquetWriter(folder / f"train-{shard:05}-of-{shards:05}.parquet", schema) as writer:
            while group := list(islice(plain, GROUP_ROWS)):
                for row in group:
                    row["aspects"] = [{"name": k, "score": v} for k, v in row["aspects"].items()]
                writer.write_table(pa.Table.from_pylist(group, schema))


def _plain_rows(comparisons: Iterable[Comparison], stored: Callable[[Any, str], Any]) -> Iterator[dict[str, Any]]:
    """The comparisons as dicts; `stored(medium, its name in an error)` says what stands for a medium."""
    for item in comparisons:
        where = f"comparison {item.id!r}"
        condition = item.condition and [stored(medium, f"{where}, condition") for medium in item.condition]
        yield {
            "id": item.id,
            "prompt": item.prompt,
            "media": [stored(medium, f"{where}, picture {n}") for n, medium in enumerate(item.media)],
            "score": list(item.score),
            "weight": item.weight,
            "user": item.user,
            "condition": condition,
            "source": list(item.source),
            "aspects": {name: list(values) for name, values in item.aspects.items()},
        }


def _encoded(medium: Any, name: str) -> tuple[bytes, str]:
    """A picture's file content and its kind ("png", "jpeg" …), checked to decode."""
    image = open_image(medium, name=name)
    source = (medium.get("bytes") or medium.get("path")) if isinstance(medium, Mapping) else medium
    if isinstance(source, str | Path):
        source = Path(source).read_bytes()
    if not isinstance(source, bytes):
        stream = io.BytesIO()
        image.save(stream, "PNG", compress_level=1)
        source = stream.getvalue()
    return source, (Image.open(io.BytesIO(source)).format or "png").lower()
