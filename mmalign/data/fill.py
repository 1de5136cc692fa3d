"""Filling a cache: look, plan, encode, finish; every step is made of files that are there or not.

look     every comparison is read and its media hashed; what cannot be used is named with its reason
plan     which pieces are missing, and in which shard each goes: a function of the data alone
encode   a shard a file
finish   comparisons whose pieces are all there become the items; the others are listed

Processes share the files of a step (`storage.share`), so a fill may be killed and called again, and any number of
processes may fill one cache. The result is the same, byte for byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mmalign import storage
from mmalign.data.cache import EMPTY, FACTS, INDEX, ITEMS, QUARANTINE, Cache, Facts, digest, open_cache
from mmalign.data.importers import Dataset
from mmalign.records import Comparison, Sound, Text, UserError, Video, open_image
from mmalign.surrogate.draws import generator

LOOK_ROWS, SHARD_PIECES, BATCH = 1024, 256, 8
NOT_BROKEN = {"tie", "no_label", "repeated", "identical"}  # whole rows that say nothing
Stage = Callable[[str, int], Any]


def silent(title: str, total: int) -> Any:
    """Shows nothing."""
    return contextlib.nullcontext(lambda count: None)


@dataclass(frozen=True)
class Fill:
    """How a cache is filled.

    Attributes:
        cache_dir: where caches lie.
        facts: of encoders and data.
        data: read with `strict=False`.
        encoders: loads the modality, at least its encoders; not called where nothing is to be done.
        moments: keep mean and deviation of the posterior; False keeps one sample, half the size.
        max_quarantined: stop above this share of broken rows.
        workers: threads that read and decode.
        stage: shows progress: (title, total) -> context manager that gives a function of how many were just done.
    """

    cache_dir: Path
    facts: Facts
    data: Dataset
    encoders: Callable[[], Any]
    moments: bool = True
    max_quarantined: float = 0.05
    workers: int = 4
    stage: Stage = silent
    loaded: list[Any] = field(default_factory=list)

    def __call__(self) -> Cache:
        """Fills what is missing and opens the cache.

        Raises:
            UserError: too many rows are broken, or none is left.
        """
        work = self.work
        while (cache := open_cache(self.cache_dir, self.facts)) is None:
            self.__dict__.pop("_planned", None)  # of a plan that another process has carried out
            try:
                work.mkdir(parents=True, exist_ok=True)
                self._together("Looking at the data", self._looks(), self._look)
                storage.share([work / "plan.parquet"], self._plan, locks=work / "locks")
                self._together("Encoding", self._shards(), self._encode)
                storage.share([work / "finished"], self._finish, locks=work / "locks")
            except FileNotFoundError:
                if open_cache(self.cache_dir, self.facts) is None:  # else another process has finished and tidied up
                    raise
        shutil.rmtree(work, ignore_errors=True)
        return cache

    @property
    def work(self) -> Path:
        """Where an unfinished fill keeps its files."""
        items = self.facts.folder(self.cache_dir, "items")
        return items.with_name(items.name.replace("items", "unfinished"))

    @property
    def modality(self) -> Any:
        """Loaded at its first use."""
        if not self.loaded:
            self.loaded.append(self.encoders())
        return self.loaded[0]

    def _together(self, title: str, targets: Sequence[Path], make: Callable[[Path], None]) -> None:
        with self.stage(title, len(targets)) as advance:
            seen = sum(path.exists() for path in targets)
            advance(seen)

            def made(path: Path) -> None:
                make(path)
                advance(1)

            storage.share(targets, made, locks=self.work / "locks")

    # -- look ----------------------------------------------------------------------------------------------

    def _looks(self) -> list[Path]:
        count = -(-len(self.data.comparisons) // LOOK_ROWS)
        return [self.work / f"look-{number:06}.parquet" for number in range(count)]

    def _look(self, path: Path) -> None:
        start = int(path.stem.rpartition("-")[2]) * LOOK_ROWS
        places = range(start, min(start + LOOK_ROWS, len(self.data.comparisons)))
        frame = self.modality.frame
        with ThreadPoolExecutor(self.workers) as pool:
            rows = list(pool.map(lambda place: _seen(self.data.comparisons, place, frame), places))
        _write(path, rows, LOOK)

    # -- plan ----------------------------------------------------------------------------------------------

    def _plan(self, path: Path) -> None:
        """The keys that are missing, in the order in which they first come up, cut into shards."""
        self._check(self._left_out({}))
        stored = {kind: self._stored(kind) for kind in ("media", "prompts")}
        wanted: dict[str, dict[str, tuple[int, int]]] = {"media": {}, "prompts": {EMPTY: (-1, 0)}}
        for row in self._seen_rows():
            if row["reason"] is None:
                wanted["prompts"].setdefault(row["asked"], (row["place"], 0))
                for number, key in enumerate(row["media"]):
                    wanted["media"].setdefault(key, (row["place"], number))
        rows = []
        for kind, keys in wanted.items():
            missing = [key for key in keys if key not in stored[kind]]
            for start in range(0, len(missing), SHARD_PIECES):
                part = missing[start : start + SHARD_PIECES]
                name = f"{digest(part)[:16]}.safetensors"
                places = ((key, *keys[key]) for key in part)
                rows += [
                    {"kind": kind, "shard": name, "key": key, "place": place, "number": number}
                    for key, place, number in places
                ]
        _write(path, rows, PLAN)

    def _seen_rows(self) -> Iterator[dict[str, Any]]:
        import pyarrow.parquet as pq

        for path in self._looks():
            yield from pq.read_table(path).to_pylist()

    def _stored(self, kind: str) -> dict[str, str]:
        """Key -> shard, relative to the cache's folder, of every whole piece."""
        from safetensors import safe_open

        folder = self.facts.folder(self.cache_dir, kind)
        found: dict[str, str] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                names = file.keys()
            found |= dict.fromkeys((name.partition("/")[0] for name in names), f"{folder.name}/{path.name}")
        return found

    def _check(self, left_out: Sequence[Mapping[str, Any]]) -> None:
        """Raises UserError, and lists the rows, where more are broken than may be."""
        reasons = Counter(row["reason"] for row in left_out)
        broken = {reason: count for reason, count in sorted(reasons.items()) if reason not in NOT_BROKEN}
        share = sum(broken.values()) / max(1, self.data.counts["read"])
        if share > self.max_quarantined or len(left_out) == self.data.counts["read"]:
            path = Path(self.cache_dir) / QUARANTINE
            _write_lines(path, left_out)
            listed = ", ".join(f"{count} {reason}" for reason, count in (broken or reasons).items())
            raise UserError(
                f"{sum(broken.values())} of {self.data.counts['read']} rows are broken ({listed}): {share:.1%}, where"
                f" {self.max_quarantined:.1%} may be. They are listed in {path}: mend them, or raise --max-quarantined."
            )

    # -- encode --------------------------------------------------------------------------------------------

    @cached_property
    def _planned(self) -> dict[Path, list[dict[str, Any]]]:
        import pyarrow.parquet as pq

        shards: dict[Path, list[dict[str, Any]]] = {}
        for row in pq.read_table(self.work / "plan.parquet").to_pylist():
            shards.setdefault(self.facts.folder(self.cache_dir, row["kind"]) / row["shard"], []).append(row)
        return shards

    def _shards(self) -> list[Path]:
        return list(self._planned)

    def _encode(self, path: Path) -> None:
        """Writes a shard; pieces that cannot be made are named in its header."""
        from safetensors.torch import save_file

        rows = self._planned[path]
        make = self._media if rows[0]["kind"] == "media" else self._prompts
        tensors: dict[str, torch.Tensor] = {}
        bad: dict[str, tuple[str, str]] = {}
        for row, piece in zip(rows, make(rows), strict=True):
            if isinstance(piece, UserError):
                bad[row["key"]] = (piece.reason, str(piece))
                continue
            for name, value in piece.items():
                if value is not None:
                    tensors[f"{row['key']}/{name}"] = value.cpu().contiguous()
        with storage.atomic_file(self.work / path.name) as temp:
            save_file(tensors, temp, metadata={"bad": json.dumps(bad)})
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.work / path.name, path)

    def _media(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
        with ThreadPoolExecutor(self.workers) as pool:
            opened = list(pool.map(lambda row: _opened(self.data.comparisons, row["place"], row["number"]), rows))
        good = [member for member in opened if not isinstance(member, UserError)]
        made = iter([piece for part in _batches(good) for piece in _tried(self.modality.encode_media, part)])
        for row, member in zip(rows, opened, strict=True):
            piece = member if isinstance(member, UserError) else next(made)
            if not self.moments and not isinstance(piece, UserError) and "x0_std" in piece:
                piece = _sampled(piece, row["key"])
            yield piece

    def _prompts(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
        items = [self.data.comparisons[row["place"]] for row in rows if row["key"] != EMPTY]
        made = iter([piece for part in _batches(items) for piece in _tried(self.modality.encode_prompts, part)])
        for row in rows:
            yield next(made) if row["key"] != EMPTY else self._empty()

    def _empty(self) -> Any:
        try:
            return {name: value[0] for name, value in self.modality.empty().items()}
        except UserError as error:  # a token model has none
            return error

    # -- finish --------------------------------------------------------------------------------------------

    def _finish(self, path: Path) -> None:
        """Writes the items, or raises where too many rows are broken."""
        bad = self._bad()
        kept = [row for row in self._seen_rows() if row["reason"] is None and not _faults(row, bad)]
        left_out = self._left_out(bad)
        self._check(left_out)
        counts = {"read": self.data.counts["read"], "cached": len(kept), **Counter(row["reason"] for row in left_out)}
        target = self.facts.folder(self.cache_dir, "items")
        with storage.atomic_folder(target) as folder:
            _write(folder / ITEMS, [{name: row[name] for name in ITEM} for row in kept], ITEM)
            self._index(folder / INDEX, kept)
            _write_lines(folder / QUARANTINE, left_out)
            storage.write_json(folder / FACTS, {**asdict(self.facts), "counts": counts})
        path.touch()

    def _bad(self) -> dict[str, tuple[str, str]]:
        """Key -> reason and detail of the pieces that this plan could not make."""
        from safetensors import safe_open

        bad: dict[str, tuple[str, str]] = {}
        for path in self._shards():
            with safe_open(path, "pt") as file:
                bad |= json.loads(file.metadata()["bad"])
        return bad

    def _left_out(self, bad: Mapping[str, tuple[str, str]]) -> list[dict[str, Any]]:
        """The rows that were not read, then those whose media or prompt cannot be used."""
        rows = [row._asdict() for row in self.data.left_out]
        for row in self._seen_rows():
            found = (row["reason"], row["detail"]) if row["reason"] else next(iter(_faults(row, bad)), None)
            if found:
                rows.append({"row": row["row"], "id": row["id"], "reason": found[0], "detail": found[1]})
        return rows

    def _index(self, path: Path, kept: Sequence[Mapping[str, Any]]) -> None:
        shards = self._stored("media") | self._stored("prompts")
        keys = dict.fromkeys(key for row in kept for key in (row["asked"], *row["media"]))
        keys |= {EMPTY: None} if EMPTY in shards else {}
        root = Path(self.cache_dir)
        known = {name: (storage.sha256(root / name), (root / name).stat().st_size) for name in {*shards.values()}}
        rows = [
            {"key": key, "shard": shards[key], "sha256": known[shards[key]][0], "bytes": known[shards[key]][1]}
            for key in keys
        ]
        _write(path, rows, INDEXED)


def content(medium: Any) -> str:
    """A hash of what a medium holds: of a file's bytes, a text, an opened picture's pixels.

    Raises:
        UserError: no such file.
    """
    if isinstance(medium, Text):
        return digest("text", str(medium))
    source = medium.source if isinstance(medium, Sound | Video) else medium
    source = (source.get("bytes") or source.get("path")) if isinstance(source, Mapping) else source
    if hasattr(source, "tobytes"):
        return digest(source.mode, source.size, hashlib.blake2b(source.tobytes()).hexdigest())
    if isinstance(source, str | Path):
        try:
            source = Path(source).read_bytes()
        except OSError as error:
            raise UserError(f"{source}: cannot be read ({error.strerror}).", reason="missing_file") from error
    return hashlib.blake2b(source, digest_size=16).hexdigest()


def _seen(comparisons: Any, place: int, frame: Callable[[Comparison], tuple[int, ...]]) -> dict[str, Any]:
    """What the plan needs to know of a comparison, or why it cannot be used."""
    numbers = getattr(comparisons, "rows", None)
    row: dict[str, Any] = dict.fromkeys(LOOK)
    row |= {"place": place, "row": place if numbers is None else int(numbers[place]), "id": ""}
    try:
        item = comparisons[place]
        row["id"] = item.id
        contents = [content(medium) for medium in item.media]
        if len(contents) > 1 and len(set(contents)) == 1:
            raise UserError(f"comparison {item.id!r}: its media are all the same.", reason="identical")
        shape = frame(item)
        asked = digest(item.prompt, [content(one) for one in item.condition or ()])
        fields = {name: getattr(item, name) for name in ("prompt", "score", "weight", "user")}
        row |= fields | {"asked": asked, "shape": shape, "media": [digest(one, shape) for one in contents]}
    except UserError as error:
        row |= {"reason": error.reason, "detail": str(error)}
    return row


def _opened(comparisons: Any, place: int, number: int) -> tuple[Comparison, int] | UserError:
    """The comparison with one medium opened, if it is a picture."""
    try:
        item = comparisons[place]
        media = list(item.media)
        if not isinstance(media[number], Text | Sound | Video):
            media[number] = open_image(media[number], name=f"comparison {item.id!r}, picture {number}")
        return replace(item, media=tuple(media)), number
    except UserError as error:
        return error


def _batches(members: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (members[start : start + BATCH] for start in range(0, len(members), BATCH))


def _tried(encode: Callable[[Sequence[Any]], list[Any]], part: Sequence[Any]) -> list[Any]:
    """A piece for each, or the error of the one that cannot be encoded: a batch with one in it is cut."""
    try:
        return encode(part)
    except UserError as error:
        return [error] if len(part) == 1 else [made for one in part for made in _tried(encode, [one])]


def _sampled(piece: Mapping[str, torch.Tensor], key: str) -> dict[str, torch.Tensor]:
    """The piece with one sample of its posterior, which is a function of its key."""
    noise = generator("posterior once", int(key, 16)).standard_normal(tuple(piece["x0"].shape), "float32")
    sample = piece["x0"] + piece["x0_std"] * torch.from_numpy(noise).to(piece["x0"])
    return {**{name: value for name, value in piece.items() if name != "x0_std"}, "x0": sample}


def _faults(row: Mapping[str, Any], bad: Mapping[str, tuple[str, str]]) -> list[tuple[str, str]]:
    return [bad[key] for key in (row["asked"], *row["media"]) if key in bad]


# Columns of the tables, by the names of pyarrow's types
ITEM = {"id": "string", "prompt": "string", "asked": "string", "media": "strings", "score": "doubles",
        "weight": "double", "user": "string", "shape": "ints"}  # fmt: skip
LOOK = {"place": "int64", "row": "int64", "reason": "string", "detail": "string", **ITEM}
PLAN = {"kind": "string", "shard": "string", "key": "string", "place": "int64", "number": "int64"}
INDEXED = {"key": "string", "shard": "string", "sha256": "string", "bytes": "int64"}


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in sorted(rows, key=lambda row: row["row"]))
    with storage.atomic_file(path) as temp:
        temp.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")


def _write(path: Path, rows: list[dict[str, Any]], columns: Mapping[str, str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    lists = {"strings": pa.list_(pa.string()), "doubles": pa.list_(pa.float64()), "ints": pa.list_(pa.int64())}
    schema = pa.schema([(name, lists.get(kind) or kind) for name, kind in columns.items()])
    with storage.atomic_file(path) as temp:
        pq.write_table(pa.Table.from_pylist(rows, schema), temp)
