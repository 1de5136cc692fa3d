"""Which kernels a network's attention is computed by: the fastest that is there, once it has been seen to be right.

A backend is put on the network's own attention modules and never on the process, in one of three ways:

- torch's SDPA kernels: the module's class becomes a subclass that runs its forward under an order of kernels. It lies
  inside the module, so that a block which gradient checkpointing recomputes has the same; a deep copy keeps it, as it
  keeps adapters, and whatever processor is in the module goes on.
- xformers: diffusers' processor for it takes the place of diffusers' own for SDPA; any other processor stays.
- networks on diffusers' attention dispatcher: the field of the processor that the dispatcher reads.
  `set_attention_backend()` would change the default of the whole process besides, and does nothing on other networks
  (diffusers 0.42.1, models/modeling_utils.py:658-667). Its backend for flash-attn 3 has no gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from mmalign.records import UserError

_FLASH, _EFFICIENT, _MATH = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
# Name -> order of kernels; a call that the first cannot take, say for its mask, goes to the next. (): torch's own order
KERNELS: dict[str, tuple[SDPBackend, ...]] = {
    "sdpa": (),
    "flash": (_FLASH, _EFFICIENT, _MATH),
    "efficient": (_EFFICIENT, _MATH),
    "cudnn": (SDPBackend.CUDNN_ATTENTION, _FLASH, _EFFICIENT, _MATH),
    "math": (_MATH,),
}
PACKAGES = {"xformers": ("xformers", "xformers"), "flash-attn": ("flash_attn", "flash")}  # module, dispatcher's name
STATES = ("hidden_states", "encoder_hidden_states")  # an attention's arguments that carry gradient

Call = tuple[nn.Module, Sequence[Any], dict[str, Any]]


def use(network: nn.Module, name: str, inputs: Callable[[], dict[str, Any]]) -> tuple[str, str]:
    """Chooses the attention of a network and puts it on; called again, it chooses anew.

    Every kind of attention call that the network makes is compared with math attention in output and gradient; a
    backend that is absent, fails or differs is passed over. The order is fixed, and no clock is asked, so that runs and
    processes on like machines choose alike.

    Args:
        network: without wrappers; its parameters' requires_grad is of no consequence.
        name: "auto", or a name of `KERNELS` or `PACKAGES`. "auto" is xformers for a UNet, flash-attn for a transformer
            on diffusers' dispatcher and SDPA for others; on the CPU it is SDPA, unchecked.
        inputs: makes the network's arguments by name, in the run's shapes; to be used under the run's autocast.

    Returns:
        The name of what is in use, and a line for the log.

    Raises:
        UserError: no such name.
    """
    if name not in {"auto", *KERNELS, *PACKAGES}:
        raise UserError(f"attention {name!r} is none of auto, {', '.join([*KERNELS, *PACKAGES])}.")
    modules = [module for module in network.modules() if type(module).__name__.endswith("Attention")]
    _put(modules, "sdpa")
    if name == "auto" and next(network.parameters()).device.type == "cpu":
        return "sdpa", "Attention: sdpa."
    calls = _calls(network, modules, inputs())
    chosen, passed = "sdpa", []
    try:
        _put([module for module, *_ in calls], "math")
        truth = [_answer(call) for call in calls]
        for chosen in dict.fromkeys((_favourite(network) if name == "auto" else name, "sdpa", "efficient", "math")):
            fault = _fault(chosen, calls, truth)
            if fault is None:
                break
            passed.append(f"; not {chosen}: {fault}")
        checked = f"equal to math in {len(calls)} kinds of call"
    except torch.OutOfMemoryError:
        chosen, checked = "sdpa", "unchecked, as math attention does not fit the memory"
    finally:
        _put(modules, chosen)
    return chosen, f"Attention: {chosen}, {checked}{''.join(passed)}."


def _favourite(network: nn.Module) -> str:
    """What "auto" tries first."""
    if any(hasattr(getattr(module, "processor", None), "_attention_backend") for module in network.modules()):
        return "flash-attn"
    return "xformers" if type(network).__name__.startswith("UNet") else "sdpa"


def _put(modules: Sequence[nn.Module], name: str, alone: bool = False) -> bool:
    """Makes attention modules compute by a backend; False where none has a place for it.

    Args:
        modules: whatever they computed by.
        name: of the backend.
        alone: without the kernels that stand in for calls which it cannot take.
    """
    from diffusers.models import attention_processor as own
    from diffusers.models.attention_dispatch import AttentionBackendName

    pairs = [
        (own.AttnProcessor2_0, own.XFormersAttnProcessor),
        (own.JointAttnProcessor2_0, own.XFormersJointAttnProcessor),
    ]
    swaps = dict(pairs) if name == "xformers" else {theirs: ours for ours, theirs in pairs}
    order = KERNELS.get(name, ())
    placed = name in KERNELS
    for module in modules:
        plain = getattr(type(module), "plain", type(module))
        module.__class__ = _ordered(plain, order[:1] if alone else order) if order else plain
        processor: Any = getattr(module, "processor", None)
        if hasattr(processor, "_attention_backend"):
            processor._attention_backend = AttentionBackendName(PACKAGES[name][1] if name in PACKAGES else "native")
            placed = True
        elif type(processor) in swaps:
            module.processor = swaps[type(processor)]()
            placed = True
    return placed


@functools.cache
def _ordered(plain: Any, order: tuple[SDPBackend, ...]) -> Any:
    """A module's class with a forward under these kernels, in this order."""

    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(list(order), set_priority=True):
            return plain.forward(self, *args, **kwargs)

    return type(plain.__name__, (plain,), {"forward": forward, "plain": plain, "__module__": plain.__module__})


def _calls(network: nn.Module, modules: Sequence[nn.Module], inputs: dict[str, Any]) -> list[Call]:
    """One module of each kind of call, with its arguments: kinds differ in class, heads and the arguments' shapes."""
    found: dict[Any, Call] = {}

    def note(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        shapes = [value.shape for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        found.setdefault((type(module), getattr(module, "heads", None), str(shapes)), (module, args, kwargs))

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    try:
        with torch.no_grad():
            network(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return list(found.values())


def _answer(call: Call) -> list[Tensor]:
    """Outputs of a call and the gradients for its states, which are random: an example's tokens are all alike."""
    module, args, kwargs = call
    generator = torch.Generator().manual_seed(0)

    def noise(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return torch.randn(value.shape, generator=generator).to(value).requires_grad_()

    args = [noise(value) for value in args]
    kwargs = {key: noise(value) if key in STATES else value for key, value in kwargs.items()}
    with torch.enable_grad():
        made = module(*args, **kwargs)
    outputs = [value for value in (made if isinstance(made, tuple) else (made,)) if isinstance(value, Tensor)]
    leaves = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.requires_grad]
    weights = [noise(value) for value in outputs]
    gradients = torch.autograd.grad(outputs, leaves, weights, materialize_grads=True)
    return [value.detach() for value in (*outputs, *gradients)]


def _fault(name: str, calls: Sequence[Call], truth: Sequence[Sequence[Tensor]]) -> str | None:
    """Why a backend cannot be used for these calls, whose answers by math attention are the truth; None if it can."""
    if name in PACKAGES and find_spec(PACKAGES[name][0]) is None:
        return "it is not installed"
    if not _put([module for module, *_ in calls], name, alone=True):
        return "these attention modules have no place for it"
    try:
        answers = [_answer(call) for call in calls]
    except Exception as error:  # whatever a kernel of somebody else's may raise
        return f"it failed ({(str(error) or type(error).__name__).splitlines()[0]})"
    for answer, true in zip(answers, truth, strict=True):
        # By norms. torch's CPU flash kernel is 0.6 epsilons of its dtype away from math, in float32 1e-6 (1,024 and
        # 2,048 tokens, 64 wide); TF32 in the place of float32 is a difference. Not finite is no equal either
        far = torch.stack(
            [(x.float() - y.float()).norm() / y.float().norm() for x, y in zip(answer, true, strict=True)]
        )
        if not far.max() <= max(1e-4, 4 * torch.finfo(true[0].dtype).eps):
            return f"it differs from math attention by {far.max():.1%}"
    return None
