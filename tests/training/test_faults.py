"""What ends a run in the middle: signals, a full disk, a folder that is taken, files that are cut off."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from mmalign import storage
from mmalign.cli import main
from mmalign.records import UserError
from mmalign.training import checkpoint
from tests.test_cli import recipe, refused  # noqa: F401 a fixture
from tests.training.test_loop import curve, run_it
from tests.training.test_loop import recipe as run  # noqa: F401 a fixture


def steps(folder):
    return [row["step"] for row in storage.read_lines(folder / "metrics.jsonl")]


def signalled(monkeypatch, at, *numbers):
    """Sends the signals to this process in the middle of step `at`."""
    from mmalign.training.step import Step

    real, calls = Step.backward, []

    def backward(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            for number in numbers:
                os.kill(os.getpid(), number)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Step, "backward", backward)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_and_says_how_to_go_on(recipe, tmp_path, capsys, monkeypatch, number):  # noqa: F811
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    signalled(monkeypatch, 2, number)
    main(["train", str(recipe), "--max-train-steps", "9"])
    said = capsys.readouterr().out.splitlines()[-2:]
    assert "Stopped by a signal after step 2" in said[0]
    assert said[1].split() == ["mmalign", "train", str(recipe), *["--max-train-steps", "9"], *said[1].split()[-2:]]
    assert storage.newest(tmp_path / "run").name == "checkpoint-2"
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == handlers
    monkeypatch.undo()
    main([*said[1].split()[1:], "--max-train-steps", "3"])
    assert steps(tmp_path / "run") == [1, 2, 3]


def test_a_second_ctrl_c_ends_at_once(recipe, tmp_path, capsys, monkeypatch):  # noqa: F811
    signalled(monkeypatch, 2, signal.SIGINT, signal.SIGINT)
    with pytest.raises(SystemExit) as ended:
        main(["train", str(recipe), "--max-train-steps", "9"])
    assert ended.value.code == 1
    assert "interrupted" in capsys.readouterr().err
    assert steps(tmp_path / "run") == [1]
    assert storage.newest(tmp_path / "run") is None


# --- checkpoints that are not whole ---


def test_a_checkpoint_cut_off_anywhere_is_never_chosen(run, pairs, tmp_path):  # noqa: F811
    _, output = run_it(run, pairs, max_train_steps=2, checkpointing_steps=1)
    before, last = output / "checkpoint-1", output / "checkpoint-2"
    names = sorted(path.name for path in last.iterdir())
    assert names == ["manifest.json", "policy.safetensors", "progress.json", "recipe.json", "state.pt"]
    for name in names:
        whole = (last / name).read_bytes()
        for size in {0, 1, 7, len(whole) // 2, len(whole) - 2, len(whole) - 1}:
            (last / name).write_bytes(whole[:size])
            assert storage.newest(output) == before, (name, size)
        (last / name).unlink()
        assert storage.newest(output) == before, name
        (last / name).write_bytes(whole)
        assert storage.newest(output) == last


def test_the_clock_decides_nothing(run, pairs, tmp_path, monkeypatch):  # noqa: F811
    _, output = run_it(run, pairs, max_train_steps=2, checkpointing_steps=1)
    for path in (output / "checkpoint-1").rglob("*"):
        os.utime(path, (4e9, 4e9))  # in 2096
    for path in (output / "checkpoint-2").rglob("*"):
        os.utime(path, (1, 1))
    assert storage.newest(output) == output / "checkpoint-2"
    now = iter(range(2 * 10**9, 0, -(10**7)))  # backwards, a third of a year a look
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    rows, _ = run_it(run, pairs, checkpointing_steps=1, resume_from_checkpoint="latest", checkpoints_total_limit=2)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["samples_per_second"] > 0 for row in rows)
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


def resealed(folder, name, content):
    """Changes a checkpoint's file as somebody would who writes the manifest too."""
    (folder / name).write_bytes(content)
    (folder / storage.MANIFEST).unlink()
    storage.write_json(folder / storage.MANIFEST, storage._listing(folder))
    assert storage.verify(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("progress.json", b"{}x"),
        ("progress.json", b'{"step": "two"}'),
        ("recipe.json", b"[1, 2]"),
        ("recipe.json", b"\xff\xfe"),
        ("policy.safetensors", b"\x08\0\0\0\0\0\0\0{}      "),
        ("policy.safetensors", b"\xff" * 64),
        ("state.pt", b""),
        ("state.pt", b"PK\x03\x04 no archive"),
    ],
)
def test_a_whole_checkpoint_that_is_none_of_ours_is_one_sentence(run, pairs, name, content):  # noqa: F811
    _, output = run_it(run, pairs, max_train_steps=1, checkpointing_steps=1)
    resealed(output / "checkpoint-1", name, content)
    with pytest.raises(UserError, match="checkpoint-1: ") as error:
        run_it(run, pairs, resume_from_checkpoint="latest")
    assert "\n" not in str(error.value)


def test_a_manifest_names_its_own_folders_files_alone(tmp_path):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (tmp_path / "secret").write_text("x")
    known = {"size": 1, "sha256": storage.sha256(tmp_path / "secret")}
    for name in ("../secret", str(tmp_path / "secret"), "/dev/zero"):
        storage.write_json(folder / storage.MANIFEST, {name: known | ({"size": 0} if "dev" in name else {})})
        assert not storage.verify(folder), name
    storage.write_json(folder / storage.MANIFEST, {})
    assert not storage.verify(folder)


# --- the disk ---


FULL = """
import os, subprocess, sys
from mmalign import storage
from mmalign.cli import main
recipe, folder = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", folder], check=True)
try:
    main(["train", recipe, "--output-dir", folder + "/run", "--max-train-steps", "40", "--checkpointing-steps", "1"])
finally:
    last = storage.newest(folder + "/run")
    print("LAST", last and last.name, [n for n in os.listdir(folder + "/run") if n.startswith((".partial", ".export"))])
"""


def test_a_disk_that_fills_up_is_one_sentence_and_the_last_checkpoint_stands(recipe, tmp_path):  # noqa: F811
    """On a real file system of 300 KiB, in a mount namespace of its own."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("needs a mount namespace")
    (tmp_path / "disk").mkdir()
    command = ["unshare", "-rm", sys.executable, "-c", FULL, str(recipe), str(tmp_path / "disk")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("mmalign: ")]
    last = re.search(r"LAST (\S+) \[\]", done.stdout)[1]
    assert last.startswith("checkpoint-")
    assert f"the disk is full; the last good checkpoint is {tmp_path}/disk/run/{last}." in said[0]


@pytest.mark.parametrize("failing", ["metrics.jsonl", "recipe.json"])
def test_other_files_on_a_full_disk(recipe, tmp_path, capsys, monkeypatch, failing):  # noqa: F811
    from pathlib import Path

    real = Path.open

    def full(self, mode="r", *args, **kwargs):
        if failing in self.name and set(mode) & set("wa"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return real(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    said = refused(capsys, "train", recipe)
    assert "No space left on device" in said or "the disk is full" in said


def test_a_half_written_line_of_metrics_is_none(run, pairs):  # noqa: F811
    _, output = run_it(run, pairs, max_train_steps=2, checkpointing_steps=1)
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    rows, _ = run_it(run, pairs, checkpointing_steps=1, resume_from_checkpoint="latest")
    assert [row["step"] for row in rows] == [1, 2, 3]


def test_a_folder_that_may_not_be_written_is_said_before_anything_is_loaded(recipe, tmp_path, capsys, monkeypatch):  # noqa: F811
    import mmalign

    def loaded(*args, **kwargs):
        raise AssertionError("loaded")

    monkeypatch.setattr(mmalign, "load", loaded)
    (tmp_path / "file").write_text("in the way")
    assert "file" in refused(capsys, "train", recipe, "--output-dir", tmp_path / "file")
    assert "Not a directory" in refused(capsys, "train", recipe, "--output-dir", tmp_path / "file" / "run")
    assert "/proc/run" in refused(capsys, "train", recipe, "--output-dir", "/proc/run")


# --- two runs, one folder ---


def test_the_second_run_in_a_folder_is_refused_and_disturbs_nothing(run, pairs, tmp_path):  # noqa: F811
    expected, _ = run_it(run, pairs, output_dir=str(tmp_path / "alone"))
    from mmalign.training import loop

    real, refusals = loop._one_step, []

    def step_and_second_run(*args):
        if not refusals:
            refusals.append("")
            with pytest.raises(BlockingIOError, match="another run is writing there") as error:
                run_it(run, pairs, seed=8)
            refusals.append(error.value.filename)
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_one_step", step_and_second_run)
        rows, output = run_it(run, pairs)
    assert refusals[1] == str(output)
    assert curve(rows) == curve(expected)
    assert json.loads((output / "recipe.json").read_text())["seed"] == 7


HOLD = """
import sys, time
from mmalign import storage
with storage.only_writer(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_lock_dies_with_its_process(recipe, tmp_path, capsys):  # noqa: F811
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        said = refused(capsys, "train", recipe)
        assert f"{tmp_path / 'run'}: another run is writing there" in said
        assert [path.name for path in (tmp_path / "run").iterdir()] == [storage.LOCK]
    finally:
        holder.kill()
        holder.wait()
    main(["train", str(recipe), "--max-train-steps", "1"])
    assert steps(tmp_path / "run") == [1]


def test_a_folder_made_for_nothing_goes_again(tmp_path):
    with storage.only_writer(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    with storage.only_writer(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()
    with storage.only_writer(tmp_path / "used"):
        (tmp_path / "used" / "weights").touch()
    assert (tmp_path / "used" / "weights").exists()


def test_a_checkpoint_holds_tensors_and_plain_values(run, pairs):  # noqa: F811
    _, output = run_it(run, pairs, max_train_steps=1, checkpointing_steps=1)
    folder = output / "checkpoint-1"
    assert all(isinstance(value, torch.Tensor) for value in load_file(folder / "policy.safetensors").values())
    state = storage.load_tensors(folder / "state.pt")
    assert set(state) == {"optimizer", "lr_scheduler"}
    assert checkpoint.find(replace(run, resume_from_checkpoint="latest", output_dir=str(output))) == folder
