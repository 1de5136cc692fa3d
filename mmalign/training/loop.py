"""Training: source -> evaluate -> objective -> backward -> log. No method is named here."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import mmalign
from mmalign import storage
from mmalign.data.loader import Batches, decode
from mmalign.records import Comparison, UserError
from mmalign.training import checkpoint
from mmalign.training.card import write_card
from mmalign.training.memory import peak_bytes, plan
from mmalign.training.prepare import make_accelerator, make_optimizer, prepare_policy
from mmalign.training.run import Run
from mmalign.training.step import Meter, Step, feedback_of
from mmalign.training.validate import Validation

Watch = Callable[[int, dict[str, float]], None]


def train(
    run: Run,
    *,
    modality: Any = None,
    comparisons: Sequence[Comparison] | None = None,
    watch: Watch | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Aligns a model and returns the output folder.

    Args:
        run: the recipe.
        modality: already loaded; default `mmalign.load` of the recipe's model.
        comparisons: already read; default the recipe's data set.
        watch: called on the main process after every step with its number and metrics.
        say: gets the lines a person should see.

    Raises:
        UserError: something in the recipe, the data or the output folder is wrong.
        RuntimeError: too many steps had non-finite gradients.
    """
    accelerator = make_accelerator(run)
    say = say if accelerator.is_main_process else _silent
    resume = checkpoint.find(run)  # before anything is read or loaded
    if comparisons is None:
        comparisons = _read(run, say)
    if modality is None:
        modality = _load(run, accelerator, say)
    views = prepare_policy(modality, run)
    network = modality.network
    parameters = list(checkpoint.trained(network).values())
    optimizer, scheduler = make_optimizer(run, parameters)
    modality.network, optimizer = accelerator.prepare(network, optimizer)
    state = {"optimizer": optimizer.optimizer, "lr_scheduler": scheduler}
    if accelerator.scaler is not None:
        state["scaler"] = accelerator.scaler

    groups_per_step = run.train_batch_size * run.gradient_accumulation_steps * accelerator.num_processes
    progress = checkpoint.Progress(groups_per_step=groups_per_step)
    if resume:
        progress = checkpoint.restore(resume, network, state, groups_per_step)
        say(f"Resumed at step {progress.step} from {resume}.")
    output_dir = Path(run.output_dir)
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        storage.sweep(output_dir)
        storage.write_json(output_dir / "recipe.json", {**run.resolved(), "versions": versions()})
    log = Log(output_dir, accelerator, progress.step, watch)
    batches = Batches(
        comparisons,
        groups_per_batch=run.train_batch_size,
        seed=run.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=run.dataloader_num_workers,
    )
    step = Step(run, modality, views, accelerator)
    validation = Validation(run, modality, views) if run.validation_prompts and accelerator.is_main_process else None
    _check_first(run, step, batches)

    with _terminated() as stop:
        for micro_batches in _steps(run, batches, progress.step):
            started = time.perf_counter()
            metrics = _one_step(run, step, batches, progress, micro_batches, optimizer, parameters, accelerator)
            scheduler.step()
            progress.step += 1
            metrics["samples_per_second"] = metrics.pop("samples") / (time.perf_counter() - started)
            metrics["peak_memory_gib"] = peak_bytes() / 2**30
            if validation and (progress.step % run.validation_steps == 0 or progress.step == run.max_train_steps):
                metrics |= validation(progress.step)
            log.write(progress.step, metrics)
            ending = progress.step == run.max_train_steps or stop()
            if progress.step % run.checkpointing_steps == 0 or ending:
                if accelerator.is_main_process:
                    checkpoint.save(output_dir, network, state, progress, run)
                accelerator.wait_for_everyone()
            if stop():
                raise InterruptedError(
                    f"Stopped by a signal after step {progress.step}; go on with --resume-from-checkpoint latest."
                )
    modality.network = network
    if accelerator.is_main_process:
        checkpoint.export(modality, output_dir)
        write_card(output_dir, run, log.rows(), comparisons_count=len(comparisons))
        _push(run, output_dir, say)
    # The DDP wrapper goes first: were it the last to hold the process group, its destructor would wait under the GIL
    # for gloo's thread, which may itself wait for the GIL to free the last barrier (seen with torch 2.11)
    accelerator.free_memory()
    accelerator.end_training()
    return output_dir


def _one_step(
    run: Run,
    step: Step,
    batches: Batches,
    progress: checkpoint.Progress,
    micro_batches: list[tuple[list[Comparison], list[int]]],
    optimizer: Any,
    parameters: list[Any],
    accelerator: Any,
) -> dict[str, float]:
    """Forward, backward and update; returns the step's metrics."""
    first = progress.step * run.gradient_accumulation_steps
    own = sum(step.terms(batches.batch(first + m)) for m in range(run.gradient_accumulation_steps))
    counted = accelerator.reduce(torch.tensor([float(own)], device=accelerator.device), "sum").item()
    # DDP averages gradients over processes, the step's mean is over their sum
    scale = accelerator.num_processes / max(counted, 1.0)
    meter, samples = Meter(), 0
    for number, (items, draws) in enumerate(micro_batches):
        probe, feedback = step.probe(items, draws)
        likelihood, loss = step.backward(probe, feedback, scale, last=number == len(micro_batches) - 1)
        meter.add(likelihood, loss, feedback)
        samples += len(probe)
    grad_norm = float(accelerator.clip_grad_norm_(parameters, run.max_grad_norm))
    learning_rate = optimizer.param_groups[0]["lr"]
    finite = math.isfinite(grad_norm)
    # A GradScaler has to see the overflow itself, to lower its scale
    if counted and (finite or accelerator.scaler is not None):
        optimizer.step()
    optimizer.zero_grad()
    if not finite:
        progress.skipped += 1
        if progress.skipped > run.max_skipped_steps:
            raise RuntimeError(
                f"{progress.skipped} steps had non-finite gradients, the last one step {progress.step + 1};"
                " lower the learning rate or the mixed precision."
            )
    metrics = meter.means(accelerator)
    metrics |= {
        "grad_norm": grad_norm,
        "learning_rate": learning_rate,
        "skipped_steps": float(progress.skipped),
    }
    return {**metrics, "terms": counted, "samples": float(samples * accelerator.num_processes)}


def _steps(run: Run, batches: Batches, start: int) -> Iterator[list[tuple[list[Comparison], list[int]]]]:
    """The micro-batches of every optimizer step from `start` on."""
    accumulation = run.gradient_accumulation_steps
    # With latents in memory most comparisons need no decoding any more
    prepare = list if run.cache_latents else decode
    stream = batches.iterate(start * accumulation, run.max_train_steps * accumulation, prepare=prepare)
    while micro_batches := list(islice(stream, accumulation)):
        yield micro_batches


def _check_first(run: Run, step: Step, batches: Batches) -> None:
    """Asks the objective once whether it can work with this path and feedback."""
    try:
        run.objective.check(step.modality.path, feedback_of(batches.batch(0)))
    except ValueError as error:
        raise UserError(f"{type(run.objective).__name__} cannot be trained on {run.dataset_name}: {error}.") from error


def _read(run: Run, say: Callable[[str], None]) -> Sequence[Comparison]:
    from mmalign.data.importers import read_comparisons

    data = read_comparisons(run.dataset_name, split=run.dataset_split, limit=run.max_train_samples)
    say(f"{run.dataset_name}: " + ", ".join(f"{count:,} {name}" for name, count in data.counts.items()) + ".")
    return data.comparisons


def _load(run: Run, accelerator: Any, say: Callable[[str], None]) -> Any:
    dtype = _dtype(run, accelerator)
    say(plan(run, dtype).text())
    return mmalign.load(
        run.pretrained_model_name_or_path,
        lora=run.lora,
        dtype=dtype,
        device=accelerator.device,
        vae=run.pretrained_vae_model_name_or_path,
    )


def _dtype(run: Run, accelerator: Any) -> torch.dtype:
    """Of the frozen weights; a fully trained network keeps float32 weights under autocast."""
    if not run.use_lora:
        return torch.float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)


@contextmanager
def _terminated() -> Iterator[Callable[[], bool]]:
    """Tells whether SIGTERM came; the step under way is finished and saved first."""
    caught: list[int] = []
    try:
        before = signal.signal(signal.SIGTERM, lambda number, frame: caught.append(number))
    except ValueError:  # not the main thread: somebody else's signals
        yield lambda: False
        return
    try:
        yield lambda: bool(caught)
    finally:
        signal.signal(signal.SIGTERM, before)


class Log:
    """`metrics.jsonl`, one line a step, and the trackers; a resumed run continues the file at its step."""

    def __init__(self, output_dir: Path, accelerator: Any, step: int, watch: Watch | None) -> None:
        self.file, self.accelerator, self.watch = output_dir / "metrics.jsonl", accelerator, watch
        if accelerator.is_main_process:
            kept = [row for row in self.rows() if row["step"] <= step] if step else []
            with storage.atomic_file(self.file) as temp:
                temp.write_text("".join(json.dumps(row) + "\n" for row in kept))
        if accelerator.log_with:
            accelerator.init_trackers("mmalign")

    def rows(self) -> list[dict[str, float]]:
        """What was logged so far."""
        return [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Appends a step's line."""
        if self.accelerator.is_main_process:
            with self.file.open("a") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
            if self.watch:
                self.watch(step, metrics)
        if self.accelerator.log_with:
            self.accelerator.log(metrics, step=step)


def versions() -> dict[str, str]:
    """Of what decides the numbers."""
    from importlib.metadata import version

    libraries = {name: version(name) for name in ("torch", "diffusers", "transformers", "peft", "accelerate")}
    return {"mmalign": mmalign.__version__, **libraries}


def _push(run: Run, output_dir: Path, say: Callable[[str], None]) -> None:
    if not run.push_to_hub:
        return
    from huggingface_hub import HfApi

    api = HfApi()
    repository = api.create_repo(run.hub_model_id or output_dir.name, exist_ok=True).repo_id
    api.upload_folder(repo_id=repository, folder_path=output_dir, ignore_patterns=[f"{checkpoint.PREFIX}*"])
    say(f"Uploaded to {repository}.")


def _silent(line: str) -> None:
    """Other processes say nothing."""
