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
    """Makes the pictures and asks the scorers.

    The base's pictures and scores are made once, at the first call; what is reported is a scorer's mean over the
    prompts for the policy and its change from the base.
    """

    def __init__(self, run: Run, modality: Any, views: WeightViews) -> None:
        self.run, self.modality, self.views = run, modality, views
        self.scorers = {name: mmalign.load_scorer(name) for name in run.validation_scorers}
        self.base: list[Any] = []
        self.whose: torch.Tensor | None = None
        if run.users:  # the policy's pictures are for one user after the other
            users, count = read_users(run.users).vectors, len(run.validation_prompts)
            self.whose = torch.stack([users[name] for name in islice(cycle(sorted(users)), count)])
        self.base_scores: dict[str, torch.Tensor] = {}

    def _generate(self, view: str) -> list[Any]:
        prompts = list(self.run.validation_prompts)
        told = {"user": self.whose} if self.whose is not None and view == "policy" else {}
        with torch.no_grad(), self.views(view):
            return self.modality.generate(prompts, seeds=range(len(prompts)), **told)

    def __call__(self, step: int) -> dict[str, float]:
        """Writes `validation/step-N.png`, for text answers `step-N.json`; returns the scores."""
        prompts = list(self.run.validation_prompts)
        self.base = self.base or self._generate("reference")
        policy = self._generate("policy")
        folder = Path(self.run.output_dir) / "validation"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"step-{step:06d}"
        if isinstance(policy[0], Text):
            storage.write_json(folder / f"{name}.json", {"prompt": prompts, "base": self.base, "policy": policy})
        else:
            grid(folder / f"{name}.png", prompts, self.base, policy)
        metrics: dict[str, float] = {}
        for name, scorer in self.scorers.items():
            if name not in self.base_scores:
                self.base_scores[name] = scorer.score(self.base, prompts)
            before, after = self.base_scores[name], scorer.score(policy, prompts)
            metrics[f"validation/{name}"] = after.mean().item()
            metrics[f"validation/{name}_change"] = (after - before).mean().item()
        return metrics
