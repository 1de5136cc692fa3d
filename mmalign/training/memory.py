"""The memory plan: what a run will take, printed before anything is loaded.

Weights, gradients and optimizer are counted from the model's shapes. Activations are counted, not guessed: the
forward runs on fake tensors, which have shapes and no memory, and what autograd keeps for backward is summed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import mmalign
from mmalign.training.run import Run

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """Bytes by purpose, and what to do when they are too many."""

    parts: dict[str, int]
    advice: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Sum of all parts in bytes."""
        return sum(self.parts.values())

    def text(self) -> str:
        """A line of parts and, where there is something to do, a line of advice."""
        listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.parts.items() if size)
        lines = [f"Memory plan: {self.total / GIB:.2f} GiB ({listed})."]
        return "\n".join([*lines, *self.advice])


def plan(run: Run, dtype: torch.dtype, parts: dict[str, nn.Module] | None = None) -> Plan:
    """What a process of this run will hold at its peak, above the empty process.

    Args:
        run: the recipe.
        dtype: of the frozen weights.
        parts: the model on the meta device; default `mmalign.skeleton` of the recipe's model.
    """
    parts = parts or mmalign.skeleton(run.pretrained_model_name_or_path)
    network = parts["network"]
    size = torch.empty((), dtype=dtype).element_size()
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    vae_size = size if run.pretrained_vae_model_name_or_path else max(4, size)
    frozen = sum(count * (vae_size if name == "vae" else size) for name, count in counts.items() if name != "network")
    trained = _lora_parameters(network, run) if run.use_lora else counts["network"]
    states = {"adamw": 8, "adamw_8bit": 2, "adafactor": 0}[run.optimizer]
    copies = 1 if run.use_lora or "reference" not in run.objective.needs else 2
    samples = run.rows_at_once if run.backward == "two-pass" else 2 * run.train_batch_size
    saved = {
        "network": counts["network"] * size * copies,
        "encoders and VAE": frozen,
        "trained weights": trained * 4 if run.use_lora else 0,
        "gradients": trained * 4,
        "optimizer": trained * states,
        "activations": saved_bytes(network, run, samples, dtype),
    }
    return Plan(saved, _advice(run, sum(saved.values())))


def _lora_parameters(network: nn.Module, run: Run) -> int:
    targets = run.lora_targets or ("to_k", "to_q", "to_v", "to_out.0")
    count = 0
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and any(name.endswith("." + target) for target in targets):
            weight = module.weight
            inputs = weight[0].numel() if isinstance(module, nn.Conv2d) else weight.shape[1]
            count += run.rank * (inputs + weight.shape[0])
    return count


def saved_bytes(network: nn.Module, run: Run, samples: int, dtype: torch.dtype) -> int:
    """What autograd keeps for the backward of one forward, found by running it on fake tensors.

    With gradient checkpointing only the blocks' inputs are kept, and the largest block's own activations come on
    top while it is recomputed.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
        model = type(network).from_config(network.config).to(dtype)  # pyright: ignore
        model.requires_grad_(not run.use_lora).train()
        blocks: list[int] = [0]
        if run.gradient_checkpointing:

            def measured(function: Any, *inputs: Any) -> Any:
                """A block as checkpointing sees it: its own memory is measured, only its inputs are kept."""
                with Saved(model) as inside:
                    function(*inputs)
                blocks.append(inside.bytes)
                return torch.utils.checkpoint.checkpoint(function, *inputs, use_reentrant=False)

            model.enable_gradient_checkpointing(measured)
        inputs, named = _example(model, run, samples, dtype)
        with Saved(model) as outside:
            model(*inputs, **named)
    return outside.bytes - sum(blocks) + max(blocks) if run.gradient_checkpointing else outside.bytes


def _example(model: Any, run: Run, samples: int, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of a UNet: latents [N, C, H, W], timesteps [N], prompt embeddings [N, 77, D], for SDXL more."""
    config = model.config
    side = run.resolution // 8 if run.resolution else config.sample_size
    latents = torch.zeros(samples, config.in_channels, side, side, dtype=dtype, requires_grad=True)
    prompt = torch.zeros(samples, 77, config.cross_attention_dim, dtype=dtype)
    named: dict[str, Any] = {}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        ids = torch.zeros(samples, 6, dtype=dtype)
        named["added_cond_kwargs"] = {
            "text_embeds": torch.zeros(samples, pooled, dtype=dtype),
            "time_ids": ids,
        }
    return (latents, torch.zeros(samples, dtype=torch.int64), prompt), named


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Sums what autograd saves inside the block, each storage once and the model's own weights not at all."""

    def __init__(self, model: nn.Module) -> None:
        self.bytes = 0
        self._seen = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._kept: list[Any] = []  # a freed storage's address could come back
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
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
        "--optimizer adafactor": run.optimizer == "adamw" and not run.use_lora,
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
