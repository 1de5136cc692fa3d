"""What a run trains with: the engine, the policy's weights, the optimizer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmalign.data.users import read_users
from mmalign.records import UserError
from mmalign.surrogate.probes import at_least_float32
from mmalign.training.cached import framed
from mmalign.training.run import Run
from mmalign.training.views import WeightViews


def make_accelerator(run: Run) -> Any:
    """Accelerate's engine, in the run's precision."""
    from accelerate import Accelerator

    precision = run.mixed_precision
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
    log_with = None if run.report_to == "none" else run.report_to
    return Accelerator(
        mixed_precision=precision, log_with=log_with, project_dir=Path(run.output_dir) if log_with else None
    )


def prepare_policy(modality: Any, run: Run) -> WeightViews:
    """Puts the trained weights on the network, freezes the rest, and keeps what the objective's views need.

    A LoRA's first weights are a function of the seed; they are float32 whatever the network's precision is.

    Raises:
        UserError: the LoRA's target modules are not in this network.
    """
    network: nn.Module = modality.network
    framed(modality, run)
    if run.gradient_checkpointing:
        checkpoint_blocks(network)
    network.train()  # checkpointing works in train mode alone; these networks have no dropout
    if not run.use_lora:
        asks = "reference" in run.objective.needs and not run.cache_reference
        inverts = getattr(run.objective.draw, "view", None) == "reference"
        views = WeightViews(modality, copy_reference=asks or inverts or bool(run.validation_prompts))
        network.requires_grad_(True)
        return views
    network.requires_grad_(False)
    if run.users:
        if not hasattr(modality, "add_user_layers"):
            raise UserError(f"{run.pretrained_model_name_or_path}: cannot be told a user; leave users out.")
        for parameter in modality.add_user_layers(read_users(run.users).features, run.user_tokens, run.seed).values():
            parameter.requires_grad_(True)
        return WeightViews(modality, same_weights=True)
    if "policy" not in getattr(network, "peft_config", {}):
        add_lora(network, run, list(run.lora_targets) or modality.lora_targets())
    elif run.lora:
        modality.load_adapter(run.lora, name="reference")
        network.set_adapter("policy")  # pyright: ignore[reportCallIssue]
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(".policy." in name)
        if ".policy." in name:
            parameter.data = at_least_float32(parameter.data)
    return WeightViews(modality)


def checkpoint_blocks(network: Any, function: Any = None) -> None:
    """Turns on gradient checkpointing, for which diffusers and transformers have different words.

    Args:
        network: of either library.
        function: (block, *inputs) -> outputs; default torch's checkpoint, without reentrance.
    """
    if hasattr(network, "enable_gradient_checkpointing"):
        network.enable_gradient_checkpointing(function)
    else:
        network._set_gradient_checkpointing(True, function or partial(checkpoint, use_reentrant=False))


def add_lora(network: Any, run: Run, targets: list[str]) -> None:
    """Puts the adapter "policy" on a network; its first weights are a function of the seed."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=run.rank, lora_alpha=run.lora_alpha or run.rank, init_lora_weights="gaussian", target_modules=targets
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        try:
            if hasattr(network, "add_adapter"):
                network.add_adapter(config, adapter_name="policy")
            else:
                inject_adapter_in_model(config, network, "policy")
        except ValueError as error:
            raise UserError(f"lora_targets {targets}: {str(error).splitlines()[0]}") from error


def make_optimizer(run: Run, parameters: list[nn.Parameter]) -> tuple[Any, Any]:
    """Optimizer and learning-rate schedule; the schedule counts optimizer steps, whatever the processes."""
    from diffusers.optimization import get_scheduler

    betas = (run.adam_beta1, run.adam_beta2)
    shared = {"lr": run.learning_rate, "weight_decay": run.adam_weight_decay}
    if run.optimizer == "adamw":
        fused = {"fused": True} if parameters[0].is_cuda else {}
        optimizer: Any = torch.optim.AdamW(parameters, betas=betas, eps=run.adam_epsilon, **shared, **fused)
    elif run.optimizer == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise UserError("optimizer adamw_8bit needs bitsandbytes: pip install 'mmalign[quant]'.") from error
        optimizer = AdamW8bit(parameters, betas=betas, eps=run.adam_epsilon, **shared)
    else:
        from transformers import Adafactor

        # The constants of SalesforceAIResearch/DiffusionDPO train.py:668-684
        optimizer = Adafactor(parameters, clip_threshold=1.0, scale_parameter=False, relative_step=False, **shared)
    try:
        schedule = get_scheduler(
            run.lr_scheduler,
            optimizer,
            num_warmup_steps=run.lr_warmup_steps,
            num_training_steps=run.max_train_steps,
        )
    except ValueError as error:
        raise UserError(f"lr_scheduler {run.lr_scheduler!r} is not one that diffusers knows.") from error
    return optimizer, schedule
