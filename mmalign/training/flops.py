"""What a step computes: operations counted on fake tensors, which have shapes and no memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import mmalign
from mmalign.training.memory import fake, fake_encoding, prepare_fake
from mmalign.training.prepare import checkpoint_blocks
from mmalign.training.run import Run

T5_TOKENS = 256  # of a text encoder that states no length


def operations(run: Run, skeleton: Any = None, members: int = 2) -> dict[str, int]:
    """Operations of one comparison in a step, by part: multiplications and additions, one each.

    Matrix products, convolutions and attention count; what is done element by element does not. Attention's backward
    counts as that of a fused kernel, five products for two. Network calls of a draw (inversions) are not included.

    Args:
        run: the recipe: what it caches or checkpoints is left out, or counted twice.
        skeleton: the model as shapes without memory; default `mmalign.skeleton` of the recipe's model.
        members: samples of a comparison: 2 for pairs, more for ranked lists.
    """
    skeleton = skeleton or mmalign.skeleton(run.pretrained_model_name_or_path)
    parts = skeleton.parts
    with FakeTensorMode(allow_non_fake_inputs=True):
        counts = dict.fromkeys(("policy forward", "backward", "reference", "VAE", "text"), 0)
        inputs = tree_map_only(
            torch.Tensor, torch.Tensor.detach, skeleton.example(members, run.resolution, torch.float32, run.length)
        )
        network = fake(parts["network"], torch.float32)
        if "reference" in run.objective.needs and not run.cache_reference:
            counts["reference"] = _count(lambda: network.requires_grad_(False)(**inputs))
        prepare_fake(network, run, skeleton)
        if run.gradient_checkpointing:
            checkpoint_blocks(network, every=run.gradient_checkpointing_every)
        outputs: list[Any] = []
        counts["policy forward"] = _count(lambda: outputs.append(network(**inputs)[0]))
        counts["backward"] = _count(lambda: outputs[0].square().mean().backward())
        if run.backward == "two-pass":
            counts["policy forward"] *= 2
        if not (run.cache_dir or run.cache_latents):
            for name, part in parts.items():
                if name == "vae":
                    counts["VAE"] = _count(fake_encoding(skeleton, run, members, torch.float32))
                elif name.startswith("text_encoder"):
                    length = getattr(part.config, "max_position_embeddings", T5_TOKENS)
                    reader = fake(part, torch.float32).requires_grad_(False).eval()
                    counts["text"] += _count(partial(reader, torch.zeros(1, length, dtype=torch.int64)))
    return counts


def _count(function: Any) -> int:
    """Operations of a call; torch's counter does not know the CPU's fused attention, which fake tensors take."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    aten = torch.ops.aten
    fused = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda *given, **_: sdpa_flop_count(*given[:3]),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *g, **_: sdpa_backward_flop_count(*g[:4]),
    }
    with FlopCounterMode(display=False, custom_mapping=fused) as counter:
        function()
    return counter.get_total_flops()
