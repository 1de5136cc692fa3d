"""The memory plan: what a run will take, printed before anything is loaded.

Weights, gradients and optimizer are counted from the model's shapes. Activations are counted, not guessed: the
forward runs on fake tensors, which have shapes and no memory, and what autograd keeps for backward is summed.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mmalign
from mmalign.training.prepare import checkpoint_blocks
from mmalign.training.run import Run

GIB = 2**30
# What a process holds beside the plan: temporaries, allocator, libraries, mapped files, a card's context. Measured on
# CPUs: an eighth of the plan for the whole SDXL (benchmarks/README.md), up to 0.4 GiB for the reduced one of
# benchmarks/step.py. On a GPU it was not measured
MARGIN, RESERVE = 1.2, GIB // 2


@dataclass(frozen=True)
class Plan:
    """Bytes by purpose, and what to do when they are too many."""

    parts: dict[str, int]
    advice: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Sum of all parts in bytes."""
        return sum(self.parts.values())

    @property
    def needs(self) -> int:
        """Bytes that a process has to have free: the parts, and what measuring found beside them."""
        return int(self.total * MARGIN) + RESERVE

    def text(self) -> str:
        """A line of parts and, where there is something to do, a line of advice."""
        listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.parts.items() if size)
        lines = [f"Memory plan: {self.total / GIB:.2f} GiB ({listed})."]
        return "\n".join([*lines, *self.advice])


def plan(run: Run, dtype: torch.dtype, skeleton: Any = None, members: int = 2) -> Plan:
    """What a process of this run will hold at its peak, above the empty process.

    Args:
        run: the recipe.
        dtype: of the frozen weights.
        skeleton: the model as shapes without memory; default `mmalign.skeleton` of the recipe's model.
        members: samples of a comparison: 2 for pairs, more for ranked lists.
    """
    skeleton = skeleton or mmalign.skeleton(run.pretrained_model_name_or_path)
    size = torch.empty((), dtype=dtype).element_size()
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in skeleton.parts.items()}
    vae_size = size if run.pretrained_vae_model_name_or_path else max(4, size)
    frozen = sum(count * (vae_size if name == "vae" else size) for name, count in counts.items() if name != "network")
    states = {"adamw": 8, "adamw_8bit": 2, "adafactor": 0}[run.optimizer]
    if run.cache_dir:
        frozen = 0  # until something is generated
    copies = 1 if run.use_lora or run.cache_reference or "reference" not in run.objective.needs else 2
    samples = run.rows_at_once if run.backward == "two-pass" else members * run.train_batch_size
    trained, activations = measured(skeleton, run, samples, dtype)
    encoding = 0
    if "vae" in skeleton.parts and not run.cache_dir:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            encode = fake_encoding(skeleton, run, min(skeleton.encoded_at_once, members * run.train_batch_size), dtype)
            with Live() as live:
                encode()
        encoding = max(0, live.peak - activations)  # the VAE is done before there are activations
    gradients = trained
    if run.fused_backward:  # one is held at once, with two as large that Adafactor makes of it
        gradients = 3 * max(parameter.numel() for parameter in skeleton.parts["network"].parameters())
    saved = {
        "network": counts["network"] * size * copies,
        "encoders and VAE": frozen,
        "trained weights": trained * 4 if run.use_lora else 0,
        "gradients": gradients * 4,
        "optimizer": trained * states,
        "activations": activations,
        "encoding beyond them": encoding,
    }
    return Plan(saved, _advice(run, sum(saved.values())))


def measured(skeleton: Any, run: Run, samples: int, dtype: torch.dtype) -> tuple[int, int]:
    """Number of trained parameters, and bytes that autograd keeps for the backward of one forward.

    Both are found on a copy of the network on fake tensors. With gradient checkpointing only the blocks' inputs are
    kept, and the largest block's own activations come on top while it is recomputed.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
        model = fake(skeleton.parts["network"], dtype)
        prepare_fake(model, run, skeleton)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        blocks, kept = [0], Saved(model)

        def block(function: Any, *inputs: Any) -> Any:
            """A block as checkpointing treats it: its inputs are kept, its own activations measured apart."""
            for value in inputs:
                if isinstance(value, torch.Tensor):
                    kept.count(value)
            with Saved(model) as own:
                outputs = function(*inputs)
            blocks.append(own.bytes)
            return outputs

        if run.gradient_checkpointing:
            checkpoint_blocks(model, block, run.gradient_checkpointing_every)
        inputs = skeleton.example(samples, run.resolution, dtype, run.length)
        with torch.autocast(device, dtype, enabled=dtype in (torch.bfloat16, torch.float16)), kept:
            model(**inputs)
    return trained, kept.bytes + max(blocks)


def prepare_fake(model: Any, run: Run, skeleton: Any) -> None:
    """What `prepare_policy` does to a network, for one on fake tensors; checkpointing is left to the caller."""
    model.requires_grad_(not run.use_lora).train()
    if run.users:
        _stand_in(model, run.user_tokens, skeleton)
    elif run.use_lora:
        _wrap(model, run, skeleton.lora_targets)


class _WithLoRA(nn.Module):
    """A layer with a float32 LoRA as PEFT computes it; PEFT itself cannot work on fake tensors."""

    def __init__(self, base: Any, rank: int) -> None:
        super().__init__()
        self.base = base
        if isinstance(base, nn.Conv2d):
            self.a: nn.Module = nn.Conv2d(
                base.in_channels,
                rank,
                base.kernel_size,  # pyright: ignore[reportArgumentType]
                base.stride,  # pyright: ignore[reportArgumentType]
                base.padding,  # pyright: ignore[reportArgumentType]
                bias=False,
                dtype=torch.float32,
            )
            self.b: nn.Module = nn.Conv2d(rank, base.out_channels, 1, bias=False, dtype=torch.float32)
        else:
            self.a = nn.Linear(base.in_features, rank, bias=False, dtype=torch.float32)
            self.b = nn.Linear(rank, base.out_features, bias=False, dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.b(self.a(x.float())).to(x.dtype)


def _stand_in(model: Any, tokens: int, skeleton: Any) -> None:
    """User layers are as large as the keys and values of the text, and keep as much: these are counted for them.

    Soft tokens are a map of their own, here from embeddings as wide as the network's; the gradient goes to them
    through all of the decoder.
    """
    if hasattr(model, "get_input_embeddings"):
        embed = model.get_input_embeddings()
        width = embed.embedding_dim
        model.user = nn.Linear(width, tokens * width, bias=False, dtype=torch.float32)
        embed.register_forward_hook(lambda module, inputs, embedded: embedded + model.user.weight[0, 0].to(embedded))
    for projection in skeleton.reading(model):
        projection.weight.requires_grad_(True)


def _wrap(model: nn.Module, run: Run, default: Sequence[str]) -> None:
    targets = tuple("." + target for target in run.lora_targets or default)
    found = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for name in found:
        if f".{name}".endswith(targets):
            parent, _, child = name.rpartition(".")
            owner = model.get_submodule(parent)
            setattr(owner, child, _WithLoRA(getattr(owner, child), run.rank))


def fake(network: Any, dtype: torch.dtype) -> Any:
    """The network anew on fake tensors; made in its dtype, as fake parameters cannot change theirs."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return getattr(type(network), "from_config", type(network))(network.config)  # diffusers, transformers
    finally:
        torch.set_default_dtype(before)


def fake_encoding(skeleton: Any, run: Run, samples: int, dtype: torch.dtype) -> Callable[[], Any]:
    """What encodes media of the run's size; it is made, and to be called, on fake tensors."""
    vae = skeleton.parts["vae"]
    dtype = dtype if run.pretrained_vae_model_name_or_path or dtype.itemsize > 4 else torch.float32
    if skeleton.media:
        shape = skeleton.media(samples, run.resolution, run.length)
    else:
        latents = next(iter(skeleton.example(samples, run.resolution, dtype, run.length).values()))
        side = latents.shape[-1] * 2 ** (len(vae.config.block_out_channels) - 1)
        shape = samples, vae.config.in_channels, side, side
    media = torch.zeros(shape, dtype=dtype)
    return partial(fake(vae, dtype).requires_grad_(False).eval().encode, media)


class Live(TorchDispatchMode):
    """Finds the most bytes that tensors made inside the block took at once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and counts what is new of its outputs, until it is freed."""
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor) and id(storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(id(storage))
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._freed, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return outputs

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.bytes -= size


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Sums what autograd saves inside the block, each storage once and the model's own weights not at all."""

    def __init__(self, model: nn.Module) -> None:
        self.bytes = 0
        self._seen = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._kept: list[Any] = []  # a freed storage's address could come back
        super().__init__(self.count, lambda tensor: tensor)

    def __enter__(self) -> Saved:
        super().__enter__()
        return self

    def count(self, tensor: torch.Tensor) -> torch.Tensor:
        """Adds a tensor that is kept; returns it."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._kept.append(storage)
            self.bytes += storage.nbytes()
        return tensor


def _advice(run: Run, total: int) -> tuple[str, ...]:
    available = available_bytes()
    if total <= available:
        return ()
    options = {
        "--gradient-checkpointing": not run.gradient_checkpointing,
        "--backward two-pass": run.backward == "plain",
        "--train-batch-size 1 with more --gradient-accumulation-steps": run.train_batch_size > 1,
        "--use-lora": not run.use_lora,
        "--optimizer adafactor --fused-backward --max-grad-norm 0": not (run.use_lora or run.fused_backward),
        "a smaller --resolution": True,
    }
    useful = [name for name, helps in options.items() if helps]
    return (f"That is more than the {available / GIB:.1f} GiB that are free; try {', or '.join(useful)}.",)


def available_bytes() -> int:
    """Free memory of the accelerator, or of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    import psutil

    return psutil.virtual_memory().available


def peak_bytes() -> int:
    """The most memory that this process has held: on the accelerator, or its resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
