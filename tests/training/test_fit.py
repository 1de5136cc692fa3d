"""A run under a memory limit: the fastest way that fits, and a process that stays below it."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import mmalign
from mmalign.cli import main
from mmalign.data.export import write_comparisons
from mmalign.records import Comparison, UserError
from mmalign.training import fit, memory
from mmalign.training.flops import operations
from tests.conftest import picture
from tests.training.test_memory import recipe


@pytest.fixture(autouse=True)
def no_reserve(monkeypatch):
    """Half a GiB is more than all of a tiny model."""
    monkeypatch.setattr(memory, "RESERVE", 0)


@pytest.fixture(scope="module")
def skeleton(tiny_sdxl):
    return mmalign.skeleton(tiny_sdxl)


def needs(run, skeleton, **changes):
    return memory.plan(replace(run, **changes), torch.float32, skeleton).needs


def test_ways_are_tried_by_the_operations_they_take(tiny_sdxl, skeleton):
    run = recipe(tiny_sdxl)
    taken = [sum(operations(replace(run, **way), skeleton).values()) for way in fit._WAYS.values()]
    assert taken == sorted(taken)
    assert len(set(taken)) == len(taken)


def test_the_fastest_way_that_fits_is_taken_and_the_steps_comparisons_stay(tiny_sdxl, skeleton):
    run = recipe(tiny_sdxl, train_batch_size=2, gradient_accumulation_steps=2, cache_dir="cache")
    ways = list(fit._WAYS.values())
    for place, (size, way) in enumerate([(2, ways[0]), (1, ways[2]), (1, ways[4])]):
        limit = needs(run, skeleton, **way, train_batch_size=size)
        chosen, lines = fit.fit(run, limit, torch.float32, skeleton)
        assert memory.plan(chosen, torch.float32, skeleton).needs <= limit
        assert chosen.train_batch_size * chosen.gradient_accumulation_steps == 4
        assert {name: getattr(chosen, name) for name in way} == way, place
        if way["backward"] == "plain":
            assert chosen.train_batch_size == size
        assert (len(lines) > 1) == (place > 0)  # what was too large


def test_another_optimizer_is_for_whole_networks_and_comes_last(tiny_sdxl, skeleton):
    run = recipe(tiny_sdxl, use_lora=False, cache_dir="cache")
    limit = needs(run, skeleton, optimizer="adafactor", **list(fit._WAYS.values())[4])
    chosen, lines = fit.fit(run, limit, torch.float32, skeleton)
    assert chosen.optimizer == "adafactor"
    assert "learning rate" in lines[-1]


def test_a_fused_backward_is_what_is_left_for_whole_networks(tiny_sdxl, monkeypatch):
    monkeypatch.setattr(fit, "plan", lambda run, *_: SimpleNamespace(needs=1 if run.fused_backward else 3))
    fused = {"optimizer": "adafactor", "fused_backward": True, "max_grad_norm": 0.0}
    run = recipe(tiny_sdxl, use_lora=False, train_batch_size=2, gradient_accumulation_steps=2)

    def fitted(**changes):
        return fit.fit(replace(run, **changes), 2, torch.float32, skeleton="none")

    chosen, lines = fitted()
    assert chosen == replace(run, **fused, train_batch_size=4, gradient_accumulation_steps=1)
    assert "not clipped" in lines[-1]
    again, lines = fit.fit(chosen, 2, torch.float32, skeleton="none")  # a run that is fused already stays so
    assert again == chosen
    assert len(lines) == 1
    for refused in ({"mixed_precision": "fp16"}, {"aspect_buckets": True}, {"use_lora": True}):
        with pytest.raises(UserError, match="nothing fits"):
            fitted(**refused)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="nothing fits"):
        fitted()


def test_nothing_fits_is_said_with_the_smallest_plan(tiny_sdxl, skeleton):
    run = recipe(tiny_sdxl, cache_dir="cache")
    smallest = needs(run, skeleton, **list(fit._WAYS.values())[4])
    with pytest.raises(UserError, match=f"two passes and gradient checkpointing.*{smallest / memory.GIB:.2f} GiB"):
        fit.fit(run, smallest - 1, torch.float32, skeleton)


def test_live_pictures_are_in_the_plan(tiny_sdxl, skeleton):
    run = recipe(tiny_sdxl, train_batch_size=4, **list(fit._WAYS.values())[4])
    live = memory.plan(run, torch.float32, skeleton).parts["encoding beyond them"]
    assert live > memory.plan(replace(run, cache_dir="cache"), torch.float32, skeleton).parts["encoding beyond them"]


def test_live_is_the_most_at_once():
    with memory.Live() as live:
        one = torch.zeros(100)
        two = one + 1  # 800 bytes here
        del one
        two.view(10, 10)  # no new memory
        three = two * 2  # and 800 here
        del two, three
    assert (live.peak, live.bytes) == (800, 0)


@pytest.mark.parametrize(("text", "size"), [("24GB", 24 * 10**9), ("1.5 gib", 3 * 2**29), ("512MiB", 2**29)])
def test_sizes(text, size):
    assert fit.size_of(text) == size


@pytest.mark.parametrize("text", ["24", "GB", "0GB", "-1GB", ""])
def test_what_is_no_size_is_said(text, capsys):
    with pytest.raises(UserError, match="such as 24GB"):
        fit.size_of(text)


STEP = """
import json, sys
from dataclasses import replace
from pathlib import Path
import diffusers, peft, psutil, torch, transformers
from diffusers import StableDiffusionXLPipeline
from mmalign.training import fit, memory
from mmalign.training.loop import train
sys.path.insert(0, "benchmarks")
import step
folder, limit, kind = Path(sys.argv[1]), float(sys.argv[2]) * memory.GIB, sys.argv[3]
case = "whole network: ours, small" if kind == "fused" else "LoRA: ours, live"
run = replace(step.run_of("tiny", folder, case), resolution=256, cache_dir=None, cache_reference=False)
if kind != "fused":
    run = replace(run, use_lora=kind == "lora", gradient_accumulation_steps=4)
run = replace(run, max_train_steps=1, output_dir=str(folder / "-".join(sys.argv[2:])))
chosen, lines = fit.fit(run, int(limit), torch.float32)
empty, peaks = psutil.Process().memory_info().rss, []
train(chosen, watch=lambda step, metrics: peaks.append(memory.peak_bytes()), say=lambda line: None)
planned = memory.plan(chosen, torch.float32)
print(json.dumps({"measured": peaks[0] - empty, "planned": planned.total, "needs": planned.needs, "lines": lines}))
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend("benchmarks")
        import step

        folder = tmp_path_factory.mktemp("small")
        step.build("tiny", folder)
        return folder


@pytest.mark.slow
@pytest.mark.parametrize(("gib", "kind"), [(0.7, "lora"), (1.5, "lora"), (1.5, "whole"), (1.0, "fused")])
def test_a_process_stays_below_its_limit(small, gib, kind):
    """Resident memory above the empty process, at the step's end, with pictures of 256 pixels encoded live."""
    done = subprocess.run([sys.executable, "-c", STEP, str(small), str(gib), kind], capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["planned"] < found["needs"] <= gib * memory.GIB
    assert found["measured"] <= gib * memory.GIB
    assert found["measured"] <= found["needs"]


def test_the_command_takes_the_flag_and_refuses_what_cannot_be(tiny_sdxl, tmp_path, capsys):
    file = tmp_path / "own.py"
    file.write_text(
        "from mmalign.objectives import DiffusionDPO\nfrom mmalign.training.run import Run\n"
        f"def recipe():\n    return Run({str(tiny_sdxl)!r}, {str(tmp_path / 'data')!r}, 'out', DiffusionDPO(1), 1, 1)\n"
    )
    write_comparisons(tmp_path / "data", [Comparison("one", "red", (picture(0), picture(1)), (1, 0))])
    for words, said in [(["--fit", "24"], "such as 24GB"), (["--fit=1KB"], "nothing fits")]:
        with pytest.raises(SystemExit):
            main(["train", str(file), *words])
        assert said in capsys.readouterr().err
