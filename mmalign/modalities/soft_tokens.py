"""What a token model is told beside its text: whose taste it is (PPD), and which part of a picture it may not see.

A user's embedding u becomes T vectors by a linear map without bias, which are added to the embeddings of the first T
tokens. Those are the chat template's, the same before every prompt, so the vectors are soft tokens that every later
token hears; nothing is shifted, and u = 0 adds exactly 0: it is the base, bit for bit. The map starts at 0.

Source: the soft tokens are ours. PPD (arXiv 2501.06655) has cross-attention layers, which these models lack.

Shapes: N samples, L tokens, D features of an embedding, T tokens, W width of the network.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.modalities.user import UserTokens, has_layers
from mmalign.records import UserError


def add_soft_tokens(network: Any, features: int, tokens: int) -> None:
    """Puts an untrained map from users to soft tokens on a transformers network; until it is trained all are the base.

    Args:
        network: with input embeddings.
        features: D.
        tokens: T.

    Raises:
        UserError: it has one already.
    """
    if has_layers(network):
        raise UserError("The network has user layers already; load a fresh base.")
    embed = network.get_input_embeddings()
    network.user = UserTokens(features, tokens, embed.embedding_dim).to(embed.weight.device)
    nn.init.zeros_(network.user.project.weight)


@contextmanager
def told(network: Any, user: Tensor | None) -> Iterator[None]:
    """Inside the block the network's prompts are these users' [N, D]; nobody's for None.

    Raises:
        UserError: there are users, but the network has no user layers.
    """
    if user is None:
        yield
        return
    if not has_layers(network):
        raise UserError("A user is given, but the network has no user layers; give user_layers, or leave the user out.")

    def add(embed: Any, args: Any, embedded: Tensor) -> Tensor:
        if embedded.shape[1] == 1:  # one token more, after the prompt of which only the cache is left
            return embedded
        soft = network.user(user.to(embedded.device)).to(embedded.dtype)[:, : embedded.shape[1]]
        return torch.cat([embedded[:, : soft.shape[1]] + soft, embedded[:, soft.shape[1] :]], 1)

    handle = network.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def hiding(network: Any, hidden: Tensor | None) -> Iterator[None]:
    """Inside the block no token attends to those that `hidden` [L] bool says, in any layer; their places stay.

    The text decoder's attention mask alone is changed: positions were counted with the full one.

    Raises:
        UserError: the network gives its decoder a mask of its own making.
    """
    if hidden is None:
        yield
        return

    def mask(decoder: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        seen, embedded, cache = (kwargs.get(name) for name in ("attention_mask", "inputs_embeds", "past_key_values"))
        if seen is None and embedded is not None:  # `generate` leaves out a mask that hides nothing
            before = 0 if cache is None else cache.get_seq_length()
            seen = torch.ones(len(embedded), before + embedded.shape[1], dtype=torch.int64, device=embedded.device)
        if not isinstance(seen, Tensor) or seen.ndim != 2:
            raise UserError(f"A {type(network).__name__} makes attention masks in which no token can be hidden.")
        off = nn.functional.pad(hidden.to(seen.device), (0, seen.shape[1] - len(hidden)))
        return args, {**kwargs, "attention_mask": seen * ~off}

    handle = network.get_decoder().register_forward_pre_hook(mask, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
