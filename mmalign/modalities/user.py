"""Layers that let a network hear whose taste it is (PPD, arXiv 2501.06655).

Beside every text cross-attention stands a second one whose keys and values come from the user embedding u
(decoupled cross-attention, arXiv 2308.06721):

    softmax(Q K^T / sqrt(d)) V + softmax(Q K'^T / sqrt(d)) V',   K' = tokens(u) W'_k,   V' = tokens(u) W'_v

All three maps are without bias and everything else is frozen, so u = 0 adds exactly 0: it is the base, bit for bit.
tokens() is one linear map for the whole network: with a single token the softmax would be 1 and Q without a say.

The layers hang on the attention modules as hooks. Whatever processor does the text's part (SDPA, xformers, sliced),
before or after they were added, does it still; so does a LoRA on the same projections. The embedding travels as an
argument of the call, so that gradient checkpointing recomputes with the same one.

Shapes: N samples, D features of an embedding, T tokens, W width of the text, L query tokens, H heads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmalign.records import UserError

LAYERS_FILE = "user_layers.safetensors"
CARRIERS = ("cross_attention_kwargs", "joint_attention_kwargs")  # of UNets, of joint attention
ARGUMENT = "user"  # its entry in one of them: u [N, D]
HEARD = "ip_hidden_states"  # diffusers' own name for what an IP-Adapter attends to: every processor lets it pass


class UserTokens(nn.Module):
    """Embeddings u [N, D] -> tokens [N, T, W]; linear, 0 to 0."""

    def __init__(self, features: int, tokens: int, width: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.project = nn.Linear(features, tokens * width, bias=False)

    def forward(self, user: Tensor) -> Tensor:
        """The tokens of N users."""
        return self.project(user.to(self.project.weight.dtype)).unflatten(-1, (self.tokens, -1))


class UserAttention(nn.Module):
    """softmax(Q K'^T / sqrt(d)) V' over a user's tokens."""

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
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
    """Name and module of every attention that reads the text: a UNet's attn2, a DiT's joint attention."""
    from diffusers.models.attention_processor import Attention

    for name, module in network.named_modules():
        if isinstance(module, Attention) and (module.is_cross_attention or module.added_kv_proj_dim is not None):
            yield name, module


def add_layers(network: nn.Module, features: int, tokens: int, seed: int = 0) -> None:
    """Puts untrained user layers on a network; until they are trained every user is the base.

    Args:
        network: a diffusers UNet or a transformer with joint attention.
        features: D of the embeddings.
        tokens: T that an embedding becomes.
        seed: of the first weights. W'_v starts at 0, so the first step is the base's.

    Raises:
        UserError: the network has user layers already, or no text attention.
    """
    attentions = list(text_attentions(network))
    if not attentions:
        raise UserError(f"A {type(network).__name__} has no text attention that user layers could stand beside.")
    if has_layers(network):
        raise UserError("The network has user layers already; load a fresh base.")
    device, widths = next(network.parameters()).device, []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _, attention in attentions:
            text = attention.to_k if attention.is_cross_attention else attention.add_k_proj
            layer = UserAttention(text.in_features, attention.to_q.out_features, attention.heads)
            nn.init.normal_(layer.key.weight, std=text.in_features**-0.5)
            nn.init.zeros_(layer.value.weight)
            widths.append(text.in_features)
            attention.user = layer.to(device)
            attention.register_forward_hook(_add_users_part, with_kwargs=True)
        first = UserTokens(features, tokens, widths[0])
        nn.init.normal_(first.project.weight, std=features**-0.5)
    if len(set(widths)) > 1:
        raise UserError(f"A {type(network).__name__} reads texts of several widths; user layers know one.")
    network.user = first.to(device)
    network.register_forward_pre_hook(_make_tokens, with_kwargs=True)


def has_layers(network: nn.Module) -> bool:
    """Whether user layers are on a network."""
    return isinstance(getattr(network, "user", None), UserTokens)


def layers(network: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of the user layers, and of nothing else."""
    return {name: parameter for name, parameter in network.named_parameters() if "user" in name.split(".")}


def arguments(call: Any, user: Tensor | None) -> dict[str, Any]:
    """How a user [N, D] is told to `call`, a network's forward or a pipeline; nothing for nobody.

    Raises:
        UserError: it takes no attention kwargs, so it cannot hear a user.
    """
    if user is None:
        return {}
    for name in CARRIERS:
        if name in inspect.signature(call).parameters:
            return {name: {ARGUMENT: user}}
    raise UserError(f"{call.__qualname__}: takes none of {', '.join(CARRIERS)}, so it cannot be told a user.")


def _make_tokens(network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Before the network runs: embeddings become tokens, in the place where they travel.

    A pipeline that guides doubles the batch, without the text first: that half hears no user either, as with
    IP-Adapters, so guidance strengthens the taste together with the text.
    """
    for name in CARRIERS:
        given = kwargs.get(name) or {}
        if ARGUMENT in given:
            user = given[ARGUMENT]
            sample: Any = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
            if len(sample) == 2 * len(user):
                user = torch.cat([torch.zeros_like(user), user])
            rest = {key: value for key, value in given.items() if key != ARGUMENT}
            kwargs = {**kwargs, name: {**rest, HEARD: network.user(user)}}
    return args, kwargs


def _add_users_part(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """After an attention ran: the user's part goes through the same output projection and is added."""
    tokens = kwargs.get(HEARD)
    if tokens is None:
        return output
    query = attention.to_q(args[0] if args else kwargs["hidden_states"])
    query = query.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    if attention.norm_q is not None:
        query = attention.norm_q(query)
    part, project = attention.user(query, tokens), attention.to_out[0]
    # The projection without its bias, which the text's part has had; exactly 0 where the part is 0
    part = (project(part) - project(torch.zeros_like(part[:1, :1]))) / attention.rescale_output_factor
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
