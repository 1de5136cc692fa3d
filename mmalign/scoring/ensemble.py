"""Scorers that ask other scorers.

The card names them, `score: {combine: zscores, members: [{scorer: NAME or FOLDER, weight: 1, mean: 0.2, std: 0.1}]}`,
and how their scores s become one:

weights: sum of weight · s
zscores: sum of weight · (s - mean) / std; mean and std stand on the card, see `fit_zscores`
wins: the share of its comparisons that a medium wins among those of its prompt, see `win_shares`
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from mmalign import bundled
from mmalign.records import UserError, open_image
from mmalign.scoring.scorer import Card, Scorer, load_scorer, nearest
from mmalign.storage import atomic_file

FIELDS = {  # combine -> what a member may say
    "weights": ("scorer", "weight"),
    "zscores": ("scorer", "weight", "mean", "std"),
    "wins": ("scorer",),
}
Group = tuple[str, str]  # prompt and condition of media that are compared with each other


class Members(Scorer):
    """Several scorers, asked at once; the judgement is their scores by their names, without a common one."""

    def __init__(self, card: Card, scorers: Sequence[Scorer]) -> None:
        self.card, self.scorers = card, {scorer.card.name: scorer for scorer in scorers}
        self.parts = tuple(self.scorers)

    def prepare(self, medium: Any, *, condition: Sequence = (), name: str = "") -> dict[Hashable, Any]:
        """Preparation -> what its scorers take; each is made once, of a picture that is decoded once."""
        if self.card.judges == "image":
            medium = open_image(medium, name=name)
        made: dict[Hashable, Any] = {}
        for scorer in self.scorers.values():
            if _preparation(scorer) not in made:
                made[_preparation(scorer)] = scorer.prepare(medium, condition=condition, name=name)
        return made

    def judge(self, prepared: Sequence[Mapping], prompts: Sequence[str]) -> dict[str, Tensor]:
        """Scorer -> [N]."""
        asked = self.scorers.items()
        return {n: s.judge([made[_preparation(s)] for made in prepared], prompts)["score"] for n, s in asked}


class Ensemble(Members):
    """One score of several scorers'; its parts are theirs, by their names.

    With `wins` a score depends on the other media: `score` and `aspects` compare all those of the call that have the
    same prompt and condition, whatever the batch size; `judge` compares what it is given.
    """

    def judge(self, prepared: Sequence[Mapping], prompts: Sequence[str]) -> dict[str, Tensor]:
        """See `Scorer.judge`."""
        return self.combined(super().judge(prepared, prompts), [(prompt, "") for prompt in prompts])

    def aspects(self, media: Sequence, prompts: Sequence[str], **options: Any) -> dict[str, Tensor]:
        """See `Scorer.aspects`."""
        found = self.asked(media, prompts, **options)
        conditions = map(repr, options.get("conditions") or [()] * len(media))
        return self.combined(found, list(zip(prompts, conditions, strict=True))) if len(media) else found

    def asked(self, media: Sequence, prompts: Sequence[str], **options: Any) -> dict[str, Tensor]:
        """The members' scores, each [N]; arguments as `score`."""
        return Members(self.card, tuple(self.scorers.values())).aspects(media, prompts, **options)

    def combined(self, found: dict[str, Tensor], groups: Sequence[Group]) -> dict[str, Tensor]:
        """Members' scores, each [N], and the common one before them.

        Raises:
            UserError: there are no means and deviations yet, or nothing to compare a medium with.
        """
        if self.card.score["combine"] == "wins":
            return {"score": self.wins(torch.stack(list(found.values())), groups), **found}
        total = torch.zeros(())
        for member, (name, scores) in zip(self.card.score["members"], found.items(), strict=True):
            if self.card.score["combine"] == "zscores":
                if not {"mean", "std"} <= member.keys():
                    raise UserError(f"{_where(self.card)}: {name} has no mean and std: call ensemble.fit_zscores once.")
                scores = (scores - member["mean"]) / member["std"]
            total = total + member.get("weight", 1) * scores
        return {"score": total, **found}

    def wins(self, scores: Tensor, groups: Sequence[Group]) -> Tensor:
        """[S, N] scores -> [N] shares of comparisons won within a group."""
        shares, rows = torch.zeros(len(groups)), defaultdict(list)
        for row, group in enumerate(groups):
            rows[group].append(row)
        for (prompt, _), own in rows.items():
            if len(own) < 2:
                raise UserError(
                    f"{self.card.name} compares the media of a prompt with each other, and {prompt!r} has one: "
                    "score more of it in one call, or score with the members and compare them afterwards."
                )
            shares[own] = torch.tensor(win_shares(scores[:, own].tolist()))
        return shares


def load(card: Card, device: str | torch.device = "cpu") -> Ensemble:
    """Builds the scorer of a card of family ensemble, with its members."""
    where, combine, members = _where(card), card.score.get("combine"), card.score.get("members")
    if combine not in FIELDS:
        raise UserError(f"{where}: score.combine must be one of {', '.join(FIELDS)}{nearest(str(combine), FIELDS)}.")
    if not isinstance(members, list) or not members:
        raise UserError(f"{where}: score.members must be a list of one or more `scorer: NAME`.")
    scorers = [load_scorer(_source(card, member), device) for member in members]
    for scorer in scorers:
        if scorer.card.judges != card.judges:
            raise UserError(f"{where}: judges {card.judges}, but its member {scorer.card.name} {scorer.card.judges}.")
    names = ["score", *(scorer.card.name for scorer in scorers)]
    if len(set(names)) < len(names):
        raise UserError(f"{where}: the names of its members ({', '.join(names[1:])}) must differ, and not be `score`.")
    # The members' facts go with the card, as a table of scores tells by it whether its scores are still good.
    facts = {s.card.name: {f: getattr(s.card, f) for f in ("model", "weights", "preprocess", "score")} for s in scorers}
    invariant = combine != "wins" and all(scorer.card.batch_invariant for scorer in scorers)
    return Ensemble(replace(card, model=facts, batch_invariant=invariant), scorers)


def fit_zscores(scorer: Ensemble, media: Sequence, prompts: Sequence[str], **options: Any) -> None:
    """Writes the mean and the deviation of each member's scores into the scorer's card (comments in it are lost).

    Args:
        scorer: combines by zscores; it goes by the new numbers at once.
        media: N media of many prompts, such as the scores will be of.
        prompts: N prompts.
        options: as `Scorer.score`.

    Raises:
        UserError: the scorer does not combine by zscores, or a member scores all media alike.
    """
    where, members = _where(scorer.card), scorer.card.score["members"]
    if scorer.card.score["combine"] != "zscores":
        raise UserError(f"{where}: has `combine: {scorer.card.score['combine']}`; means are for zscores.")
    found = scorer.asked(media, prompts, **options)
    for name, scores in found.items():
        if not scores.std(correction=0) > 0:
            raise UserError(f"{where}: {name} scores all {len(media)} media alike; give more that differ.")
    for member, scores in zip(members, found.values(), strict=True):
        member |= {"mean": scores.mean().item(), "std": scores.std(correction=0).item()}
    facts = yaml.safe_load(where.read_text(encoding="utf-8")) | {"score": scorer.card.score}
    with atomic_file(where) as temp:
        temp.write_text(yaml.safe_dump(facts, sort_keys=False, allow_unicode=True), encoding="utf-8")


def win_shares(scores: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """[K] the share of comparisons that each of K candidates won, from the scores [S][K] of S scorers.

    phi = C / (S (K - 1)), with C the candidates that one beats, summed over the scorers; a tie counts for nobody
    (Syn-Pic, arXiv 2410.18013 algorithm 1). It is in [0, 1], what RankDPO takes for its gains.

    Raises:
        UserError: the lists are of different lengths or under 2, or a score is not finite.
    """
    values = np.array(scores, float) if len({len(row) for row in scores}) == 1 else np.zeros((0, 0))
    if values.shape[1] < 2 or not np.isfinite(values).all():
        raise UserError(f"the scores {scores} are no lists of two or more finite numbers, each as long; mend them.")
    won = (values[:, :, None] > values[:, None, :]).sum(axis=(0, 2))
    return tuple((won / (len(values) * (values.shape[1] - 1))).tolist())


def _where(card: Card) -> Path:
    return card.folder / "card.yaml"


def _preparation(scorer: Scorer) -> Hashable:
    return scorer.card.name if scorer.preparation is None else scorer.preparation


def _source(card: Card, member: Any) -> str | Path:
    """Where a member's card lies; UserError if the entry or that card is wrong."""
    where, known = _where(card), FIELDS[card.score["combine"]]
    if not isinstance(member, dict) or not isinstance(member.get("scorer"), str):
        raise UserError(f"{where}: the member {member} needs `scorer: NAME or FOLDER`.")
    name = member["scorer"]
    for field, value in member.items():
        if field not in known:
            raise UserError(f"{where}: member {name} has a field {field!r} too many{nearest(field, known)}.")
        if field != "scorer" and not (isinstance(value, Real) and isfinite(value) and (field != "std" or value > 0)):
            raise UserError(f"{where}: {field} of member {name} must be a finite number, and a std over 0.")
    folder = next((f for f in (card.path(name), bundled("scorers") / name) if (f / "card.yaml").is_file()), None)
    if folder and Card.read(folder).family == "ensemble":
        raise UserError(f"{where}: member {name} is an ensemble itself; name its members here.")
    return folder or name
