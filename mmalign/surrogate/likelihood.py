"""The common interface: what a model finds likely, and what people said about it.

A generative model is seen only through a *likelihood surrogate*: one number a sample that says how likely
the model finds it. A *probe* is a fixed question to the model (these noisy latents at this timestep, these
tokens); a *view* is which weights answer it (policy, reference, old). An objective turns those numbers and
people's feedback into a loss, and knows nothing of the modality.

Shapes: N samples, P pairs, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

View = str
Predict = Callable[..., Tensor]


@dataclass(frozen=True)
class Feedback:
    """Who liked what, flat over the N samples of a batch.

    Attributes:
        group: [N] int64, one number a comparison; a group is never split over batches or ranks.
        score: [N] float, higher is better: 1/0 for a pair, normalised scores or gains for a list.
        weight: [N] float importance, equal within a group; None means 1.
        user: [N] int64, one number a user; None where not every sample has one.
    """

    group: Tensor
    score: Tensor
    weight: Tensor | None = None
    user: Tensor | None = None

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Row indices `win` [P] and `lose` [P]: same group, `score[win] > score[lose]`; a tie makes no pair."""
        return self._pairs

    @cached_property
    def _pairs(self) -> tuple[Tensor, Tensor]:
        same = self.group[:, None] == self.group[None, :]
        better = self.score[:, None] > self.score[None, :]
        win, lose = torch.nonzero(same & better, as_tuple=True)
        return win, lose

    @cached_property
    def best(self) -> Tensor:
        """[W] rows that nobody in their group beats; those that tie for it all count."""
        same = self.group[:, None] == self.group[None, :]
        beaten = (same & (self.score[:, None] < self.score[None, :])).any(1)
        return torch.nonzero(~beaten).squeeze(1)

    @cached_property
    def lists(self) -> tuple[int, Tensor]:
        """How many groups there are, and [N] each sample's, counted from 0 in the order of their numbers."""
        groups, number = torch.unique(self.group, return_inverse=True)
        return len(groups), number

    @property
    def labels_only(self) -> bool:
        """True where every score is 0 or 1: somebody's choice, not a scorer's numbers."""
        return bool(torch.isin(self.score, torch.tensor([0.0, 1.0]).to(self.score)).all())

    def check_pairs(self) -> None:
        """Raises ValueError where there is nothing to compare, or a score is NaN."""
        if not torch.isfinite(self.score).all():
            raise ValueError("a score is NaN or infinite; score the data again, or leave those comparisons out")
        if not len(self.pairs()[0]):
            raise ValueError("no group has two samples with different scores, so there is no pair to learn from")

    def check_scores(self) -> None:
        """Raises ValueError also where there are labels instead of scores, or a list of one."""
        self.check_pairs()
        if self.labels_only:
            raise ValueError("the scores are only labels, 0 and 1; it needs a scorer's scores: score the data first")
        if (torch.unique(self.group, return_counts=True)[1] < 2).any():
            raise ValueError("a list has one sample; each needs two or more to be ranked")

    def weights(self) -> Tensor:
        """[N] float; ones where no weight was given."""
        return torch.ones_like(self.score) if self.weight is None else self.weight

    def to(self, device: torch.device | str) -> Feedback:
        """The same feedback on another device."""
        weight, user = (None if value is None else send(value, device) for value in (self.weight, self.user))
        moved = Feedback(send(self.group, device), send(self.score, device), weight, user)
        # Found here: a host has to wait for a GPU to learn how many there are
        (win, lose), (count, number) = self.pairs(), self.lists
        moved.__dict__["_pairs"] = send(win, device), send(lose, device)
        moved.__dict__["best"], moved.__dict__["lists"] = send(self.best, device), (count, send(number, device))
        return moved


def send(value: Tensor, device: Any, dtype: torch.dtype | None = None) -> Tensor:
    """`value.to`, which waits for the device only when it is read from, and not when it is written to."""
    return value.to(device=device, dtype=dtype, non_blocking=value.device.type == "cpu")


class Cond(Mapping[str, Any]):
    """What a sample is conditioned on: name -> Tensor [N, ...] or list of N (ragged entries).

    Names in `policy_only` are seen by the policy alone and dropped for every other view.
    """

    def __init__(self, entries: Mapping[str, Any], policy_only: frozenset[str] = frozenset()) -> None:
        self._entries = dict(entries)
        self.policy_only = policy_only

    def __getitem__(self, name: str) -> Any:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def _map(self, function: Callable[[Any], Any]) -> Cond:
        return Cond({name: function(value) for name, value in self._entries.items()}, self.policy_only)

    def rows(self, rows: Any) -> Cond:
        """The condition of some samples; `rows` is a slice, or a list or tensor of indices."""

        def pick(value: Any) -> Any:
            if isinstance(value, Tensor) or isinstance(rows, slice):
                return value[rows]
            return [value[int(i)] for i in rows]

        return self._map(pick)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Cond:
        """Moves tensors; only floating point ones change their dtype."""

        def move(value: Any) -> Any:
            if isinstance(value, list):
                return [move(item) for item in value]
            if not isinstance(value, Tensor):
                return value
            return send(value, device, dtype if value.is_floating_point() else None)

        return self._map(move)

    def where(self, mask: Tensor, other: Mapping[str, Any]) -> Cond:
        """Takes `other` (one sample, leading dimension 1) where `mask` [N] is true; for caption dropout."""

        def choose(name: str, value: Any) -> Any:
            if name not in other:
                return value
            if isinstance(value, list):
                return [other[name][0] if drop else own for own, drop in zip(value, mask.tolist(), strict=True)]
            shaped = send(mask, value.device).reshape(-1, *[1] * (value.ndim - 1))
            return torch.where(shaped, other[name].to(value), value)

        return Cond({name: choose(name, value) for name, value in self.items()}, self.policy_only)

    def view(self, view: View) -> Cond:
        """The condition as a view sees it: everything for the policy, the rest without `policy_only`."""
        if view == "policy" or not self.policy_only:
            return self
        kept = {name: value for name, value in self.items() if name not in self.policy_only}
        return Cond(kept)

    @staticmethod
    def cat(parts: list[Cond]) -> Cond:
        """Joins batches along the samples."""
        first = parts[0]
        joined: dict[str, Any] = {}
        for name, value in first.items():
            if isinstance(value, list):
                joined[name] = [item for part in parts for item in part[name]]
            else:
                joined[name] = torch.cat([part[name] for part in parts])
        return Cond(joined, first.policy_only)


class Probe(Protocol):
    """A fixed question to the model; opaque to objectives."""

    @property
    def cond(self) -> Cond:
        """N conditions."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any) -> Probe:
        """The same question for some of the samples."""
        ...

    def logp(self, prediction: Tensor) -> Tensor:
        """[N], higher is likelier; at least float32."""
        ...


@dataclass(frozen=True)
class Likelihood:
    """The answers to one probe.

    Attributes:
        logp: view -> [N]; "policy" carries gradient, every other view does not.
        prediction: view -> network output, kept only for objectives with `mixes = True`.
        probe: the question; an objective also works on a bare `Likelihood(logp)`.
    """

    logp: Mapping[View, Tensor]
    prediction: Mapping[View, Tensor] = field(default_factory=dict)
    probe: Probe | None = None

    @property
    def log_ratio(self) -> Tensor:
        """[N] `logp["policy"] - logp["reference"]`: the implicit reward over beta."""
        return self.logp["policy"] - self.logp["reference"]


@dataclass(frozen=True)
class Keys:
    """What names a sample to the counter-based generator: every draw is a function of these.

    Attributes:
        seed: the run's seed.
        group: [N] int64, as in Feedback.
        position: [N] int64, the member's place in its group.
        draw: [N] int64, how often the group was drawn before (its epoch).
    """

    seed: int
    group: Tensor
    position: Tensor
    draw: Tensor

    def rows(self, rows: Any) -> Keys:
        """The keys of some samples."""
        return Keys(self.seed, self.group[rows], self.position[rows], self.draw[rows])


class Draw(Protocol):
    """Where the likelihood is asked for; makes one probe a batch."""

    @property
    def cacheable(self) -> bool:
        """False when x_t depends on the policy's weights: then no cached reference."""
        ...

    def __call__(self, x0: Tensor, cond: Cond, keys: Keys, path: Any, predict: Predict) -> Probe:
        """The probe of N samples.

        Draws that ask the network call `predict(x_t, t, cond, view="policy")` -> [N, ...]: no gradient, no guidance.
        """
        ...


class SupportsPredict(Protocol):
    """All that `evaluate` asks of a modality."""

    def predict(self, probe: Any, view: View) -> Tensor:
        """The network's output for a probe."""
        ...


def no_switch(view: View) -> AbstractContextManager[Any]:
    """Leaves the weights as they are: for models that hold no second set."""
    return nullcontext()


def evaluate(
    modality: SupportsPredict,
    probe: Probe,
    needs: tuple[View, ...],
    *,
    use: Callable[[View], AbstractContextManager[Any]] = no_switch,
    known: Mapping[View, Tensor] | None = None,
    keep_prediction: bool = False,
) -> Likelihood:
    """Asks the same probe under every view: same noise, same timestep, by construction.

    Views other than the policy run first and without gradient, so that their activations are gone
    before the policy's are made, and so that the weights stand as the policy's when backward runs.

    Args:
        modality: has `predict(probe, view)`.
        probe: N samples.
        needs: the views besides the policy.
        use: context manager that makes the network be a view (WeightViews in training).
        known: view -> [N] logp that are already known (cached); those views are not run.
        keep_prediction: keep the network outputs for objectives that mix them.
    """
    logp: dict[View, Tensor] = {}
    predictions: dict[View, Tensor] = {}
    # One network may be every view (LoRA on or off): asked last, a reference would add to the policy's activations
    for view in needs:
        if known is not None and view in known:
            logp[view] = known[view]
            continue
        with torch.no_grad(), use(view):
            prediction = modality.predict(probe, view)
            logp[view] = probe.logp(prediction)
        if keep_prediction:
            predictions[view] = prediction
    with use("policy"):
        prediction = modality.predict(probe, "policy")
        logp["policy"] = probe.logp(prediction)
    if keep_prediction:
        predictions["policy"] = prediction
    return Likelihood(logp, predictions, probe)
