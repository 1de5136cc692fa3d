"""What makes a step fast or small keeps its loss; and what the device is asked, and made to hold."""

import math
import shutil
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from threading import current_thread, main_thread
from types import SimpleNamespace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import mmalign
from mmalign.data.cache import Cache
from mmalign.data.export import write_comparisons
from mmalign.objectives import SFT, DiffusionDPO, InPO, MaPO, RankDPO
from mmalign.records import Comparison, UserError
from mmalign.surrogate import DDIMInversion, Likelihood
from mmalign.training import memory, prepare
from mmalign.training.loop import train
from mmalign.training.run import Run
from mmalign.training.step import Meter, Step, feedback_of
from tests.conftest import picture


@pytest.fixture
def recipe(tiny_sdxl, tmp_path):
    return Run(
        str(tiny_sdxl), "twelve pairs", str(tmp_path / "run"), DiffusionDPO(beta=2000), 3, 1e-3,
        train_batch_size=4, rank=2, seed=7, proportion_empty_prompts=0.3,
    )  # fmt: skip


def run_it(run, pairs, tmp_path, dtype=torch.float64, said=None, watch=None, **changes):
    """[steps, 2] loss and gradient norm, and the modality."""
    rows, said = [], [] if said is None else said
    run = replace(run, output_dir=str(tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"), **changes)
    modality = mmalign.load(run.pretrained_model_name_or_path, dtype=dtype) if dtype else None

    def note(step, metrics):
        rows.append([metrics["loss"], metrics["grad_norm"]])
        if watch:
            watch(step, modality)

    train(run, modality=modality, comparisons=pairs, say=said.append, watch=note)
    return torch.tensor(rows, dtype=torch.float64), modality


def same(rows, expected, rtol=1e-9):
    assert torch.allclose(rows, expected, rtol=rtol, atol=0), (rows, expected)


# -- fewer recomputations, other layouts ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True, "gradient_checkpointing_every": 2},
        {"channels_last": True},
        {"channels_last": True, "use_lora": False, "learning_rate": 1e-5},
    ],
    ids=str,
)
def test_the_loss_stays(recipe, pairs, tmp_path, changes):
    plain = {"use_lora": changes.get("use_lora", True), "learning_rate": changes.get("learning_rate", 1e-3)}
    expected, _ = run_it(recipe, pairs, tmp_path, **plain)
    rows, modality = run_it(recipe, pairs, tmp_path, **changes)
    same(rows, expected, 1e-6)
    kernel = modality.unwrapped.conv_in.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last) == changes.get("channels_last", False)


def test_every_second_block_is_between_all_and_none_as_planned(recipe):
    skeleton = mmalign.skeleton(recipe.pretrained_model_name_or_path)
    settings = [{"gradient_checkpointing": True, "gradient_checkpointing_every": every} for every in (1, 2)]
    planned = [
        memory.measured(skeleton, replace(recipe, **changes), samples=2, dtype=torch.float32)[1]
        for changes in [*settings, {}]
    ]
    assert planned == sorted(set(planned))


def test_every_second_layer_of_transformers(tmp_path):
    from tests.tiny import tiny_vlm

    network = mmalign.load(tiny_vlm(tmp_path)).network.train().requires_grad_(True)
    tokens, ran = torch.arange(10)[None], []
    expected = torch.autograd.grad(network(input_ids=tokens).logits.sum(), network.lm_head.weight)
    prepare.checkpoint_blocks(network, lambda block, *inputs: ran.append(block) or block(*inputs), every=2)
    given = torch.autograd.grad(network(input_ids=tokens).logits.sum(), network.lm_head.weight)
    assert len(ran) == 1  # of two layers
    assert torch.equal(given[0], expected[0])


# -- a fused backward ----------------------------------------------------------------------------------------

UNFUSED = {"use_lora": False, "optimizer": "adafactor", "max_grad_norm": 0.0, "learning_rate": 1e-5}
FUSED = UNFUSED | {"fused_backward": True}


def weights(modality):
    return {name: value.clone() for name, value in modality.unwrapped.state_dict().items()}


def equal(own, other):
    return all(torch.equal(own[name], other[name]) for name in other)


def test_a_fused_backward_gives_the_same_weights_and_holds_no_gradients(recipe, pairs, tmp_path, monkeypatch):
    settings = {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 2, "gradient_checkpointing": True}
    expected, plain = run_it(recipe, pairs, tmp_path, **UNFUSED, **settings)
    held, real = [], prepare.FusedBackward._move

    def counted(self, parameter):
        held.append(sum(own.grad is not None for own in self.optimizer.param_groups[0]["params"]))
        real(self, parameter)

    monkeypatch.setattr(prepare.FusedBackward, "_move", counted)
    rows, fused = run_it(recipe, pairs, tmp_path, **FUSED, **settings)
    assert equal(weights(fused), weights(plain))
    assert not equal(weights(fused), weights(mmalign.load(recipe.pretrained_model_name_or_path, dtype=torch.float64)))
    same(rows, expected)
    assert len(held) == 3 * sum(1 for _ in fused.network.parameters())
    assert max(held) <= 2  # a layer's weight and bias
    fused.network.conv_in.weight.sum().backward()  # hooks went with the run
    assert fused.network.conv_in.weight.grad is not None


def test_a_fused_backward_goes_on_bit_for_bit(recipe, pairs, tmp_path):
    settings = {**FUSED, "output_dir": str(tmp_path / "run"), "checkpointing_steps": 1}

    def go(steps, **changes):
        modality = mmalign.load(recipe.pretrained_model_name_or_path, dtype=torch.float64)
        run = replace(recipe, **{**settings, "max_train_steps": steps, **changes})
        train(run, modality=modality, comparisons=pairs, say=lambda line: None)
        return weights(modality)

    expected = go(3, output_dir=str(tmp_path / "whole"))
    go(2)
    assert equal(go(3, resume_from_checkpoint="latest"), expected)
    # Its checkpoints are those of a plain backward
    last = str(tmp_path / "run" / "checkpoint-2")
    assert equal(go(3, resume_from_checkpoint=last, fused_backward=False), expected)


@pytest.mark.parametrize("empty", [False, True])
def test_a_fused_backward_moves_nothing_by_what_is_not_finite_or_not_there(recipe, pairs, tmp_path, monkeypatch, empty):
    """The second step of three: a NaN, or ties alone."""
    seen, real = [], Step.backward

    def tied(items, scale=None):
        return feedback_of([replace(item, score=(1, 1)) for item in items] if len(seen) == 1 else items, scale)

    def poisoned(self, probe, feedback, scale, last, known):
        return real(self, probe, feedback, torch.nan if len(seen) == 1 else scale, last, known)

    if empty:
        monkeypatch.setattr("mmalign.training.step.feedback_of", tied)
    else:
        monkeypatch.setattr(Step, "backward", poisoned)
    modality = mmalign.load(recipe.pretrained_model_name_or_path, dtype=torch.float64)
    run = replace(recipe, **FUSED)

    def watch(number, metrics):
        seen.append((metrics, weights(modality)))

    train(run, modality=modality, comparisons=pairs, watch=watch, say=lambda line: None)
    metrics, (first, second, third) = zip(*seen, strict=True)
    assert equal(second, first)
    assert not equal(third, second)
    assert [row["skipped_steps"] for row in metrics] == [0, not empty, not empty]
    assert metrics[1]["grad_norm"] == 0 if empty else math.isnan(metrics[1]["grad_norm"])


def test_a_gradient_that_breaks_inside_a_fused_backward_ends_the_run(recipe, pairs, tmp_path, monkeypatch):
    real = prepare.FusedBackward._move

    def broken(self, parameter):
        parameter.grad *= torch.inf
        real(self, parameter)

    monkeypatch.setattr(prepare.FusedBackward, "_move", broken)
    with pytest.raises(RuntimeError, match="when weights had moved"):
        run_it(recipe, pairs, tmp_path, checkpointing_steps=1, **FUSED)
    assert not list(tmp_path.glob("run-*/checkpoint-*"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_lora": True}, "needs use_lora off"),
        ({"optimizer": "adamw"}, "needs optimizer adafactor"),
        ({"max_grad_norm": 1.0}, r"needs max_grad_norm 0 \(no clipping\)"),
        ({"gradient_accumulation_steps": 2}, "needs gradient_accumulation_steps 1"),
        ({"backward": "two-pass"}, "needs backward plain"),
        ({"aspect_buckets": True}, "needs train_batch_size 1 with aspect_buckets"),
        ({"mixed_precision": "fp16"}, "needs another mixed_precision than fp16"),
        ({"fused_backward": False, "max_grad_norm": -1.0}, "max_grad_norm is -1.0"),
    ],
    ids=str,
)
def test_what_cannot_be_fused_is_said(recipe, changes, said):
    with pytest.raises(UserError, match=said):
        replace(recipe, **{**FUSED, **changes})


def test_several_processes_are_not_fused(recipe, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 2)
    with pytest.raises(UserError, match="for one process, and there are 2"):
        prepare.make_accelerator(replace(recipe, **FUSED))


# -- torch.compile -------------------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch):
    """torch.compile without the making of C++; counts what it makes."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    yield counters["stats"]
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"gradient_checkpointing": True, "backward": "two-pass"}, marks=pytest.mark.slow),
        {"use_lora": False, "learning_rate": 1e-5},
    ],
    ids=str,
)
def test_compiled_blocks_keep_the_loss_and_are_compiled_once(recipe, pairs, tmp_path, graphs, settings):
    settings = {**settings, "max_train_steps": 5}
    expected, _ = run_it(recipe, pairs, tmp_path, **settings)
    made = []
    rows, _ = run_it(
        recipe, pairs, tmp_path, compile=True, watch=lambda *_: made.append(graphs["unique_graphs"]), **settings
    )
    same(rows, expected, 1e-6)
    assert made[0] >= 2  # policy and reference
    assert made[1:] == [made[1]] * 4
    assert made[-1] <= 8


@pytest.mark.slow
def test_aspect_buckets_do_not_compile_anew(recipe, tmp_path, graphs):
    wide, high = ([picture(i, size) for i in range(12)] for size in [(32, 16), (16, 32)])
    pairs = [
        Comparison(id=f"{number}", prompt="a fox", media=media[2 * i : 2 * i + 2], score=(1, 0))
        for i in range(6)
        for number, media in [(i, wide), (i + 6, high)]
    ]
    settings = {"aspect_buckets": True, "max_train_steps": 5}
    expected, _ = run_it(recipe, pairs, tmp_path, **settings)
    made = []
    rows, _ = run_it(
        recipe, pairs, tmp_path, compile=True, watch=lambda *_: made.append(graphs["unique_graphs"]), **settings
    )
    same(rows, expected, 1e-6)
    assert made == [made[0]] * 5


def test_where_nothing_compiles_it_is_said_and_left_out(recipe, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    said = []
    _, modality = run_it(recipe, pairs, tmp_path, said=said, compile=True, max_train_steps=1)
    assert sum("compile is left out" in line for line in said) == 1
    assert not any(module._compiled_call_impl for module in modality.unwrapped.modules())


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_inductor_keeps_the_loss(recipe, pairs, tmp_path):
    """In float32: torch 2.11's compiled attention on a CPU does not take float64."""
    torch._dynamo.reset()
    settings = {"dtype": torch.float32, "learning_rate": 1e-4}
    expected, _ = run_it(recipe, pairs, tmp_path, **settings)
    rows, _ = run_it(recipe, pairs, tmp_path, compile=True, **settings)
    same(rows, expected, 1e-2)
    assert torch.allclose(rows[:, 0], expected[:, 0], atol=1e-4)


# -- what the device is asked --------------------------------------------------------------------------------


def prepared(run, device=None):
    """A step of a run, without the loop; `device` is where the network is."""
    modality = mmalign.load(run.pretrained_model_name_or_path, dtype=torch.float32)
    views = prepare.prepare_policy(modality, run)
    modality.network.to(device)
    accelerator = SimpleNamespace(device=modality.device, num_processes=1, backward=lambda loss: loss.backward())
    accelerator.is_fsdp2 = False
    accelerator.no_sync = lambda network: nullcontext()
    accelerator.reduce = lambda value, how: value.clone()
    return Step(run, modality, views, accelerator)


@pytest.mark.parametrize(
    ("objective", "backward"),
    [
        (DiffusionDPO(beta=2000), "plain"),
        (MaPO(beta=0.1, snr=0.5, T=1000), "two-pass"),
        (InPO(beta=100.0, draw=DDIMInversion(steps=1)), "plain"),
        (RankDPO(beta=2000), "plain"),
        (SFT(), "two-pass"),
    ],
)
def test_a_micro_batch_reads_nothing_from_the_device(recipe, pairs, objective, backward):
    """On the meta device whatever would wait for a number raises, as there is none."""
    step = prepared(replace(recipe, objective=objective, backward=backward), "meta")
    meter = Meter()
    for pair in pairs[:2]:
        probe, feedback = step.probe([pair], [0])
        likelihood, loss = step.backward(probe, feedback, 1.0, last=True)
        meter.add(likelihood, loss, feedback)
    grad_norm = torch.nn.utils.clip_grad_norm_(step.modality.network.parameters(), 1.0)
    assert grad_norm.is_meta
    assert len(meter.sums) > 8
    assert all(value.is_meta for value in meter.sums.values())
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        meter.means(step.accelerator)  # the one that does


def test_means_are_those_of_reading_every_number(pairs):
    """To the bit, as they were before sums stayed on the device."""
    draw, meter, sums = torch.Generator().manual_seed(1), Meter(), {}
    path = SimpleNamespace(fraction=lambda t: t)

    def add(name, values):
        total, number = sums.get(name, (0.0, 0))
        sums[name] = total + values.double().sum().item(), number + values.numel()

    for start in range(0, 12, 4):
        feedback = feedback_of(pairs[start : start + 4])
        t = 0.75 * torch.rand(4, dtype=torch.float64, generator=draw).repeat_interleave(2)  # none in the last quarter
        logp = {view: torch.randn(8, generator=draw) for view in ("policy", "reference")}
        likelihood, loss = Likelihood(logp, {}, SimpleNamespace(t=t, path=path)), torch.rand(4, generator=draw)
        meter.add(likelihood, loss, feedback)
        win, lose = feedback.pairs()
        ratio = likelihood.log_ratio
        right = (ratio[win] > ratio[lose]).double()
        for name, values in {
            "loss": loss, "chosen_log_ratio": ratio[win], "rejected_log_ratio": ratio[lose],
            "margin": ratio[win] - ratio[lose], "implicit_accuracy": right,
        }.items():  # fmt: skip
            add(name, values)
        for quarter in range(4):
            add(f"implicit_accuracy_t{quarter}", right[(t[win] * 4).long() == quarter])
    norm = torch.tensor(0.1)
    read = meter.means(SimpleNamespace(reduce=lambda value, how: value), grad_norm=norm)
    assert read == {"grad_norm": norm.item(), **{name: total / n for name, (total, n) in sums.items() if n}}
    assert "implicit_accuracy_t3" not in read


def test_pieces_are_read_by_the_loader(recipe, pairs, tmp_path, monkeypatch):
    write_comparisons(tmp_path / "data", pairs)
    run = replace(recipe, dataset_name=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    expected, _ = run_it(run, None, tmp_path, dtype=None)
    readers, real = set(), Cache._pieces

    def noted(self, item):
        readers.add(current_thread())
        return real(self, item)

    monkeypatch.setattr(Cache, "_pieces", noted)
    rows, _ = run_it(run, None, tmp_path, dtype=None, dataloader_num_workers=2)
    assert torch.equal(rows, expected)
    assert readers
    assert main_thread() not in readers


# -- what the device holds -----------------------------------------------------------------------------------


def test_the_reference_answers_first_and_a_group_in_one_forward(recipe, pairs, monkeypatch):
    step, asked = prepared(recipe), []
    real = step.modality.predict
    monkeypatch.setattr(
        step.modality, "predict", lambda probe, view: asked.append((view, len(probe))) or real(probe, view)
    )
    step.backward(*step.probe(pairs[:2], [0, 0]), 1.0, last=True)
    assert asked == [("reference", 4), ("policy", 4)]


class Held:
    """A tensor that autograd keeps, counted while it does."""

    now = peak = 0

    def __init__(self, tensor):
        self.tensor = tensor
        Held.now += tensor.nbytes
        Held.peak = max(Held.peak, Held.now)

    def __del__(self):
        Held.now -= self.tensor.nbytes


@pytest.mark.parametrize("backward", ["plain", "two-pass"])
def test_two_pass_holds_no_more_for_longer_lists(recipe, backward):
    step, peaks = prepared(replace(recipe, backward=backward)), []
    for size in (2, 4, 16):
        media = tuple(picture(i) for i in range(size))
        item = Comparison(id="list", prompt="a fox", media=media, score=tuple(range(size)))
        probe, feedback = step.probe([item], [0])
        Held.now = Held.peak = 0
        with saved_tensors_hooks(Held, lambda held: held.tensor):
            step.backward(probe, feedback, 1.0, last=True)
        peaks.append(Held.peak)
    # The objective's own N numbers grow, a network's activations do not
    assert peaks[2] == pytest.approx(peaks[0], rel=0.05) if backward == "two-pass" else peaks[2] > 3 * peaks[0]
