"""Looking at the policy while it learns: the same prompts and seeds every time, base beside policy."""

from __future__ import annotations

from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

import mmalign
from mmalign import storage
from mmalign.data.users import read_users
from mmalign.evaluation.report import grid
from mmalign.records import Text
from mmalign.training.run import Run
from mmalign.training.views import WeightViews


class Validation:
    """Makes the pictures and asks the scorers; the prompts are dealt to all processes, which call it together.

    The base's pictures and scores are made once, at the first call; what is reported is a scorer's mean over the
    prompts for the policy and its change from the base.
    """

    def __init__(self, run: Run, modality: Any, views: WeightViews, accelerator: Any) -> None:
        self.run, self.modality, self.views = run, modality, views
        self.main, ranks, count = accelerator.is_main_process, accelerator.num_processes, len(run.validation_prompts)
        # Equally many for each process: sharded, they call the network together
        self.own = [min(row, count - 1) for row in range(accelerator.process_index, -(-count // ranks) * ranks, ranks)]
        self.scorers = {name: mmalign.load_scorer(name) for name in run.validation_scorers}
        self.base: list[Any] = []
        self.whose: torch.Tensor | None = None
        if run.users:  # the policy's pictures are for one user after the other
            users = read_users(run.users).vectors
            self.whose = torch.stack([users[name] for name in islice(cycle(sorted(users)), count)])[self.own]
        self.base_scores: dict[str, torch.Tensor] = {}

    def _made(self, view: str) -> tuple[list[Any], dict[str, torch.Tensor]]:
        """One medium a prompt, and every scorer's scores of them."""
        from accelerate.utils import gather_object

        prompts = [self.run.validation_prompts[row] for row in self.own]
        told = {"user": self.whose} if self.whose is not None and view == "policy" else {}
        with torch.no_grad(), self.views(view):
            media = self.modality.generate(prompts, seeds=self.own, **told)
        scores = [scorer.score(media, prompts).tolist() for scorer in self.scorers.values()]
        rows = dict(gather_object(list(zip(self.own, zip(media, *scores, strict=True), strict=True))))
        media, *scores = zip(*(rows[row] for row in sorted(rows)), strict=True)
        return list(media), {name: torch.tensor(own) for name, own in zip(self.scorers, scores, strict=True)}

    def __call__(self, step: int) -> dict[str, float]:
        """Writes `validation/step-N.png`, for text answers `step-N.json`; returns the scores."""
        prompts = list(self.run.validation_prompts)
        if not self.base:
            self.base, self.base_scores = self._made("reference")
        policy, scores = self._made("policy")
        folder = Path(self.run.output_dir) / "validation"
        name = f"step-{step:06d}"
        if not self.main:
            pass
        elif isinstance(policy[0], Text):
            storage.write_json(folder / f"{name}.json", {"prompt": prompts, "base": self.base, "policy": policy})
        else:
            folder.mkdir(parents=True, exist_ok=True)
            grid(folder / f"{name}.png", prompts, self.base, policy)
        metrics: dict[str, float] = {}
        for name, after in scores.items():
            before = self.base_scores[name]
            metrics[f"validation/{name}"] = after.mean().item()
            metrics[f"validation/{name}_change"] = (after - before).mean().item()
        return metrics
