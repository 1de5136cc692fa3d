"""User embeddings on the disk: one vector a user, and how they were made."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.records import Comparison, UserError
from mmalign.storage import atomic_file

if TYPE_CHECKING:
    from torch import Tensor

USERS_FILE = "users.safetensors"


def numbers_of(users: Sequence[str | None]) -> Tensor | None:
    """[N] int64, a stable number a user; None where somebody is not named."""
    import torch

    named = [user for user in users if user is not None]
    if len(named) < len(users):
        return None
    digests = (hashlib.blake2b(user.encode(), digest_size=8).digest() for user in named)
    return torch.tensor([int.from_bytes(digest, "big") >> 1 for digest in digests])


def rows_by_user(comparisons: Sequence[Comparison]) -> dict[str, list[int]]:
    """User -> row numbers of their comparisons that prefer something, in an order that is a function of the ids."""
    found: dict[str, list[tuple[int, int]]] = {}
    for row, item in enumerate(comparisons):
        if item.user is not None and len(set(item.score)) > 1:
            found.setdefault(item.user, []).append((item.group, row))
    return {user: [row for _, row in sorted(places)] for user, places in found.items()}


@dataclass(frozen=True)
class Users:
    """Embeddings by user.

    Attributes:
        vectors: user -> [D] float32.
        facts: the encoder and its settings; embeddings made in different ways are not comparable.
        source: the file, for errors.
    """

    vectors: Mapping[str, Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)
    source: str = "these users"

    @property
    def features(self) -> int:
        """D."""
        return len(next(iter(self.vectors.values())))

    def __getitem__(self, user: str) -> Tensor:
        """A user's embedding [D].

        Raises:
            UserError: the file has none; it names the nearest.
        """
        if user not in self.vectors:
            near = difflib.get_close_matches(user, list(self.vectors), n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else "make one with mmalign user make."
            raise UserError(f"{self.source}: has no embedding of user {user!r}; {hint}")
        return self.vectors[user]

    def of(self, item: Comparison) -> Tensor:
        """The embedding of a comparison's user [D].

        Raises:
            UserError: it names none, or the file does not have that user.
        """
        if item.user is None:
            raise UserError(f"comparison {item.id!r}: names no user; leave it out, or train without users.")
        return self[item.user]


def write_users(path: str | Path, users: Users) -> None:
    """Writes a safetensors file, whole or not at all: a tensor a user, the facts in its header."""
    from safetensors.torch import save_file

    facts = {"users": json.dumps(dict(users.facts), sort_keys=True), "format": "pt"}
    with atomic_file(Path(path)) as temp:
        save_file({user: vector.float().contiguous() for user, vector in users.vectors.items()}, temp, metadata=facts)


def read_users(path: str | Path) -> Users:
    """Reads what `write_users` wrote.

    Raises:
        UserError: no such file, or it holds no embeddings.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise UserError(f"{path}: no such file of user embeddings; make one with mmalign user make.")
    try:
        with safe_open(path, "pt") as file:
            vectors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            facts = json.loads((file.metadata() or {})["users"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path}: is no file of user embeddings; make one with mmalign user make.") from error
    if not vectors or len({tuple(vector.shape) for vector in vectors.values()}) != 1:
        raise UserError(f"{path}: holds no embeddings, or embeddings of several lengths; make it anew.")
    return Users(vectors, facts, str(path))
