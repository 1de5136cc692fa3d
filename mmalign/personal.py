"""What `mmalign user` does: embeddings of users from their preference pairs, and of tastes between two users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import mmalign
from mmalign.records import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from mmalign.data.users import Users

PAIRS = 4  # choices that a person makes at least: the paper's N, see mmalign.modalities.taste
STABLE = 0.95  # cosine of a person's embedding with and without their last choice


def user(argv: Sequence[str]) -> None:
    """Makes or blends user embeddings."""
    import tyro

    from mmalign.cli import parsed

    commands = {"make": make, "blend": blend}
    if not argv or argv[0] not in commands:
        raise UserError("mmalign user make --pairs FOLDER embeds users; mmalign user blend A B --users FILE mixes two.")
    config = (tyro.conf.PositionalRequiredArgs, tyro.conf.UseAppendAction)
    if argv[0] == "make":
        config = (tyro.conf.UseAppendAction,)  # --pairs is a flag although it must be given
    parsed(commands[argv[0]], argv[1:], prog=f"mmalign user {argv[0]}", config=config)


def make(
    pairs: str,
    user: str | None = None,
    output: str = "users.safetensors",
    count: int = 4,
    encoder: str = "embedded-clip",
    layers: tuple[str, ...] = (),
    layer: int | None = None,
    pooling: Literal["mean", "last"] = "mean",
    split: str = "train",
) -> None:
    """Makes embeddings of users from a few of their preference pairs; other users of an existing file stay in it.

    Args:
        pairs: preference data whose comparisons name their user: folder, parquet file or hub id.
        user: whose embedding; default everybody who has enough pairs.
        output: file of embeddings.
        count: pairs that are looked at, the same for all users.
        encoder: a CLIP scorer (see mmalign scorers), or a vision-language model's folder or hub id.
        layers: of a CLIP scorer's image tower; once or more; default the early ones of embedded-clip.
        layer: of a vision-language model, whose hidden states are taken; default the middle one.
        pooling: of its hidden states over the tokens.
        split: of the data.
    """
    from mmalign.commands import quiet_libraries
    from mmalign.console import stage
    from mmalign.data.importers import read_comparisons
    from mmalign.data.users import rows_by_user
    from mmalign.modalities.taste import embed

    if count < 1:
        raise UserError(f"count is {count}; it has to be 1 or more.")
    quiet_libraries()
    comparisons = read_comparisons(pairs, split=split).comparisons
    rows = rows_by_user(comparisons)
    if not rows:
        raise UserError(f"{pairs}: none of its comparisons names a user; add the field user.")
    wanted = sorted(rows) if user is None else [user]
    enough = [name for name in wanted if len(rows.get(name, ())) >= count]
    if not enough:
        have = f"user {user!r} has {len(rows.get(user, ()))} pairs" if user else f"no user has {count} pairs"
        raise UserError(f"{pairs}: {have}, and {count} are needed; collect more, or lower --count.")
    taste = load_encoder(encoder, layers, layer, pooling)
    joined(output, {}, taste.facts)  # what is wrong with the file is said before anything is made
    made = {}
    with stage("Users", len(enough)) as advance:
        for name in enough:
            made[name] = embed([comparisons[row] for row in rows[name][:count]], taste)
            advance(1)
    users = add_users(output, made, taste.facts)
    left = len(wanted) - len(enough)
    print(f"{len(enough)} users embedded from {count} pairs each, {left} with fewer left out.")
    print(f"{output} has {len(users.vectors)} users.")


def joined(path: str | Path, vectors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Users:
    """The users of a file, which may be missing, and others.

    Raises:
        UserError: they were made in different ways, or have different lengths.
    """
    from mmalign.data.users import Users, read_users

    before = read_users(path) if Path(path).exists() else Users({}, facts)
    if dict(before.facts) != dict(facts):
        raise UserError(f"{path}: was made another way ({before.facts}); give the same encoder, or another --output.")
    both = {**before.vectors, **vectors}
    if len({len(vector) for vector in both.values()}) > 1:
        raise UserError(f"{path}: holds embeddings of another length; give another --output.")
    return Users(both, facts, str(path))


@dataclass(frozen=True)
class Choices:
    """What one person chose between pairs so far.

    Attributes:
        parts: [D] a choice, as an encoder sees it.
        embedding: [D] of all choices.
        cosine: of the embedding and the one before the last choice. Choices that have nothing in common come to 0.95
            after eleven, so what is there earlier is taste.
    """

    parts: tuple[Tensor, ...] = ()
    embedding: Tensor | None = None
    cosine: float = 0.0

    def plus(self, prompt: str, chosen: Any, rejected: Any, encoder: Any) -> Choices:
        """The choices with one more.

        Raises:
            UserError: the two pictures do not differ.
        """
        import torch

        from mmalign.modalities.taste import averaged

        with torch.no_grad():
            parts = (*self.parts, encoder(prompt, chosen, rejected).float().cpu())
        embedding = averaged(parts, "these pairs")
        if self.embedding is None:
            return Choices(parts, embedding)
        return Choices(parts, embedding, torch.cosine_similarity(embedding, self.embedding, 0).item())

    @property
    def stable(self) -> bool:
        """Whether another choice would change little: at least the paper's four, and a cosine of 0.95."""
        return len(self.parts) >= PAIRS and self.cosine >= STABLE


def add_users(path: str | Path, vectors: Mapping[str, Tensor], facts: Mapping[str, Any], *, new: bool = False) -> Users:
    """Puts users into a file, one writer at a time; those who were there stay.

    Args:
        path: of the file; made if missing.
        vectors: user -> [D].
        facts: how they were made.
        new: nobody is replaced.

    Returns:
        Everybody in the file.

    Raises:
        UserError: as `joined`, or with `new` a user has that name already.
    """
    from filelock import FileLock

    from mmalign.data.users import write_users

    with FileLock(Path(path).with_name(f".{Path(path).name}.lock")):
        taken = joined(path, {}, facts).vectors.keys() & vectors.keys() if new else ()
        if taken:
            raise UserError(f"There is a user {min(taken)!r} already; choose another name.")
        users = joined(path, vectors, facts)
        write_users(path, users)
    return users


def load_encoder(
    name: str, layers: Sequence[str] = (), layer: int | None = None, pooling: Literal["mean", "last"] = "mean"
) -> Any:
    """What looks at pairs: a CLIP scorer of that name, else a vision-language model.

    Raises:
        UserError: neither can be loaded, or the scorer has not these layers.
    """
    from mmalign.modalities.taste import PictureTaste, load_language_taste

    if not any((folder / "card.yaml").is_file() for folder in (Path(name), mmalign.bundled("scorers") / name)):
        return load_language_taste(name, layer, pooling)
    scorer: Any = mmalign.load_scorer(name)
    if not hasattr(scorer, "features"):
        raise UserError(f"{name}: is no CLIP scorer, so it cannot look at pairs; embedded-clip can.")
    taste = PictureTaste(scorer, name, tuple(layers) or PictureTaste.layers)
    known = {found for found, _ in scorer.model.visual.named_modules()}
    missing = [found for found in taste.layers if found not in known]
    if missing:
        raise UserError(f"{name}: its image tower has no layer {missing[0]!r}; name others by --layers.")
    return taste


def blend(one: str, other: str, weight: float = 0.5, users: str = "users.safetensors", name: str | None = None) -> None:
    """Puts a taste between two users into their file: (1 - weight) of the one and weight of the other.

    Args:
        one: a user.
        other: another user.
        weight: 0 is the one, 1 the other; beyond that the taste is carried on past them.
        users: file of embeddings.
        name: of the new one; default ONE+OTHER@WEIGHT.
    """
    from mmalign.data.users import read_users

    known = read_users(users)
    name = name or f"{one}+{other}@{weight:g}"
    if name in (one, other):
        raise UserError(f"--name {name}: is one of the two; choose another, both stay as they are.")
    add_users(users, {name: between(known, one, other, weight)}, known.facts)
    print(f"{users} has {name!r} now.")


def between(users: Users, one: str, other: str, weight: float) -> Tensor:
    """The taste [D] of (1 - weight) of the one and weight of the other.

    Raises:
        UserError: there is no such user.
    """
    return (1 - weight) * users[one] + weight * users[other]
