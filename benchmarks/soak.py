"""A long run of the embedded model: do memory and open files stay flat?

    python benchmarks/soak.py --steps 2000 --cpu-minutes 8

Trains Diffusion-DPO on pairs of noise, so that nothing but the training loop runs; a checkpoint every 100 steps is part
of it. Writes soak.md: what was held over the steps, and the slope of memory after the first 100 (Theil-Sen: the median
of the slopes between all pairs of readings, which a single jump does not move).
"""

from __future__ import annotations

import contextlib
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
import tyro
from PIL import Image

from mmalign.embedded import path
from mmalign.objectives import DiffusionDPO
from mmalign.records import Comparison
from mmalign.training.loop import train
from mmalign.training.run import Run

WARM = 100  # steps in which caches and the optimizer's state are made


class Enough(Exception):
    """The CPU time is spent."""


def noise(seed: int) -> Image.Image:
    """A picture."""
    values = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(values)


def soak(steps: int, cpu_minutes: float, folder: Path) -> np.ndarray:
    """[readings, 3] step, resident memory in MiB, open files; one reading every tenth step."""
    pairs = [Comparison(f"pair-{i}", f"prompt {i}", (noise(2 * i), noise(2 * i + 1)), (1, 0)) for i in range(64)]
    run = Run(
        pretrained_model_name_or_path=str(path()),
        dataset_name="noise",
        output_dir=str(folder),
        objective=DiffusionDPO(beta=2000),
        max_train_steps=steps,
        learning_rate=1e-4,
        train_batch_size=2,
        checkpointing_steps=100,
        checkpoints_total_limit=2,
    )
    process, readings = psutil.Process(), []

    def watch(step: int, metrics: dict[str, float]) -> None:
        if step % 10 == 0:
            readings.append((step, process.memory_info().rss / 2**20, process.num_fds()))
        if sum(process.cpu_times()[:2]) > 60 * cpu_minutes:
            raise Enough

    with contextlib.suppress(Enough):
        train(run, comparisons=pairs, watch=watch)
    return np.array(readings)


def slope(readings: np.ndarray) -> float:
    """MiB a thousand steps."""
    step, memory = readings[:, 0], readings[:, 1]
    first, second = np.triu_indices(len(step), 1)
    return 1000 * float(np.median((memory[second] - memory[first]) / (step[second] - step[first])))


def main(steps: int = 2000, cpu_minutes: float = 8.0) -> None:
    """Runs and writes.

    Args:
        steps: at most.
        cpu_minutes: stop when these are spent.
    """
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        readings = soak(steps, cpu_minutes, Path(folder) / "run")
    later = readings[readings[:, 0] > WARM]
    shown = later[np.unique(np.linspace(0, len(later) - 1, 8).astype(int))]
    lines = [
        "# A long run",
        "",
        f"`python benchmarks/soak.py {' '.join(sys.argv[1:])}`, torch {torch.__version__}, {platform.machine()} CPU,"
        f" {torch.get_num_threads()} thread: {int(readings[-1, 0])} steps of the embedded model in"
        f" {(time.time() - started) / 60:.0f} minutes, a checkpoint every 100.",
        "",
        f"After the first {WARM} steps memory grows by {slope(later):+.2f} MiB a thousand steps (Theil-Sen), between"
        f" {later[:, 1].min():.0f} and {later[:, 1].max():.0f} MiB; open files are"
        f" {int(later[:, 2].min())} to {int(later[:, 2].max())}.",
        "",
        "| step | resident memory, MiB | open files |",
        "|---:|---:|---:|",
        *(f"| {int(step)} | {memory:.1f} | {int(files)} |" for step, memory, files in shown),
    ]
    Path(__file__).with_name("soak.md").write_text("\n".join(lines) + "\n")
    print(*lines, sep="\n")


if __name__ == "__main__":
    tyro.cli(main)
