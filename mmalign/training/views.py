"""Which weights the network holds: the policy's, the reference's, an older policy's.

`with views("reference"): ...` makes the network be the reference and restores the policy whatever happens,
before backward runs: gradient checkpointing recomputes the forward with whatever adapters are on by then.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def adapter_layers(network: nn.Module) -> list[Any]:
    """The modules that PEFT put adapters on."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]


class WeightViews:
    """Owns the memory of the views.

    The reference is, in this order: the adapter named "reference" (a run that starts from a LoRA), the network
    with its adapters off (a LoRA run: no second model), or a frozen copy (full fine-tune).

    Args:
        modality: its `network` is switched.
        copy_reference: make the frozen copy now; the network as it stands is the reference.
        same_weights: policy and reference differ only in what they are told (`Cond.policy_only`: a user).
    """

    def __init__(self, modality: Any, copy_reference: bool = False, same_weights: bool = False) -> None:
        self.modality, self.same_weights = modality, same_weights
        self.frozen = copy.deepcopy(modality.network).requires_grad_(False).eval() if copy_reference else None

    @contextmanager
    def __call__(self, view: str) -> Iterator[None]:
        """Makes the network be `view` inside the block."""
        if view == "policy" or (self.same_weights and view == "reference"):
            yield
        elif self.frozen is not None:
            policy, self.modality.network = self.modality.network, self.frozen
            try:
                yield
            finally:
                self.modality.network = policy
        else:
            with self._adapters(view):
                yield

    @contextmanager
    def _adapters(self, view: str) -> Iterator[None]:
        layers = adapter_layers(self.modality.network)
        named = [layer for layer in layers if view in getattr(layer, "lora_A", {})]
        if not named and (view != "reference" or not layers):
            raise ValueError(f"this run keeps no weights for the view {view!r}")
        active = [list(layer.active_adapters) for layer in layers]
        training = [[parameter.requires_grad for parameter in layer.parameters()] for layer in layers]
        try:
            for layer in layers:
                if named:
                    layer.set_adapter([view] if layer in named else [])
                else:
                    layer.enable_adapters(False)
            yield
        finally:
            for layer, names, flags in zip(layers, active, training, strict=True):
                layer.set_adapter(names)
                layer.enable_adapters(True)
                for parameter, flag in zip(layer.parameters(), flags, strict=True):
                    parameter.requires_grad_(flag)  # PEFT freezes what it switches off
