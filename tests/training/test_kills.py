"""A run of the embedded model that is killed a hundred times, at any moment, ends as one that never was.

    python -m pytest -m slow -s tests/training/test_kills.py
    KILLS_FOLDER=somewhere python -m pytest ...     # goes on there, when it was stopped itself

The workers are forked from a process that has loaded the model and never trained; each is ended by SIGKILL, while it
starts, between two steps, inside one or inside a save. The figures are in benchmarks/faults.md.
"""

import json
import os
import random
import shutil
import signal
import time
import traceback
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
import torch

import mmalign
from mmalign import storage
from mmalign.embedded import path
from mmalign.objectives import DiffusionDPO
from mmalign.records import Comparison
from mmalign.training import loop
from mmalign.training.run import Run
from tests.conftest import picture

KILLS, STEPS = int(os.environ.get("KILLS", 100)), 120
IN_A_STEP = 0.7  # the share of kills after a worker's first step; the others are while it starts
TIMES = {"seconds", "samples_per_second", "peak_memory_gib"}


def worker(run, modality, pairs):
    """Forks one that trains, and notes every step's samples behind the run's folder; returns its process id."""
    child = os.fork()
    if child:
        return child
    try:
        real = loop._one_step

        def noted(run, step, batches, learner, progress, micro_batches):
            metrics = real(run, step, batches, learner, progress, micro_batches)
            ids = [item.id for items, _ in micro_batches for item in items]
            with open(f"{run.output_dir}.samples", "a") as file:
                file.write(json.dumps([progress.step, ids]) + "\n")
            return metrics

        loop._one_step = noted
        loop.train(run, modality=modality, comparisons=pairs, say=lambda line: None)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def ended(child):
    """Its exit code, or None while it works."""
    done, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def steps_of(run):
    file = f"{run.output_dir}/metrics.jsonl"
    return int(storage.read_lines(file)[-1]["step"]) if os.path.exists(file) and os.path.getsize(file) else 0


def killed(run, modality, pairs, chance, starting):
    """Starts a worker and kills it at a random moment; returns the moment's kind and how many seconds its start took.

    Args:
        starting: seconds that a start takes.
    """
    before, since = steps_of(run), time.monotonic()
    stop = chance.uniform(0, starting) if before > STEPS - 12 or chance.random() > IN_A_STEP else None
    child, worked, took = worker(run, modality, pairs), False, None
    while True:
        code, now = ended(child), time.monotonic()
        assert code is None, f"a worker ended by itself, with code {code}"
        if took is None and steps_of(run) > before:
            worked, took = True, now - since
            stop = stop or now - since + chance.uniform(0, 3 * starting / 10)
        if stop is not None and now - since >= stop:
            break
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    saving = worked and any(Path(run.output_dir).glob(f"{storage._PARTIAL}*checkpoint-*"))
    return "save" if saving else "step" if worked else "start", took


def samples(run):
    with open(f"{run.output_dir}.samples") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


@pytest.mark.slow
def test_a_hundred_kills_change_nothing(tmp_path):
    torch.set_num_threads(1)
    folder = Path(os.environ.get("KILLS_FOLDER", tmp_path))
    prompts = ["a red circle", "two blue squares", "a green star", "a yellow circle and a red square"]
    pairs = [
        Comparison(f"pair-{i}", prompts[i % 4], (picture(2 * i, (64, 64)), picture(2 * i + 1, (64, 64))), (1.0, 0.0))
        for i in range(37)
    ]
    modality = mmalign.load(path())
    whole = Run(
        pretrained_model_name_or_path=str(path()),
        dataset_name="37 pairs",
        output_dir=str(folder / "whole"),
        objective=DiffusionDPO(beta=2000),
        max_train_steps=STEPS,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        train_batch_size=1,
        rank=2,
        attention="math",
        resolution=32,
        checkpointing_steps=STEPS,
        seed=11,
    )
    if not (folder / "whole" / "README.md").exists():
        shutil.rmtree(folder / "whole", ignore_errors=True)
        (folder / "whole.samples").unlink(missing_ok=True)
        assert os.waitstatus_to_exitcode(os.waitpid(worker(whole, modality, pairs), 0)[1]) == 0

    often = {"checkpointing_steps": 1, "checkpoints_total_limit": 2, "resume_from_checkpoint": "latest"}
    run = replace(whole, output_dir=str(folder / "killed"), **often)
    notes = folder / "kills"
    while (before := len(storage.read_lines(notes))) < KILLS:
        starting = median([took for _, took in storage.read_lines(notes) if took] or [5.0])
        noted = killed(run, modality, pairs, random.Random(before), starting)
        with notes.open("a") as file:
            file.write(json.dumps(noted) + "\n")
    reached, begun = steps_of(run), len(samples(run))
    assert os.waitstatus_to_exitcode(os.waitpid(worker(run, modality, pairs), 0)[1]) == 0

    for name in (f"checkpoint-{STEPS}/policy.safetensors", "pytorch_lora_weights.safetensors"):
        assert storage.sha256(folder / "whole" / name) == storage.sha256(folder / "killed" / name), name
    rows, expected = (storage.read_lines(folder / name / "metrics.jsonl") for name in ("killed", "whole"))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row, other in zip(rows, expected, strict=True):
        assert {n: v for n, v in row.items() if n not in TIMES} == {n: v for n, v in other.items() if n not in TIMES}
    of_step = dict(samples(whole))
    assert len(of_step) == len(samples(whole)) == STEPS
    done = samples(run)
    assert {step for step, _ in done} == of_step.keys()  # none lost
    assert all(ids == of_step[step] for step, ids in done)  # none in another's place: a step again is the same step
    kinds = [kind for kind, _ in storage.read_lines(notes)]
    counts = {kind: kinds.count(kind) for kind in ("start", "step", "save")}
    print(f"\n{KILLS} kills {counts}: step {reached} of {STEPS} after {begun} steps; {len(done)} steps in all.")
