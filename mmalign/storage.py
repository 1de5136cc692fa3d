"""Files and folders that are either whole or absent: the only place that writes results.

Nothing is written under its final name. It grows under a hidden name beside it, is flushed to the disk,
and is renamed when complete; so a crash or a full disk leaves the last good version standing.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
LOCK = ".lock"
_PARTIAL = ".partial-"


def sha256(path: str | Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: str | Path) -> Any:
    """The value in a JSON file (UTF-8)."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_lines(path: str | Path) -> list[Any]:
    """The values in a JSONL file; nothing where there is none, nor of a last line that is still being written."""
    if not Path(path).is_file():
        return []
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n")[:-1]]


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as JSON, atomically."""
    with atomic_file(path) as temp:
        temp.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a path to write to; on success it becomes `path`, on any error it is removed.

    The name's ending is kept, as some writers choose their format by it.
    """
    path = Path(path)
    temp = _partial(path)
    try:
        yield temp
        _flush(temp)
        os.replace(temp, path)
        _flush(path.parent)
    finally:
        temp.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a folder to fill; on success it becomes `path`, with a manifest of sizes and hashes.

    A folder at `path` that was written so before is replaced, and stays untouched on any error.

    Raises:
        FileExistsError: `path` is a file, or a folder with something else in it.
    """
    path = Path(path)
    if path.exists() and not (path / MANIFEST).is_file() and (path.is_file() or any(path.iterdir())):
        raise FileExistsError(f"{path} holds something that was not written by mmalign")
    temp = _partial(path)
    temp.mkdir()
    try:
        yield temp
        write_json(temp / MANIFEST, _listing(temp))
        for entry in (*temp.rglob("*"), temp):
            _flush(entry)
        _swap(temp, path)
        _flush(path.parent)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def share(targets: Iterable[Path], make: Callable[[Path], None], *, locks: Path, pause: float = 0.2) -> None:
    """Makes files that several processes make together: each takes the next that nobody has made or is making.

    Returns when all are there. A process that dies lets go of its file, and another one takes it; so the same call
    resumes. Any number of processes may come at any time, on machines that share the disk.

    Args:
        targets: what to make; each is done when it exists.
        make: writes one, atomically.
        locks: folder for the lock files.
        pause: seconds between looks at those that others are making.
    """
    from filelock import FileLock, Timeout

    locks.mkdir(parents=True, exist_ok=True)
    pending = [path for path in targets if not path.exists()]
    while pending:
        held = []
        for path in pending:
            try:
                with FileLock(locks / f"{path.name}.lock", timeout=0):
                    if not path.exists():
                        make(path)
            except Timeout:
                held.append(path)
        pending = [path for path in held if not path.exists()]
        if pending:
            time.sleep(pause)


@contextlib.contextmanager
def only_writer(folder: str | Path) -> Iterator[None]:
    """Keeps a folder for this process until the block ends or the process dies; made here, it goes if it stays empty.

    Raises:
        BlockingIOError: another process has it.
    """
    from filelock import FileLock, Timeout

    folder = Path(folder)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        reason = "another run is writing there; let it end, or choose another output folder"
        raise BlockingIOError(errno.EWOULDBLOCK, reason, str(folder)) from None
    try:
        yield
    finally:
        if made and [path.name for path in folder.iterdir()] == [LOCK]:
            shutil.rmtree(folder)
        lock.release()


def load_tensors(path: str | Path, *, mmap: bool = False) -> Any:
    """What `torch.save` wrote, on the CPU: tensors and plain values, never other people's code.

    Args:
        path: the file.
        mmap: leave the tensors in the file until they are used, if its format allows it.

    Raises:
        ValueError: it holds something else, is damaged, or unpacks to more than it is (torch packs nothing).
    """
    import torch

    try:
        packed = zipfile.is_zipfile(path)
        if packed:
            with zipfile.ZipFile(path) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > os.path.getsize(path):
                    raise ValueError("it unpacks to more than it is")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=packed and mmap)
    except Exception as error:  # the unpickler raises nearly anything on damaged files
        raise ValueError(next(iter(str(error).strip().splitlines()), type(error).__name__)) from error


def verify(folder: str | Path) -> bool:
    """Whether every file of the folder's manifest is there with its size and hash."""
    folder = Path(folder)
    try:
        content = (folder / MANIFEST).read_text(encoding="utf-8")
        listing = json.loads(content)
        inside = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        # The manifest ends with a line's end: without it, it was cut off too
        return (
            content.endswith("\n")
            and bool(listing)
            and listing.keys() <= inside
            and all(
                (folder / name).stat().st_size == entry["size"] and sha256(folder / name) == entry["sha256"]
                for name, entry in listing.items()
            )
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def newest(folder: str | Path, prefix: str = "checkpoint-") -> Path | None:
    """The folder `prefix`N with the largest N that verifies, or None."""
    found = Path(folder).glob(f"{prefix}*")
    numbered = {int(path.name[len(prefix) :]): path for path in found if path.name[len(prefix) :].isdecimal()}
    return next((numbered[n] for n in sorted(numbered, reverse=True) if verify(numbered[n])), None)


def sweep(folder: str | Path) -> None:
    """Remove what killed writers left half-written. Only for a folder with no other writer."""
    for path in Path(folder).glob(f"{_PARTIAL}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _partial(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f"{_PARTIAL}{secrets.token_hex(4)}-{path.name}")


def _listing(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)} for path in files
    }


def _swap(new: Path, path: Path) -> None:
    """Rename `new` to `path`; a folder already there steps aside first, and back if that fails."""
    if not path.exists():
        os.rename(new, path)
        return
    old = _partial(path)
    os.rename(path, old)
    try:
        os.rename(new, path)
    except OSError:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    """Ask the disk to keep a file's content or a folder's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
