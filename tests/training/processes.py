"""Cases of training that one process and several run alike: test_distributed.py runs them here and by torchrun.

Started as `torchrun ... -m tests.training.processes MODEL FOLDER STEP CASE ...`: every CASE, from the checkpoint that
two processes left at STEP (0: from the start), writes FOLDER/CASE-PROCESSES.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

import mmalign
from mmalign import bundled
from mmalign.data.users import Users, write_users
from mmalign.objectives import PPD, DiffusionDPO, InPO, MaPO, RankDPO, SmPO
from mmalign.records import Comparison
from mmalign.surrogate import DDIMInversion, ReNoise
from mmalign.training import validate
from mmalign.training.loop import train
from mmalign.training.run import Run
from tests.conftest import picture

METHODS = {
    "DiffusionDPO": DiffusionDPO(beta=500),
    "MaPO": MaPO(),
    "SmPO": SmPO(beta=500, draw=ReNoise(steps=2)),
    "InPO": InPO(beta=500, draw=DDIMInversion(steps=3, eta=0.1)),
    "RankDPO": RankDPO(beta=500),
    "PPD": PPD(beta=500),
}
GROUPS = 6  # of a step, dealt to one process, two or three


def lists() -> list[Comparison]:
    """25 ranked lists of two to five pictures: no number of processes divides them into equal shares."""
    made = []
    for i in range(25):
        k = 2 + i * 7 % 4
        media = tuple(picture(5 * i + j, size=(16, 16)) for j in range(k))
        score = tuple((j + i) % k / (k - 0.5) for j in range(k))
        made.append(Comparison(f"list-{i}", ["a red fox", "red"][i % 2], media, score, user=f"user-{i % 2}"))
    return made


class Brightness:
    """A scorer: the mean of a picture's values."""

    def score(self, media, prompts):
        return torch.tensor([float(np.asarray(picture).mean()) for picture in media])


def run_of(case: str, model: str, folder: Path, processes: int, step: int) -> Run:
    """ENGINE-METHOD-KIND-BACKWARD[-extra ...]: such as fsdp2-MaPO-full-plain-watched."""
    _, method, kind, backward, *extra = case.split("-")
    changes = {}
    if method == "PPD":
        changes |= {"users": str(folder / "users.safetensors"), "user_dropout": 0.3}
        vectors = Users({"user-0": torch.tensor([1.0, -1]), "user-1": torch.ones(2)}, {})
        write_users(Path(changes["users"]), vectors)
    if "watched" in extra:
        changes |= {"validation_prompts": ("a red fox", "red", "fox"), "validation_steps": 5}
        changes |= {"validation_scorers": ("brightness",)}
    if "bf16" in extra:
        changes["mixed_precision"] = "bf16"
    return Run(
        pretrained_model_name_or_path=model,
        dataset_name="lists",
        output_dir=str(folder / f"{case}-{processes}"),
        objective=METHODS[method],
        max_train_steps=5,
        learning_rate=1e-3 if kind == "lora" else 1e-4,
        train_batch_size=GROUPS // processes,
        rank=2,
        seed=7,
        use_lora=kind == "lora",
        backward={"plain": "plain", "twopass": "two-pass"}[backward],
        rows_at_once=2,
        proportion_empty_prompts=0.3,
        gradient_checkpointing="checkpointed" in extra,
        checkpointing_steps=2,
        resume_from_checkpoint=str(folder / f"{case}-2" / f"checkpoint-{step}") if step else None,
        **changes,
    )


def run_case(case: str, model: str, folder: Path, processes: int, step: int = 0) -> Path:
    """Trains and returns the output folder; the process group, if there is one, stays for the next case."""
    fsdp = processes > 1 and case.startswith("fsdp2")
    profile = yaml.safe_load((bundled("recipes") / "accelerate" / "fsdp2.yaml").read_text())["fsdp_config"]
    engine = {"ACCELERATE_USE_FSDP": "true"} | {name.upper(): str(value) for name, value in profile.items()}
    for name, value in engine.items():
        os.environ.pop(name, None)
        if fsdp:
            os.environ[name] = value
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    dtype = torch.float32 if "float32" in case or "bf16" in case else torch.float64
    modality = mmalign.load(model, dtype=dtype)
    return train(run_of(case, model, folder, processes, step), modality=modality, comparisons=lists(), say=str)


def end_training(self: Accelerator) -> None:
    """Instead of accelerate's, which ends the process group."""
    wrapped = [thing for thing in gc.get_objects() if isinstance(thing, torch.nn.parallel.DistributedDataParallel)]
    assert not wrapped, "its destructor may hang with gloo"
    self.wait_for_everyone()


if __name__ == "__main__":
    validate.mmalign.load_scorer = lambda name: Brightness()
    Accelerator.end_training = end_training
    model, folder, step, *cases = sys.argv[1:]
    for case in cases:
        run_case(case, model, Path(folder), int(os.environ["WORLD_SIZE"]), int(step))
        if os.environ["RANK"] == "0":
            print("done", case, flush=True)
    torch.distributed.destroy_process_group()
