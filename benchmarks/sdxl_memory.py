"""One LoRA Diffusion-DPO step of the real SDXL UNet on a CPU: does the memory plan hold?

    python benchmarks/sdxl_memory.py [--resolution 256] [--gradient-checkpointing]

The UNet has its published configuration, 2.57 billion parameters, with random weights in bfloat16; latents and
embeddings are random, as a cache would give them, so no VAE and no text encoder is loaded. Prints the plan before the
weights are made, then one JSON line: planned and measured memory above the empty process (libraries imported).
"""

import argparse
import json
import time
from functools import partial
from types import SimpleNamespace

import psutil
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel

from mmalign.modalities import Skeleton
from mmalign.modalities.image_unet import UNetModality, example
from mmalign.modalities.single_file import SDXL
from mmalign.objectives import DiffusionDPO
from mmalign.surrogate import Cond, Feedback, FreshNoise, Keys, VariancePreserving
from mmalign.training.checkpoint import trained
from mmalign.training.memory import GIB, peak_bytes, plan
from mmalign.training.prepare import make_optimizer, prepare_policy
from mmalign.training.run import Run
from mmalign.training.step import Step


def random_unet() -> UNet2DConditionModel:
    """SDXL's, in bfloat16 from the start, each weight of its layer's usual size."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            network = UNet2DConditionModel.from_config(SDXL["unet"])
    finally:
        torch.set_default_dtype(torch.float32)
    network.to_empty(device="cpu")
    # A tensor of noise, repeated: drawing 2.57 billion numbers would take longer than the step
    noise = torch.randn(1 << 22, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
                continue
            size, scale = parameter.numel(), 0.5 * (parameter[0].numel()) ** -0.5
            flat = parameter.view(-1)
            for start in range(0, size, len(noise)):
                flat[start : start + len(noise)] = noise[: min(len(noise), size - start)] * scale
    return network


def main() -> None:
    """Parses the command line, plans, builds, steps, measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    arguments = parser.parse_args()
    run = Run(
        pretrained_model_name_or_path="SDXL, random weights",
        dataset_name="random",
        output_dir="none",
        objective=DiffusionDPO(beta=5000),
        max_train_steps=1,
        learning_rate=1e-5,
        resolution=arguments.resolution,
        mixed_precision="bf16",
        gradient_checkpointing=arguments.gradient_checkpointing,
    )
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(SDXL["unet"])
    skeleton = Skeleton({"network": unet}, partial(example, unet.config, 8), UNetModality.targets)
    planned = plan(run, torch.bfloat16, skeleton)
    print(planned.text(), flush=True)
    empty = psutil.Process().memory_info().rss

    network = random_unet()
    parameters = sum(p.numel() for p in network.parameters())
    modality = UNetModality.__new__(UNetModality)  # around the network alone: the encoders are not measured here
    modality.network, modality.path = network, VariancePreserving(torch.linspace(0.999, 0.005, 1000))
    modality.pipeline = SimpleNamespace()
    views = prepare_policy(modality, run)
    optimizer, _ = make_optimizer(run, list(trained(network).values()))
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    modality.network, optimizer = accelerator.prepare(network, optimizer)
    side = arguments.resolution // 8
    cond = Cond(
        {
            "prompt_embeds": torch.randn(2, 77, 2048),
            "text_embeds": torch.randn(2, 1280),
            "time_ids": torch.full((2, 6), float(arguments.resolution)),
        }
    )
    keys = Keys(0, torch.zeros(2, dtype=torch.int64), torch.arange(2), torch.zeros(2, dtype=torch.int64))
    probe = FreshNoise()(torch.randn(2, 4, side, side), cond, keys, modality.path)
    step = Step(run, modality, views, accelerator)
    started = time.monotonic()
    _, loss = step.backward(probe, Feedback(torch.zeros(2), torch.tensor([1.0, 0.0])), 1.0, last=True)
    gradients = [p.grad.norm() for p in trained(network).values() if p.grad is not None]
    optimizer.step()
    print(
        json.dumps(
            {
                "parameters": parameters,
                "resolution": arguments.resolution,
                "gradient_checkpointing": arguments.gradient_checkpointing,
                "loss": loss.item(),
                "grad_norm": torch.stack(gradients).norm().item(),
                "seconds": round(time.monotonic() - started, 1),
                "planned_gib": round(planned.total / GIB, 3),
                "measured_gib": round((peak_bytes() - empty) / GIB, 3),
                "empty_gib": round(empty / GIB, 3),
                "peak_gib": round(peak_bytes() / GIB, 3),
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
