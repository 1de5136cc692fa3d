import errno
import os
import subprocess
import sys

import pytest

from mmalign import storage


def save(path, text):
    with storage.atomic_folder(path) as folder:
        (folder / "deep").mkdir()
        (folder / "begun").touch()
        (folder / "weights.bin").write_text(text)
        (folder / "deep" / "state.json").write_text(text * 2)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_folder_verifies_and_is_replaced_whole(tmp_path):
    target = tmp_path / "runs" / "checkpoint-1"
    save(target, "first")
    assert storage.verify(target)
    save(target, "second")
    assert storage.verify(target)
    assert (target / "weights.bin").read_text() == "second"
    assert names(tmp_path / "runs") == ["checkpoint-1"]


def test_any_damage_fails_verification(tmp_path):
    numbers = iter(range(9))

    def damaged(change):
        target = tmp_path / f"folder-{next(numbers)}"
        save(target, "text")
        change(target)
        return not storage.verify(target)

    assert damaged(lambda folder: (folder / "weights.bin").write_text("tex_"))
    assert damaged(lambda folder: (folder / "weights.bin").write_text("tex"))
    assert damaged(lambda folder: (folder / "deep" / "state.json").unlink())
    assert damaged(lambda folder: (folder / storage.MANIFEST).unlink())
    assert damaged(lambda folder: (folder / storage.MANIFEST).write_text("{"))
    assert damaged(lambda folder: (folder / storage.MANIFEST).write_text("[]x"))
    assert not storage.verify(tmp_path / "absent")


def test_newest_passes_over_damaged_and_foreign_folders(tmp_path):
    assert storage.newest(tmp_path / "absent") is None
    for step in (9, 10, 100):
        save(tmp_path / f"checkpoint-{step}", "text")
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-100" / "weights.bin").write_text("cut")
    assert storage.newest(tmp_path) == tmp_path / "checkpoint-10"


def test_an_error_leaves_the_old_version(tmp_path):
    save(tmp_path / "folder", "old")
    storage.write_json(tmp_path / "file.json", {"old": 1})
    with pytest.raises(TypeError):
        save(tmp_path / "folder", 3)
    with pytest.raises(TypeError):
        storage.write_json(tmp_path / "file.json", {"new": object()})
    assert storage.read_json(tmp_path / "file.json") == {"old": 1}
    assert storage.verify(tmp_path / "folder")
    assert names(tmp_path) == ["file.json", "folder"]


def test_what_is_not_ours_is_never_replaced(tmp_path):
    (tmp_path / "holiday").mkdir()
    save(tmp_path / "holiday", "an empty folder may be used")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "cat.png").touch()
    for name in ("pictures", "pictures/cat.png"):
        with pytest.raises(FileExistsError):
            save(tmp_path / name, "text")
    assert names(tmp_path / "pictures") == ["cat.png"]


@pytest.mark.parametrize("failing", ["fsync", "rename"])
def test_a_full_disk_leaves_the_old_version(tmp_path, monkeypatch, failing):
    save(tmp_path / "folder", "old")
    intact = getattr(os, failing)
    calls = []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == 2:  # the second rename is the one that puts the new folder into place
            raise OSError(errno.ENOSPC, "No space left on device")
        return intact(*arguments)

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path / "folder", "new")
    assert storage.verify(tmp_path / "folder")
    assert (tmp_path / "folder" / "weights.bin").read_text() == "old"
    assert names(tmp_path) == ["folder"]


CRASH = """
import os, sys
from mmalign import storage
setattr(*{"body": (sys, "unused"), "manifest": (storage, "_listing"), "flush": (storage, "_flush"),
          "swap": (storage, "_swap")}[sys.argv[2]], lambda *_: os._exit(9))
with storage.atomic_folder(sys.argv[1]) as folder:
    (folder / "weights.bin").write_text("new")
    if sys.argv[2] == "body":
        os._exit(9)
"""


@pytest.mark.parametrize("moment", ["body", "manifest", "flush", "swap"])
def test_a_crash_inside_a_save_leaves_the_last_good(tmp_path, moment):
    save(tmp_path / "checkpoint-1", "old")
    command = [sys.executable, "-c", CRASH, str(tmp_path / "checkpoint-2"), moment]
    assert subprocess.run(command, check=False).returncode == 9
    assert storage.newest(tmp_path) == tmp_path / "checkpoint-1"
    assert len(names(tmp_path)) == 2
    storage.sweep(tmp_path)
    assert names(tmp_path) == ["checkpoint-1"]


def test_file_keeps_its_ending_while_it_grows(tmp_path):
    with storage.atomic_file(tmp_path / "grid.png") as temp:
        assert temp.suffix == ".png"
        temp.write_bytes(b"x")
    assert names(tmp_path) == ["grid.png"]
