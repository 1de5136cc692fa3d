"""Layers that let a network hear whose taste it is (PPD, arXiv 2501.06655).

Beside every text cross-attention stands a second one whose keys and values come from the user embedding u
(decoupled cross-attention, arXiv 2308.06721):

    softmax(Q K^T / sqrt(d)) V + softmax(Q K'^T / sqrt(d)) V',   K' = tokens(u) W'_k,   V' = tokens(u) W'_v

All three maps are without bias and everything else is frozen, so u = 0 adds exactly 0: it is the base, bit for bit.
tokens() is one linear map for the whole network: with a single token the softmax would be 1 and Q without a say.

The layers hang on the attention modules as hooks. Whatever processor does the text's part (SDPA, xformers, sliced),
before or after they were added, does it still; so does a LoRA on the same projections. The embedding travels as an
argument of the blocks, so that gradient checkpointing recomputes with the same one: in their attention kwargs or, where
they have none (Wan, Stable Audio), at the end of the text, from which it is taken off before each attention.

Shapes: N samples, D features of an embedding, T tokens, W width of the text, L query tokens, H heads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmalign.records import UserError

LAYERS_FILE = "user_layers.safetensors"
CARRIERS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")  # of UNets, joint attention, videos
TEXT_ENDS = ("text_embedder", "cross_attention_proj", "caption_projection")  # what makes the text that blocks read
ARGUMENT = "user"  # its entry in a carrier, or its own argument where there is none: u [N, D]
HEARD = "ip_hidden_states"  # diffusers' own name for what an IP-Adapter attends to: every processor lets it pass


class UserTokens(nn.Module):
    """Embeddings u [N, D] -> tokens [N, T, W]; linear, 0 to 0.

    Attributes:
        carrier: the network's argument that takes tokens to its attentions; None where they follow the text.
        whose: the users [N, D] of calls that name none; see `telling`.
        heard: tokens on their way to the end of the text.
    """

    carrier: str | None = None
    whose: Tensor | None = None
    heard: Tensor | None = None

    def __init__(self, features: int, tokens: int, width: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.project = nn.Linear(features, tokens * width, bias=False)

    def forward(self, user: Tensor) -> Tensor:
        """The tokens of N users."""
        return self.project(user.to(self.project.weight.dtype)).unflatten(-1, (self.tokens, -1))


class UserAttention(nn.Module):
    """softmax(Q K'^T / sqrt(d)) V' over a user's T tokens.

    Attributes:
        heard: tokens that came with the text of the call under way.
    """

    heard: Tensor | None = None

    def __init__(self, width: int, inner: int, heads: int, tokens: int = 1) -> None:
        super().__init__()
        self.heads, self.tokens = heads, tokens
        self.key = nn.Linear(width, inner, bias=False)
        self.value = nn.Linear(width, inner, bias=False)

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        """Queries [N, H, L, d] and tokens [N, T, W] -> [N, L, H d]."""
        tokens = tokens.to(self.key.weight.dtype)
        key, value = (
            linear(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2).to(query.dtype)
            for linear in (self.key, self.value)
        )
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def text_attentions(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of every attention that reads the text: a UNet's attn2, a DiT's attn2 or joint attention."""
    for name, module in network.named_modules():
        if hasattr(module, "to_q") and text_keys(module) is not None:
            yield name, module


def text_keys(attention: Any) -> Any:
    """What makes keys of the text, None where it is not read; CogVideoX's picture and text share their projections."""
    joint = type(getattr(attention, "processor", None)).__name__ == "CogVideoXAttnProcessor2_0"
    if joint or getattr(attention, "is_cross_attention", False):
        return attention.to_k
    return getattr(attention, "add_k_proj", None)


def add_layers(network: nn.Module, features: int, tokens: int, seed: int = 0) -> None:
    """Puts untrained user layers on a network; until they are trained every user is the base.

    Args:
        network: a diffusers UNet or transformer.
        features: D of the embeddings.
        tokens: T that an embedding becomes.
        seed: of the first weights. W'_v starts at 0, so the first step is the base's.

    Raises:
        UserError: the network has user layers already, or no text attention.
    """
    attentions, carrier, end = list(text_attentions(network)), _carrier(network.forward), _text_end(network)
    if not attentions or (carrier is None and end is None):
        raise UserError(f"A {type(network).__name__} has no text attention that user layers could stand beside.")
    if has_layers(network):
        raise UserError("The network has user layers already; load a fresh base.")
    device, widths = next(network.parameters()).device, []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _, attention in attentions:
            text = text_keys(attention)
            layer = UserAttention(text.in_features, attention.to_q.out_features, attention.heads, tokens)
            nn.init.normal_(layer.key.weight, std=text.in_features**-0.5)
            nn.init.zeros_(layer.value.weight)
            widths.append(text.in_features)
            attention.user = layer.to(device)
            if end is not None:
                attention.register_forward_pre_hook(_take_off, with_kwargs=True)
            attention.register_forward_hook(_add_users_part, with_kwargs=True)
        first = UserTokens(features, tokens, widths[0])
        nn.init.normal_(first.project.weight, std=features**-0.5)
    if len(set(widths)) > 1:
        raise UserError(f"A {type(network).__name__} reads texts of several widths; user layers know one.")
    network.user = first.to(device)
    network.register_forward_pre_hook(_make_tokens, with_kwargs=True)
    if end is None:
        first.carrier = carrier
    else:
        end.register_forward_hook(partial(_append, first))


def _carrier(call: Any) -> str | None:
    """The argument by which a network or a pipeline takes what its attentions shall know."""
    return next((name for name in CARRIERS if name in inspect.signature(call).parameters), None)


def _text_end(network: Any) -> nn.Module | None:
    """What makes the text that blocks read, where their attentions are given nothing else; else None."""
    passes_on = _carrier(network.forward) in CARRIERS[:2]
    ends = (part for name, part in network.named_modules() if name.endswith(TEXT_ENDS) and not passes_on)
    return next(ends, None)


def has_layers(network: nn.Module) -> bool:
    """Whether user layers are on a network."""
    return isinstance(getattr(network, "user", None), UserTokens)


def layers(network: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of the user layers, and of nothing else."""
    return {name: parameter for name, parameter in network.named_parameters() if "user" in name.split(".")}


def arguments(call: Any, user: Tensor | None) -> dict[str, Any]:
    """How a user [N, D] is told to `call`, a network's forward or a pipeline; nothing for nobody.

    Raises:
        UserError: it takes no attention kwargs and no text, so it cannot hear a user.
    """
    if user is None:
        return {}
    if carrier := _carrier(call):
        return {carrier: {ARGUMENT: user}}
    if "encoder_hidden_states" in inspect.signature(call).parameters:
        return {ARGUMENT: user}  # which the layers take off before the network sees it
    raise UserError(f"{call.__qualname__}: takes none of {', '.join(CARRIERS)}, so it cannot be told a user.")


@contextmanager
def telling(network: Any, user: Tensor | None) -> Iterator[None]:
    """While it lasts, a network with user layers speaks for a user [N, D], whatever pipeline calls it.

    A pipeline that guides doubles the batch, without the text first, or calls a second time under the name "uncond"
    (Wan): there no user is heard either, as with IP-Adapters, so guidance strengthens the taste together with the text.

    Raises:
        UserError: the network has no user layers.
    """
    if user is None:
        yield
        return
    if not has_layers(network):
        raise UserError("A user is given, but the network has no user layers; load them too (user_layers).")
    plain = getattr(network, "cache_context", None)

    @contextmanager
    def noted(name: str, **context: Any) -> Iterator[None]:
        network.user.whose = None if name == "uncond" else user
        with plain(name, **context):  # pyright: ignore[reportOptionalCall]
            yield

    network.user.whose = user
    if plain:
        network.cache_context = noted
    try:
        yield
    finally:
        network.user.whose = None
        network.__dict__.pop("cache_context", None)


def _make_tokens(network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Before the network runs: embeddings become tokens, in the place where they travel."""
    first, kwargs = network.user, dict(kwargs)
    user = kwargs.pop(ARGUMENT, first.whose)
    for name in CARRIERS:
        if ARGUMENT in (kwargs.get(name) or {}):
            kwargs[name] = dict(kwargs[name])
            user = kwargs[name].pop(ARGUMENT)
    first.heard = None
    if user is None:
        return args, kwargs
    sample: Any = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
    if len(sample) == 2 * len(user):  # guided: the half without the text comes first
        user = torch.cat([torch.zeros_like(user), user])
    if first.carrier is None:
        first.heard = first(user)
    else:
        kwargs[first.carrier] = {**(kwargs.get(first.carrier) or {}), HEARD: first(user)}
    return args, kwargs


def _append(first: UserTokens, end: nn.Module, args: tuple[Any, ...], text: Tensor) -> Tensor:
    """After the text [N, L, W] was made: the user's tokens follow it; nobody's are 0."""
    tokens, first.heard = first.heard, None
    if tokens is None:
        tokens = text.new_zeros(len(text), first.tokens, text.shape[-1])
    return torch.cat([text, tokens.to(text.dtype)], 1)


def _take_off(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Before an attention: it reads the text as it was, and laid out as it was, so that no bit differs."""
    text = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[1]
    own, attention.user.heard = text[:, : -attention.user.tokens].contiguous(), text[:, -attention.user.tokens :]
    if "encoder_hidden_states" in kwargs:
        return args, {**kwargs, "encoder_hidden_states": own}
    return (args[0], own, *args[2:]), kwargs


def _add_users_part(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """After an attention ran: the user's part goes through the same output projection and is added."""
    tokens, attention.user.heard = kwargs.get(HEARD, attention.user.heard), None
    if tokens is None:
        return output
    query = attention.to_q(args[0] if args else kwargs["hidden_states"])
    norm = getattr(attention, "norm_q", None) or nn.Identity()
    weight = getattr(norm, "weight", None)
    if weight is not None and weight.numel() == query.shape[-1]:  # over all heads, as Wan's
        query, norm = norm(query), nn.Identity()
    query = norm(query.unflatten(-1, (attention.heads, -1)).transpose(1, 2))
    part, project = attention.user(query, tokens), attention.to_out[0]
    # The projection without its bias, which the text's part has had; exactly 0 where the part is 0
    part = (project(part) - project(torch.zeros_like(part[:1, :1]))) / getattr(attention, "rescale_output_factor", 1.0)
    if isinstance(output, tuple):  # joint attention: the picture's stream, and the text's
        return output[0] + part.to(output[0].dtype), *output[1:]
    return output + part.to(output.dtype)


def save_layers(network: nn.Module, folder: str | Path) -> None:
    """Writes `user_layers.safetensors`; D and T are in its header."""
    from safetensors.torch import save_file

    first: Any = network.user
    facts = {"features": str(first.project.in_features), "tokens": str(first.tokens), "format": "pt"}
    weights = {name: parameter.detach().contiguous() for name, parameter in layers(network).items()}
    save_file(weights, Path(folder) / LAYERS_FILE, metadata=facts)


def load_layers(network: nn.Module, path: str | Path, add: Callable[..., Any] | None = None) -> None:
    """Puts trained user layers on a network.

    Args:
        network: of the architecture that they were trained on.
        path: the file, or a run's folder.
        add: (features, tokens) puts untrained ones on it; default `add_layers`.

    Raises:
        UserError: no such file, not user layers, or of another architecture.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(path) / LAYERS_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"{file}: no such user layers; give the output folder of a run that had users.")
    try:
        with safe_open(file, "pt") as opened:
            facts = opened.metadata() or {}
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        (add or partial(add_layers, network))(int(facts["features"]), int(facts["tokens"]))
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{file}: is no file of user layers ({error}).") from error
    own = layers(network)
    if own.keys() != weights.keys() or any(own[name].shape != weights[name].shape for name in own):
        raise UserError(f"{file}: its user layers do not fit this network; they were made for another architecture.")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
    for parameter in own.values():
        parameter.requires_grad_(False)
