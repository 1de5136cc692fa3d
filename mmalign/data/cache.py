"""The cache: what the frozen encoders made of a data set, so that training loads none of them.

A cache folder holds

    media-KEY/     pieces of media (latents), shared by all data sets that were encoded the same way
    prompts-KEY/   pieces of prompts, likewise; each distinct prompt once, and the empty one
    items-KEY/     one data set: its comparisons by the keys of their pieces, the rows left out, an index, a manifest

A piece is stored under a hash of its content; KEY is a hash of everything that decides what the encoders give
(`facts`), so whatever changes there makes another folder and never a wrong hit. `fill.py` makes all this.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mmalign import storage
from mmalign.records import Comparison, UserError

EMPTY = "empty"  # the key of the empty prompt as caption dropout needs it
SHARD = re.compile(r"(media|prompts)-\w+/[\w-]+\.safetensors")
ITEMS, INDEX, QUARANTINE, FACTS = "items.parquet", "index.parquet", "quarantine.jsonl", "facts.json"


def digest(*parts: Any) -> str:
    """32 hex digits: a hash of plain values."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Facts:
    """Everything that decides what is in a cache.

    Attributes:
        media: of the media's encoder: its files' hashes, precision, resolution ...
        prompts: of the prompts' encoders.
        data: of the data set: its files, split, limit ...
    """

    media: Mapping[str, Any]
    prompts: Mapping[str, Any]
    data: Mapping[str, Any]

    def folder(self, cache_dir: str | Path, kind: str) -> Path:
        """Where "media", "prompts" or "items" lie."""
        known = {"media": (self.media,), "prompts": (self.prompts,), "items": (self.media, self.prompts, self.data)}
        return Path(cache_dir) / f"{kind}-{digest(*known[kind])[:16]}"


@dataclass(frozen=True)
class Cached(Comparison):
    """A comparison whose media are keys of pieces, which need not be opened.

    Attributes:
        asked: key of its prompt's piece.
        shape: the modality's frame of it.
        first: number of its first medium among all of the data set.
        pieces: of its prompt and of its media, where they were read ahead.
    """

    asked: str = ""
    shape: tuple[int, ...] = ()
    first: int = 0
    pieces: Sequence[Mapping[str, Tensor]] = ()


class Pieces:
    """Pieces by their keys, read from shards that are mapped into memory when they are first needed.

    Args:
        index: key -> number of its shard.
        shards: paths.
    """

    def __init__(self, index: Mapping[str, int], shards: Sequence[Path]) -> None:
        self.index, self.shards = index, shards
        self.shard = lru_cache(maxsize=None)(self._open)

    def _open(self, number: int) -> tuple[Any, dict[str, list[str]]]:
        from safetensors import SafetensorError, safe_open

        try:
            file = safe_open(self.shards[number], "pt")
        except (SafetensorError, OSError) as error:
            reason = f"is damaged ({error}); mend it with mmalign cache --verify"
            raise UserError(f"{self.shards[number]}: {reason}.") from error
        names: dict[str, list[str]] = {}
        for name in file.keys():  # noqa: SIM118
            key, _, field = name.partition("/")
            names.setdefault(key, []).append(field)
        return file, names

    def __getitem__(self, key: str) -> dict[str, Tensor]:
        file, names = self.shard(self.index[key])
        return {field: file.get_tensor(f"{key}/{field}") for field in names[key]}


class Cache(Sequence):
    """A filled cache as training reads it: the comparisons, and their pieces.

    Attributes:
        folder: `items-KEY`.
        pieces: by key.
        rows: the table of items, in memory.
    """

    def __init__(self, folder: Path) -> None:
        import pyarrow.parquet as pq

        self.folder = folder
        self.rows = pq.read_table(folder / ITEMS)
        index = _index(folder)
        shards = index["shard"].combine_chunks().dictionary_encode()
        paths = [folder.parent / name for name in shards.dictionary.to_pylist()]
        self.pieces = Pieces(dict(zip(index["key"].to_pylist(), shards.indices.to_pylist(), strict=True)), paths)
        members = np.array([len(media) for media in self.rows["media"].to_pylist()], dtype=np.int64)
        self.first = np.concatenate([[0], np.cumsum(members)])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[place] for place in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        number = int(number) % len(self)
        row = self.rows.slice(number, 1).to_pylist()[0]
        return Cached(
            id=row["id"],
            prompt=row["prompt"],
            media=tuple(row["media"]),
            score=tuple(row["score"]),
            weight=row["weight"],
            user=row["user"],
            asked=row["asked"],
            shape=tuple(row["shape"]),
            first=int(self.first[number]),
        )

    @property
    def kinds(self) -> np.ndarray:
        """[len] a number for each shape, for batches of one shape."""
        shapes = [tuple(shape) for shape in self.rows["shape"].to_pylist()]
        known = {shape: number for number, shape in enumerate(sorted(set(shapes)))}
        return np.array([known[shape] for shape in shapes])

    def encoded(self, modality: Any, items: Sequence[Cached]) -> Any:
        """What `modality.encode` gave for these comparisons."""
        pieces = [item.pieces or self._pieces(item) for item in items]
        return modality.assemble([asked for asked, *_ in pieces], [media for _, *media in pieces])

    def read(self, items: Sequence[Cached], device: Any) -> list[Cached]:
        """The same comparisons with their pieces read; for a GPU they are under way to it, by way of pinned memory."""

        def fetched(value: Tensor) -> Tensor:
            # A piece is a view of a mapped file, which nobody has read yet
            return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.clone()

        return [
            replace(item, pieces=[{n: fetched(v) for n, v in piece.items()} for piece in self._pieces(item)])
            for item in items
        ]

    def _pieces(self, item: Cached) -> list[dict[str, Tensor]]:
        return [self.pieces[key] for key in (item.asked, *item.media)]

    @property
    def counts(self) -> dict[str, int]:
        """How many rows were read, were cached, and were left out by reason."""
        return storage.read_json(self.folder / FACTS)["counts"]


def _index(folder: Path) -> Any:
    """The table of a data set's pieces.

    Raises:
        UserError: it is damaged, or names a file that is no shard of this cache.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        index = pq.read_table(folder / INDEX)
        if all(SHARD.fullmatch(name) for name in index["shard"].unique().to_pylist()):
            return index
        reason = "it names files that are no shards of a cache"
    except (pa.ArrowException, OSError, LookupError, TypeError) as error:
        reason = str(error).splitlines()[0]
    raise UserError(f"{folder / INDEX}: cannot be used ({reason}); remove {folder} and call mmalign cache again.")


def open_cache(cache_dir: str | Path, facts: Facts) -> Cache | None:
    """The cache of a data set; None where it is not complete, or a shard is missing or of another size."""
    folder = facts.folder(cache_dir, "items")
    if not (folder / storage.MANIFEST).is_file():
        return None
    index = _index(folder)
    for name, size in set(zip(index["shard"].to_pylist(), index["bytes"].to_pylist(), strict=True)):
        path = folder.parent / name
        if not path.is_file() or path.stat().st_size != size:
            return None
    return Cache(folder)


def verify(cache_dir: str | Path, facts: Facts) -> list[str]:
    """Reads every shard of a data set and removes those that are not what was written; returns their names.

    The next fill makes them again, and nothing else.

    Raises:
        UserError: there is no such cache.
    """
    folder = facts.folder(cache_dir, "items")
    if not folder.is_dir():
        raise UserError(f"{cache_dir}: has no complete cache of this recipe; make it with mmalign cache.")
    index = _index(folder)
    hashes = dict(zip(index["shard"].to_pylist(), index["sha256"].to_pylist(), strict=True))
    damaged = []
    for name, expected in sorted(hashes.items()):
        path = folder.parent / name
        if not path.is_file() or storage.sha256(path) != expected:
            path.unlink(missing_ok=True)
            damaged.append(name)
    if not storage.verify(folder):
        shutil.rmtree(folder)
        damaged.append(folder.name)
    return damaged
