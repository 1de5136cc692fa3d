"""Training of reward models: from comparisons to a scorer's folder.

Whatever family the scorer is of, it is used through `prepare` and `judge`, and its networks are its attributes `model`
(or `chat.model`) and `head`. Families whose `judge` takes no gradient, such as those that read a VLM's answers, cannot
be trained.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmalign import storage
from mmalign.records import Comparison, UserError, check_fields
from mmalign.scoring import losses
from mmalign.scoring.accuracy import Interval, Some, flat, liked, measured
from mmalign.scoring.folder import write_scorer
from mmalign.scoring.head import AspectHeads, tapped, with_mean
from mmalign.scoring.scorer import Scorer, load_scorer

LOSSES = {  # name -> (pairs' loss, whether it learns from ties); `listwise` stands by itself
    "bradley_terry": (lambda run, seed, a, b, label, sigma: losses.bradley_terry(a, b, label), False),
    "bradley_terry_ties": (lambda run, seed, a, b, label, sigma: losses.bradley_terry_ties(a, b, label, run.k), True),
    "soft_cross_entropy": (lambda run, seed, a, b, label, sigma: losses.soft_cross_entropy(a, b, label), True),
    "uncertainty": (
        lambda run, seed, a, b, label, sigma: losses.uncertainty(a, b, label, *sigma, samples=run.samples, seed=seed),
        False,
    ),
}
BLOCK = re.compile(r"(.*?)(resblocks|layers|layer|blocks)\.?(\d+)$")  # open_clip, its ResNets, transformers, timm
IN_BLOCK = re.compile(r"(resblocks|layers|layer|blocks)\.?\d+\.")
EARLY = re.compile(r"embed|patch|conv1|ln_pre")  # what stands before a tower's blocks


@dataclass(frozen=True)
class ScorerRun:
    """Everything that the training of a scorer is made of.

    Attributes:
        scorer: where to start: a bundled scorer or a folder with a card.yaml.
        dataset_name: comparisons: folder, file or hub id.
        output_dir: of checkpoints; the new scorer is the folder `scorer` in it.
        max_train_steps: optimizer steps.
        learning_rate: its peak.
        loss: see `mmalign.scoring.losses`; over the pairs of each comparison, or over its list.
        k: of bradley_terry_ties.
        samples: draws of uncertainty, for scorers that give a `sigma`.
        soft_labels: scores are votes, and a pair's label is their share; else their order alone counts.
        head: put new heads of this kind on the backbone, one an aspect; None trains the scorer as it is.
        aspects: learn these aspects of the comparisons, each by its head (fidelity is also X.fidelity, as mmalign
            score writes those of a scorer X, and overall is the score); empty: the overall score by no head of its own.
        taps: layers of a CLIP's image tower whose mean and deviation new heads see too.
        train_batch_size: comparisons of a step.
        eval_batch_size: media judged at once where nothing is learnt.
        adam_weight_decay: of AdamW.
        lr_scheduler: after the warm-up.
        lr_warmup_steps: linear.
        max_grad_norm: gradients are clipped to this norm.
        frozen_fraction: of each tower's blocks, the first ones, with their embeddings; 1 freezes the whole backbone,
            whose features are then computed once.
        rank: of a LoRA in the attention of a vision-language model; 0 trains the weights that are not frozen.
        max_logit_scale: a CLIP's logit scale is kept below it; ln 100 as in CLIP.
        per_prompt_weights: weigh a comparison by 1 / (how many its prompt has).
        validation_fraction: share of prompts that tune the tie threshold of PickScore's accuracy.
        test_fraction: share of prompts that the accuracies are measured on.
        test_dataset_name: measure them on these comparisons instead.
        max_train_samples: read no more comparisons than this.
        checkpointing_steps: save every so many steps.
        resume_from_checkpoint: go on from the newest checkpoint.
        seed: of everything random.
    """

    scorer: str
    dataset_name: str
    output_dir: str
    max_train_steps: int
    learning_rate: float
    loss: Literal["bradley_terry", "bradley_terry_ties", "soft_cross_entropy", "uncertainty", "listwise"] = (
        "bradley_terry"
    )
    k: float = 5.0
    samples: int = 1000
    soft_labels: bool = False
    head: Literal["linear", "mlp", "mlp-relu", "silu2"] | None = None
    aspects: tuple[str, ...] = ()
    taps: tuple[str, ...] = ()
    train_batch_size: int = 16
    eval_batch_size: int = 64
    adam_weight_decay: float = 0.01
    lr_scheduler: Literal["constant", "cosine"] = "constant"
    lr_warmup_steps: int = 0
    max_grad_norm: float = 1.0
    frozen_fraction: float = 1.0
    rank: int = 0
    max_logit_scale: float = math.log(100)
    per_prompt_weights: bool = False
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    test_dataset_name: str | None = None
    max_train_samples: int | None = None
    checkpointing_steps: int = 500
    resume_from_checkpoint: bool = False
    seed: int = 0

    def __post_init__(self):
        """Raises UserError for a value that cannot be."""
        check_fields(self)
        for name in ("max_train_steps", "train_batch_size", "eval_batch_size", "checkpointing_steps", "samples"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it has to be 1 or more.")
        for name in ("frozen_fraction", "validation_fraction", "test_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; it has to be in [0, 1].")
        if self.learning_rate <= 0:
            raise UserError(f"learning_rate is {self.learning_rate}; it has to be above 0.")
        if self.k <= 1:
            raise UserError(
                f"k is {self.k}; it has to be above 1, as bradley_terry_ties without ties is bradley_terry."
            )
        if self.head and not self.aspects:
            raise UserError(
                f"head is {self.head} but aspects is empty; name the aspects, or overall for the overall score."
            )

        if wrong := [name for name in self.aspects if "." in name or (self.head and name == "score")]:
            raise UserError(f"aspects has {wrong[0]}; a head's name holds no dot, and the overall score's is overall.")

    def rate(self, step: int) -> float:
        """The learning rate of the step after `step` steps."""
        if step < self.lr_warmup_steps:
            return self.learning_rate * (step + 1) / self.lr_warmup_steps
        done = (step - self.lr_warmup_steps) / max(1, self.max_train_steps - self.lr_warmup_steps)
        return self.learning_rate * (0.5 + 0.5 * math.cos(math.pi * done) if self.lr_scheduler == "cosine" else 1)


def networks(scorer: Any) -> dict[str, Any]:
    """Name -> network of a scorer; its `head` may be a mapping of tensors, as that of a reward model on a VLM is."""
    own = vars(scorer) | ({"model": scorer.chat.model} if hasattr(scorer, "chat") else {})
    return {name: value for name, value in own.items() if isinstance(value, nn.Module) or (name == "head" and value)}


def train_scorer(
    run: ScorerRun,
    comparisons: Sequence[Comparison],
    test: Sequence[Comparison] | None = None,
    *,
    interval: Interval | None = None,
    watch: Callable[[int, float], None] = lambda step, loss: None,
    device: str | torch.device = "cpu",
) -> Path:
    """Trains a scorer and measures it on held-out prompts.

    Args:
        run: what to do.
        comparisons: what it learns from, less the held-out prompts.
        test: what it is measured on; default `run.test_fraction` of the prompts.
        interval: of a mean, given values [M] and `clusters` [M], such as `mmalign.evaluation.metrics`'s bootstrap.
        watch: told the step and its loss.
        device: where it computes.

    Returns:
        The folder of the new scorer, which `load_scorer` takes.

    Raises:
        UserError: comparisons lack an aspect or a medium, nothing is left to learn from, a checkpoint is another run's.
    """
    output = Path(run.output_dir)
    last = _checkpoint(run)
    fit, validation, held = _split(run, comparisons)
    if test is not None:
        held = Some(test, range(len(test)))
        for item in test:
            _check(run, item)
    if not len(fit):
        raise UserError(f"{run.dataset_name}: all prompts are held out; lower validation_fraction and test_fraction.")
    scorer = _start(run, device)
    learning = _unlock(scorer, run)
    learner = _Learner(run, scorer, fit)
    optimizer = torch.optim.AdamW(learning.values(), lr=run.learning_rate, weight_decay=run.adam_weight_decay)
    done = 0
    if last is not None:
        try:
            for name, value in load_file(last / "weights.safetensors").items():
                learning[name].data.copy_(value)
            optimizer.load_state_dict(storage.load_tensors(last / "optimizer.pt"))
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{last}: cannot be read ({str(error).splitlines()[0]}); start anew elsewhere.") from error
        done = int(last.name.removeprefix("checkpoint-"))
    scales = [value for name, value in learning.items() if name.endswith("logit_scale")]
    for step in range(done, run.max_train_steps):
        for group in optimizer.param_groups:
            group["lr"] = run.rate(step)
        loss = learner.loss(step)
        if not loss.requires_grad:
            raise UserError(
                f"{run.scorer}: judges without gradient, as do all that read a VLM's answers; take another."
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning.values(), run.max_grad_norm, error_if_nonfinite=True)
        optimizer.step()
        for scale in scales:
            scale.data.clamp_(max=run.max_logit_scale)
        watch(step + 1, loss.item())
        if (step + 1) % run.checkpointing_steps == 0:
            with storage.atomic_folder(output / f"checkpoint-{step + 1}") as folder:
                save_file({k: v.detach().contiguous() for k, v in learning.items()}, folder / "weights.safetensors")
                torch.save(optimizer.state_dict(), folder / "optimizer.pt")
                storage.write_json(folder / "run.json", dataclasses.asdict(run))
    return _finish(run, scorer, learning, len(fit), validation, held, interval)


class _Learner:
    """The loss of a step, from features that were kept where the backbone does not change."""

    def __init__(self, run: ScorerRun, scorer: Scorer, comparisons: Some):
        self.run, self.scorer, self.comparisons = run, scorer, comparisons
        self.heads = networks(scorer).get("head")
        self.features = None
        if isinstance(self.heads, AspectHeads) and run.frozen_fraction == 1 and not run.rank:
            self.features = _features(run, scorer, comparisons)
        counts = losses.per_prompt([item.prompt for item in comparisons]) if run.per_prompt_weights else 1
        self.weight = torch.tensor([item.weight for item in comparisons], dtype=torch.float32) * counts

    def loss(self, step: int) -> Tensor:
        """The weighted mean over the pairs of a step's comparisons; a function of the weights and the step alone."""
        run, size = self.run, len(self.comparisons)
        places = range(step * run.train_batch_size, (step + 1) * run.train_batch_size)
        rows = [int(_order(size, run.seed, place // size)[place % size]) for place in places]
        with torch.random.fork_rng():
            torch.manual_seed(int(np.random.default_rng([run.seed, step]).integers(2**31)))  # of the heads' dropout
            parts = self._parts(rows)
        items = [self.comparisons[row] for row in rows]
        device = parts["score"].device
        group = torch.tensor([n for n, item in enumerate(items) for _ in item.media], device=device)
        weight = self.weight[rows].to(device)
        total, mass = parts["score"].new_zeros(()), parts["score"].new_zeros(())
        for name in run.aspects or ("score",):
            target = torch.tensor([v for item in items for v in liked(item, name)], device=device)
            if run.loss == "listwise":
                each, of = losses.listwise(parts[name], target, group), group
            else:
                loss, ties = LOSSES[run.loss]
                a, b, label = losses.pairs(target, group, soft=run.soft_labels)
                kept = torch.ones_like(a, dtype=torch.bool) if ties else label != 0.5
                a, b, label = a[kept], b[kept], label[kept]
                if run.loss == "uncertainty" and "sigma" not in parts:
                    raise UserError(f"{run.scorer}: gives no sigma, which uncertainty needs; take another loss.")
                sigma = [parts["sigma"][rows].log() for rows in (a, b)] if "sigma" in parts else None
                each, of = loss(run, run.seed + step, parts[name][a], parts[name][b], label, sigma), group[a]
            total, mass = total + (weight[of] * each).sum(), mass + weight[of].sum()
        return total / mass.clamp(min=1e-12)

    def _parts(self, rows: Sequence[int]) -> dict[str, Tensor]:
        if self.features is not None:
            kept = torch.cat([self.features[row] for row in rows])
            return with_mean(self.heads.train()(kept), self.scorer.card.score["head"].get("weights"))
        if isinstance(self.heads, nn.Module):
            self.heads.train()
        media, prompts = flat([self.comparisons[row] for row in rows])
        return self.scorer.judge(_prepared(self.scorer, media), prompts)


def _order(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, size]).permutation(size)


def _prepared(scorer: Scorer, media: Sequence[tuple[Any, Any, str]]) -> list[Any]:
    with ThreadPoolExecutor(4) as threads:
        return list(threads.map(lambda one: scorer.prepare(one[0], condition=one[1], name=one[2]), media))


@torch.no_grad()
def _features(run: ScorerRun, scorer: Any, comparisons: Some) -> list[Tensor]:
    """What aspect heads judge by, [K, width] of each comparison."""
    found = []
    for place in range(0, len(comparisons), run.train_batch_size):
        items = [comparisons[row] for row in range(place, min(place + run.train_batch_size, len(comparisons)))]
        media, prompts = flat(items)
        kept = scorer.aspect_features(_prepared(scorer, media), prompts)
        found += kept.split([len(item.media) for item in items])
    return found


def _check(run: ScorerRun, item: Comparison) -> None:
    """Raises UserError where a comparison lacks what is to be learnt from it."""
    where = f"{run.dataset_name}, comparison {item.id!r}"
    there = {"score", "overall", *(key.rpartition(".")[2] for key in item.aspects)}
    if missing := [name for name in run.aspects if name not in there]:
        known = ", ".join(item.aspects) or "none"
        raise UserError(f"{where}: has no aspect {missing[0]!r}, but {known}; choose aspects that all of them have.")
    for name in (run.aspects or ("score",)) if run.soft_labels else ():
        votes = liked(item, name)
        if min(votes) < 0 or sorted(votes)[:2] == [0, 0]:
            raise UserError(f"{where}: soft_labels needs votes, at most one of them 0, not {votes} ({name}).")


def _split(run: ScorerRun, comparisons: Sequence[Comparison]) -> tuple[Some, Some, Some]:
    """What to fit, to tune and to measure on: whole prompts, dealt by a hash of the prompt alone."""
    parts: tuple[list[int], ...] = ([], [], [])
    for row, item in enumerate(comparisons):
        _check(run, item)
        digest = hashlib.blake2b(item.prompt.encode(), digest_size=8).digest()
        place = int.from_bytes(digest, "big") / 2**64
        held = place >= 1 - run.test_fraction and run.test_dataset_name is None
        parts[2 if held else 1 if place < run.validation_fraction else 0].append(row)
    fit, validation, test = (Some(comparisons, rows) for rows in parts)
    return fit, validation, test


def _checkpoint(run: ScorerRun) -> Path | None:
    """The newest checkpoint if the run is to go on from it.

    Raises:
        UserError: there is none, it is another run's, or there is one and the run is to start afresh.
    """
    output = Path(run.output_dir)
    last = storage.newest(output)
    if not run.resume_from_checkpoint:
        if last is not None or (output / "scorer").exists():
            raise UserError(
                f"{output}: holds a run already; go on with resume_from_checkpoint, or choose another folder."
            )
        return None
    if last is None:
        raise UserError(f"{output}: has no whole checkpoint to resume from; leave resume_from_checkpoint out.")
    free = {"output_dir", "checkpointing_steps", "resume_from_checkpoint", "eval_batch_size", "test_dataset_name"}
    own, saved = dataclasses.asdict(run), storage.read_json(last / "run.json")
    own = {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}
    if different := [name for name in own if name not in free and own[name] != saved.get(name)]:
        raise UserError(f"{last}: belongs to another run ({', '.join(different)} differ); choose another output_dir.")
    return last


def _start(run: ScorerRun, device: str | torch.device) -> Scorer:
    """The scorer to train; with new heads, that are made in the folder `start`, if the run wants them."""
    scorer = load_scorer(run.scorer, device)
    if run.head is None:
        if lost := set(run.aspects) - {*scorer.parts, "score"}:
            raise UserError(f"{run.scorer}: has no head for {min(lost)}; give head to put new ones on.")
        if scorer.card.score.get("formula") == "cosine":  # losses are in units of logits, as HPSv2's training has it
            score = {**scorer.card.score, "formula": "cosine-logit-scale"}
            scorer.card = dataclasses.replace(scorer.card, score=score)
        return scorer
    if not hasattr(scorer, "aspect_features"):
        raise UserError(f"{run.scorer}: only a CLIP or a BLIP takes new heads; leave head out to train its own.")
    blank = [scorer.prepare(Image.new("RGB", (64, 64)))]
    kept = {name: value for name, value in scorer.card.score.items() if name == "prefix"}
    try:
        layers = tapped(scorer.model.visual, torch.stack(blank).to(scorer.device), run.taps)[1] if run.taps else []
    except AttributeError as error:
        raise UserError(f"{run.scorer}: has no layer of taps ({error}).") from None
    taps = {name: layer.shape[1 if layer.ndim == 4 else 2] for name, layer in zip(run.taps, layers, strict=True)}
    scorer.card = dataclasses.replace(scorer.card, score={"formula": "aspects", "taps": taps, **kept})
    width = scorer.aspect_features(blank, [""]).shape[1]
    with torch.random.fork_rng():
        torch.manual_seed(run.seed)
        heads = AspectHeads(run.aspects, width, run.head)
    scorer.card.score["head"] = {"kind": run.head, "names": list(run.aspects)}
    with storage.atomic_folder(Path(run.output_dir) / "start") as folder:
        write_scorer(scorer.card, folder, head=heads.state_dict())
    return load_scorer(Path(run.output_dir) / "start", device)


def _unlock(scorer: Scorer, run: ScorerRun) -> dict[str, nn.Parameter]:
    """Name -> the parameters that learn: the heads, and of the backbone what is not frozen, or a LoRA."""
    learning = {}
    for part, network in networks(scorer).items():
        whole = part == "head"
        if run.rank and not hasattr(scorer, "chat"):
            raise UserError(
                f"{run.scorer}: rank is for scorers on a vision-language model; lower frozen_fraction instead."
            )
        if run.rank and not whole:
            from peft import LoraConfig, inject_adapter_in_model

            with torch.random.fork_rng():
                torch.manual_seed(run.seed)
                targets = r".*\.(q_proj|k_proj|v_proj|o_proj)"
                inject_adapter_in_model(LoraConfig(r=run.rank, lora_alpha=run.rank, target_modules=targets), network)
        elif not whole:
            frozen = _frozen(network, run.frozen_fraction)
        for name, parameter in network.items() if isinstance(network, dict) else network.named_parameters():
            parameter.requires_grad_(False)
            if run.rank:
                chosen = whole or "lora_" in name
            else:
                held = run.frozen_fraction > 0 and EARLY.search(name) and not IN_BLOCK.search(name)
                chosen = whole or (run.frozen_fraction < 1 and not name.startswith(frozen) and not held)
            if chosen:
                learning[f"{part}.{name}"] = parameter.requires_grad_(True)
    if not learning:
        raise UserError(f"{run.scorer}: nothing of it would learn; lower frozen_fraction, or give rank or head.")
    if run.frozen_fraction < 1 and hasattr(scorer, "embed"):
        scorer.embed = lambda prompts: _texts(scorer, prompts)
    return learning


def _frozen(network: nn.Module, fraction: float) -> tuple[str, ...]:
    """Prefixes of the parameters in the first blocks of each tower.

    Raises:
        UserError: a part is to be frozen, but no blocks are found.
    """
    towers: dict[str, list[tuple[int, str]]] = {}
    for name, _ in network.named_modules():
        found = BLOCK.match(name)
        if found and not any(name.startswith(f"{outer}.") for blocks in towers.values() for _, outer in blocks):
            towers.setdefault(found[1] + found[2], []).append((int(found[3]), name))
    if not towers and 0 < fraction < 1:
        raise UserError(
            "frozen_fraction is between 0 and 1, but the network has no blocks that are known; take 0 or 1."
        )
    return tuple(f"{name}." for b in towers.values() for _, name in sorted(b)[: round(fraction * len(b))])


def _texts(scorer: Any, prompts: Sequence[str]) -> Tensor:
    """A CLIP's text embeddings of length 1 with gradient, and so none is remembered."""
    from mmalign.scoring.clip import ordinary, read_text

    unique = list(dict.fromkeys(prompts))
    prefix = scorer.card.score.get("prefix", "")
    tokens = scorer.tokenizer([ordinary(prefix + prompt, scorer.tokenizer) for prompt in unique]).to(scorer.device)
    found = nn.functional.normalize(read_text(scorer.model, tokens), dim=-1)
    return found[[unique.index(prompt) for prompt in prompts]]


def _merge(network: nn.Module) -> None:
    """Adds a LoRA to the weights that it lies on, and takes it away."""
    from peft.tuners.lora import LoraLayer

    for name, layer in list(network.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()
            network.set_submodule(name, layer.get_base_layer())


def _finish(
    run: ScorerRun,
    scorer: Scorer,
    learning: dict[str, Any],
    fitted: int,
    validation: Some,
    test: Some,
    interval: Interval | None,
) -> Path:
    """Writes the scorer, then measures what was written and completes its card."""
    parts = networks(scorer)
    made: dict[str, dict[str, Tensor]] = {}
    for part in {name.split(".")[0] for name in learning}:
        if run.rank and part != "head":
            _merge(parts[part])
        own = parts[part]
        made["head" if part == "head" else "backbone"] = own if isinstance(own, dict) else own.state_dict()
    if "head" in made and "head" not in scorer.card.score:  # BLIP's and a VLM's lie among their weights
        prefix = "rm_head" if hasattr(scorer, "chat") else "mlp"
        head = {f"{prefix}.{name}": value for name, value in made.pop("head").items()}
        made["backbone"] = parts["model"].state_dict() | head
    told = f"the aspects {', '.join(run.aspects)}" if run.aspects else "the overall score"
    frozen = f"a LoRA of rank {run.rank}" if run.rank else f"{run.frozen_fraction:.0%} of the backbone's blocks frozen"
    old = scorer.card
    card = dataclasses.replace(
        old,
        name=Path(run.output_dir).resolve().name,
        about=f"Trained from {Path(run.scorer).name} on {told} of {fitted:,} comparisons: {run.loss}, "
        f"{run.max_train_steps} steps of {run.train_batch_size}, learning rate {run.learning_rate:g}, {frozen}, "
        f"seed {run.seed}.",
        licence=f"to be chosen: the scorer it started from is {old.licence}, and the comparisons have their own",
        published=(),
    )
    target = Path(run.output_dir) / "scorer"
    with storage.atomic_folder(target) as folder:
        write_scorer(card, folder, **made)
        new = load_scorer(folder, getattr(scorer, "device", "cpu"))
        found = tuple(measured(new, run.aspects or ("score",), validation, test, run.eval_batch_size, interval))
        facts = yaml.safe_load((folder / "card.yaml").read_text())
        facts["published"] = [{**line, "source": "measured by mmalign train-scorer"} for line in found]
        (folder / "card.yaml").write_text(yaml.safe_dump(facts, sort_keys=False, allow_unicode=True, width=110))
    return target
