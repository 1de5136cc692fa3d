"""One optimizer step: from comparisons to gradients.

The mean is over the whole step: every micro-batch and process divides by the number of terms that the objective
returns for all of them together, so the gradient does not depend on how a step is cut.

Shapes: N samples of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from mmalign.data.cache import EMPTY, Cache
from mmalign.data.loader import decode
from mmalign.data.users import Users, numbers_of, read_users
from mmalign.records import Comparison
from mmalign.surrogate import (
    AnswerTokens,
    Cond,
    Feedback,
    FreshNoise,
    Keys,
    Likelihood,
    NoisedProbe,
    Probe,
    evaluate,
)
from mmalign.surrogate.draws import normal, uniform
from mmalign.surrogate.likelihood import send
from mmalign.training.run import Run


def feedback_of(items: Sequence[Comparison], scale: tuple[float, float] | None = None) -> Feedback:
    """Flat feedback of whole comparisons, in their order; `scale` (low, high) is what becomes 0 and 1."""
    members = [(item, k) for item in items for k in range(len(item.media))]
    low, high = scale or (0.0, 1.0)
    return Feedback(
        torch.tensor([item.group for item, _ in members]),
        torch.tensor([(float(item.score[k]) - low) / (high - low) for item, k in members]),
        torch.tensor([float(item.weight) for item, _ in members]),
        numbers_of([item.user for item, _ in members]),
    )


def keys_of(items: Sequence[Comparison], draws: Sequence[int], seed: int) -> Keys:
    """What names the samples to the counter-based generator."""
    members = [(item.group, k, draw) for item, draw in zip(items, draws, strict=True) for k in range(len(item.media))]
    group, position, draw = torch.tensor(members, dtype=torch.int64).unbind(1)
    return Keys(seed, group, position, draw)


class Encoder:
    """Comparisons to latents and conditions, from the cache, or kept in memory after their first use."""

    def __init__(self, modality: Any, keep: bool, cache: Cache | None = None) -> None:
        self.modality, self.keep, self.cache = modality, keep, cache
        self.kept: dict[str, Any] = {}

    def frame(self, item: Any) -> tuple[int, ...]:
        """The shape that all its media have."""
        return item.shape if self.cache else self.modality.frame(item)

    def empty(self) -> Cond:
        """The empty prompt."""
        if not self.cache:
            return self.modality.empty()
        return Cond({name: value[None] for name, value in self.cache.pieces[EMPTY].items()}).to(self.modality.device)

    def ready(self, items: Sequence[Any]) -> list[Any]:
        """What the loader's threads do ahead: they read a cache's pieces, or open pictures."""
        if self.cache:
            return self.cache.read(items, self.modality.device)
        return list(items) if self.keep else decode(items)  # with latents in memory most need no decoding any more

    def __call__(self, items: Sequence[Any]) -> Any:
        """The modality's Encoded of the items."""
        if self.cache:
            return self.cache.encoded(self.modality, items)
        if not self.keep:
            return self.modality.encode(items)
        for item in items:
            if item.id not in self.kept:
                self.kept[item.id] = self.modality.encode([item])
        parts = [self.kept[item.id] for item in items]
        return type(parts[0]).cat(parts)


class Step:
    """Asks, compares and differentiates; knows no method and no modality by name.

    Args:
        run: its objective, backward mode, dropout and seed.
        modality: encodes and predicts.
        views: switches the weights.
        accelerator: runs backward and sums over processes.
        cache: where the items come from, if they are cached ones.
    """

    def __init__(
        self, run: Run, modality: Any, views: Callable[[str], Any], accelerator: Any, cache: Cache | None = None
    ) -> None:
        self.run, self.modality, self.views, self.accelerator = run, modality, views, accelerator
        self.objective = run.objective
        self.draw = self.objective.draw or (FreshNoise() if modality.path is not None else AnswerTokens())
        self.encode = Encoder(modality, run.cache_latents, cache)
        self.empty = self.encode.empty() if run.proportion_empty_prompts else None
        self.reference: Callable[[Sequence[Any], Sequence[int]], Tensor] | None = None  # known answers, if cached
        self.users: Users | None = read_users(run.users) if run.users else None
        self.calls = 0  # of the network for one view of a batch, at least: sharded, processes make equally many

    def terms(self, items: Sequence[Comparison]) -> int:
        """How many numbers the objective will return for these comparisons."""
        feedback = feedback_of(items, self.run.score_scale)
        zero = torch.zeros(len(feedback.score))
        return len(self.objective(Likelihood(dict.fromkeys(("policy", *self.objective.needs), zero)), feedback))

    def split(self, items: Sequence[Comparison], draws: Sequence[int]) -> list[tuple[list[Comparison], list[int]]]:
        """The batch in parts of one shape: the step's mean does not depend on how it is cut.

        Draw indices become those of the run's fixed draws, if it has them.
        """
        count = self.run.draws_per_sample
        parts: dict[tuple[int, ...], tuple[list[Comparison], list[int]]] = {}
        for item, draw in zip(items, draws, strict=True):
            part = parts.setdefault(self.encode.frame(item) if self.run.aspect_buckets else (), ([], []))
            part[0].append(item)
            part[1].append(draw % count if count else draw)
        return list(parts.values())

    def known(self, items: Sequence[Comparison], draws: Sequence[int]) -> dict[str, Tensor]:
        """Answers that need not be asked for: view -> [N]."""
        if not self.reference:
            return {}
        return {"reference": send(self.reference(items, draws), self.accelerator.device)}

    def probe(self, items: Sequence[Comparison], draws: Sequence[int]) -> tuple[Probe, Feedback]:
        """Encodes comparisons of one shape and draws where their likelihood is asked."""
        encoded = self.encode(items)
        keys, cond = keys_of(items, draws, self.run.seed), encoded.cond
        if self.empty is not None:
            cond = cond.where(uniform(keys, "caption dropout") < self.run.proportion_empty_prompts, self.empty)
        if self.users is not None:
            cond = self._with_users(cond, items, keys)
        x0 = encoded.x0
        if encoded.x0_std is not None:
            x0 = x0 + encoded.x0_std * normal(keys, "posterior", x0)
        probe = self.draw(x0, cond, keys, self.modality.path, self._ask)
        return probe, feedback_of(items, self.run.score_scale).to(x0.device)

    def _with_users(self, cond: Cond, items: Sequence[Comparison], keys: Keys) -> Cond:
        """Tells the policy, and no other view, whose preference it is; a dropped user is 0, which is nobody."""
        vectors = torch.stack([self.users.of(item) for item in items for _ in item.media])
        kept = uniform(keys, "user dropout") >= self.run.user_dropout
        return Cond({**cond, "user": vectors * kept[:, None]}, cond.policy_only | {"user"})

    @torch.no_grad()
    def _ask(self, x_t: Tensor, t: Tensor, cond: Cond, view: str = "policy") -> Tensor:
        """For draws that ask the network themselves (inversions): no gradient, row by row where memory asks."""
        probe = NoisedProbe(self.modality.path, x_t, t, torch.zeros_like(x_t), cond, x_t)
        with self.views(view):
            answers = [self.modality.predict(probe[rows], view) for rows in self.rows(len(probe))]
        return torch.cat(answers)[: len(probe)]

    def rows(self, count: int) -> list[slice]:
        """The rows that are asked at once; the last again and again where others have more."""
        size = self.run.rows_at_once if self.run.backward == "two-pass" else count
        own = [slice(start, min(start + size, count)) for start in range(0, count, size)]
        return own + own[-1:] * (self.calls - len(own))

    def backward(
        self, probe: Probe, feedback: Feedback, scale: float, last: bool, known: Mapping[str, Tensor] | None = None
    ) -> tuple[Likelihood, Tensor]:
        """Adds a micro-batch's gradient; `last` is the one after which processes sum theirs.

        Args:
            probe: of N samples.
            feedback: of the same.
            scale: of the sum of losses.
            last: whether processes sum their gradients after it.
            known: see `known`.

        Returns:
            The likelihood and the unreduced loss, both without gradient.
        """
        two_pass = self.run.backward == "two-pass"
        likelihood, loss = (self._two_pass if two_pass else self._plain)(probe, feedback, scale, last, known or {})
        logp = {view: value.detach() for view, value in likelihood.logp.items()}
        return Likelihood(logp, {}, probe), loss.detach()

    def _sync(self, wanted: bool) -> Any:
        # Sharded, gradients that wait for their sum would be whole on each process
        always = wanted or self.accelerator.is_fsdp2
        return nullcontext() if always else self.accelerator.no_sync(self.modality.network)

    def _plain(
        self, probe: Probe, feedback: Feedback, scale: float, last: bool, known: Mapping[str, Tensor]
    ) -> tuple[Likelihood, Tensor]:
        mixes = getattr(self.objective, "mixes", False)
        with self._sync(last):
            likelihood = evaluate(
                self.modality, probe, self.objective.needs, use=self.views, known=known, keep_prediction=mixes
            )
            loss = self.objective(likelihood, feedback)
            total = loss.sum() * scale
            # A fused backward moves weights, so whether they may is asked before it
            if not self.run.fused_backward or (len(loss) and torch.isfinite(total)):
                self.accelerator.backward(total)
        return likelihood, loss

    def _two_pass(
        self, probe: Probe, feedback: Feedback, scale: float, last: bool, known: Mapping[str, Tensor]
    ) -> tuple[Likelihood, Tensor]:
        """An objective is a function of N numbers: differentiate it there, then re-run the network row by row."""
        rows = self.rows(len(probe))
        with torch.no_grad():
            parts = [
                evaluate(
                    self.modality,
                    probe[part],
                    self.objective.needs,
                    use=self.views,
                    known={view: values[part] for view, values in known.items()},
                ).logp
                for part in rows
            ]
        logp = {view: torch.cat([part[view] for part in parts])[: len(probe)] for view in parts[0]}
        leaf = logp["policy"] = logp["policy"].requires_grad_()
        likelihood = Likelihood(logp, {}, probe)
        loss = self.objective(likelihood, feedback)
        (coefficient,) = torch.autograd.grad(loss.sum() * scale, leaf)
        for number, part in enumerate(rows):
            with self._sync(last and number == len(rows) - 1):
                asked = probe[part]
                value = asked.logp(self.modality.predict(asked, "policy"))
                repeated = number > 0 and part == rows[number - 1]
                self.accelerator.backward((coefficient[part] * value).sum() * (not repeated))
        return likelihood, loss


BUCKETS = 4


class Meter:
    """Sums over a step's micro-batches, on their device; `means` sums over processes and reads, once a step."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}  # [2]: sum and number

    def _add(self, name: str, values: Tensor, chosen: Tensor | None = None) -> None:
        counted = torch.ones_like(values, dtype=torch.float64) if chosen is None else chosen.double()
        own = torch.stack([(values.double() * counted).sum(), counted.sum()])
        self.sums[name] = self.sums[name] + own if name in self.sums else own

    def add(self, likelihood: Likelihood, loss: Tensor, feedback: Feedback) -> None:
        """Takes in one micro-batch."""
        self._add("loss", loss)
        win, lose = feedback.pairs()
        relative = "reference" in likelihood.logp
        value = likelihood.log_ratio if relative else likelihood.logp["policy"]
        margin = value[win] - value[lose]
        accuracy = (margin > 0).double() + 0.5 * (margin == 0).double()
        name = "log_ratio" if relative else "logp"
        for key, values in [
            ("chosen_" + name, value[win]),
            ("rejected_" + name, value[lose]),
            ("margin", margin),
        ]:
            self._add(key, values)
        self._add("implicit_accuracy", accuracy)
        t, path = getattr(likelihood.probe, "t", None), getattr(likelihood.probe, "path", None)
        bucket = (path.fraction(t)[win] * BUCKETS).long() if t is not None and path is not None else None
        for number in range(BUCKETS if bucket is not None else 0):
            self._add(f"implicit_accuracy_t{number}", accuracy, bucket == number)

    def means(self, accelerator: Any, **own: Tensor) -> dict[str, float]:
        """Name -> mean over everything that was added on all processes; names without a value are left out.

        This is where the host waits for the device. Numbers of `own`, equal on all processes, are read with them.
        """
        sums = accelerator.reduce(torch.stack([self.sums[name] for name in sorted(self.sums)]), "sum")
        read = torch.cat([sums.flatten(), *(value.detach().to(sums).reshape(1) for value in own.values())]).tolist()
        pairs = zip(sorted(self.sums), read[0::2], read[1::2], strict=False)
        return {name: total / number for name, total, number in pairs if number} | dict(
            zip(own, read[sums.numel() :], strict=True)
        )
