"""Scorers that ask a vision-language model, and read the answer's probability: VQAScore, PaCo-Reward, UVE.

The card says what is asked and which answers count; any model that transformers can chat with will do.
Sources: VQAScore linzhiqiu/t2v_metrics @ 6ecb74f, vqascore_models/qwen2vl_model.py (CLIP-FlanT5 left it after 3.0);
PaCo-Reward X-GenGroup/PaCo-RL @ 08caac6, consistency_scorer_vllm.py:160-186; UVE bytedance/UVE @ 0e424af, qwen2vl.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmalign.records import Text, UserError, open_image
from mmalign.scoring import weights
from mmalign.scoring.chat import Chat
from mmalign.scoring.frames import reader
from mmalign.scoring.scorer import Card, Scorer, nearest

FORMULAS = ("first", "mean", "likelihood")


class AnswerScorer(Scorer):
    """How probable a model finds an answer; yes and no are the card's `positive` and `negative` tokens.

    first: P(yes) / (P(yes) + P(no)) of the first token of the answer, which for a token each is
        sigmoid(logp_yes - logp_no); without `negative` P(yes) over the vocabulary
    mean: exp(mean log-probability of the tokens of the first of `positive`)
    likelihood: mean log-probability of the tokens of the medium, a `Text`, as the answer to the prompt
    """

    def __init__(self, card: Card, device: str | torch.device):
        self.card, self.facts = card, card.score
        self.question, self.read = question_of(card), reader(card)
        self.preparation = ("vlm", card.judges, repr(card.preprocess), self.facts.get("conditions"))
        self.chat = Chat.load(source_of(card), device)
        self.dtype = str(self.chat.model.dtype).removeprefix("torch.")
        if self.facts["formula"] == "first":
            self.yes, self.no = (self._tokens(self.facts.get(field, ())) for field in ("positive", "negative"))

    def prepare(self, medium: Any, *, condition: Sequence = (), name: str = "") -> tuple[list[Any], Any]:
        """The pictures shown before the medium, and the medium."""
        wanted, name = self.facts.get("conditions"), name or str(medium)
        if wanted is not None and len(condition) != wanted:
            raise UserError(f"{name}: {self.card.name} compares with {wanted} input pictures, not {len(condition)}.")
        shown = [open_image(one, name=f"{name}, input picture {n}") for n, one in enumerate(condition)]
        if self.card.judges != "text":
            return shown, self.read(medium, name)
        if not isinstance(medium, Text):
            raise UserError(f"{name}: is no text; {self.card.name} judges text answers.")
        return shown, medium

    def judge(self, prepared: Sequence[tuple[list[Any], Any]], prompts: Sequence[str]) -> dict[str, Tensor]:
        """See `Scorer.judge`."""
        formula, label = self.facts["formula"], self.facts.get("label", "")
        contents = []
        for (shown, medium), prompt in zip(prepared, prompts, strict=True):
            pictures = shown if isinstance(medium, str) else [*shown, medium]
            parts = [part for n, one in enumerate(pictures, 1) for part in (label.replace("{n}", str(n)), one)]
            contents.append([*filter(None, parts), self.question.replace("{prompt}", prompt)])
        if formula == "first":
            logp = self.chat.logits(contents).log_softmax(-1)  # [N, V]
            yes = logp[:, self.yes].logsumexp(-1)
            return {"score": (yes - logp[:, self.yes + self.no].logsumexp(-1) if self.no else yes).exp()}
        likely = formula == "likelihood"
        answers = [medium if likely else self.facts["positive"][0] for _, medium in prepared]
        means = torch.stack([row.mean() for row in self.chat.logp(contents, answers)])
        return {"score": means if likely else means.exp()}

    def _tokens(self, words: Sequence[str]) -> list[int]:
        """Those of the words that are one token to this model."""
        ids = [self.chat.processor.tokenizer(word, add_special_tokens=False).input_ids for word in words]
        if words and all(len(one) != 1 for one in ids):
            raise UserError(
                f"{self.card.folder / 'card.yaml'}: none of {list(words)} is one token of {self.chat.source}; "
                "name others, or take `formula: mean`."
            )
        return [one[0] for one in ids if len(one) == 1]


def load(card: Card, device: str | torch.device = "cpu") -> AnswerScorer:
    """Builds the scorer of a card of family vlm."""
    where, formula, words = card.folder / "card.yaml", card.score.get("formula"), card.score.get("positive")
    if formula not in FORMULAS:
        told = f"one of {', '.join(FORMULAS)}{nearest(str(formula), FORMULAS)}"
        raise UserError(f"{where}: score.formula must be {told}.")
    if (formula == "likelihood") != (card.judges == "text"):
        raise UserError(f"{where}: formula likelihood judges text, and no other formula does.")
    if formula != "likelihood" and not (words and all(isinstance(word, str) for word in words)):
        raise UserError(f"{where}: score.positive must list the answers that count, in quotes: ['Yes'].")
    return AnswerScorer(card, device)


def source_of(card: Card) -> str:
    """The model that a card names: a folder beside it, or a hub id.

    Raises:
        UserError: it names none.
    """
    name = card.model.get("transformers")
    if not name:
        raise UserError(f"{card.folder / 'card.yaml'}: model needs `transformers: <hub id or folder>`.")
    return str(card.path(name)) if card.path(name).is_dir() else str(name)


def question_of(card: Card) -> str:
    """What a card asks, in it or in a file that it names; {prompt} stands for the prompt.

    Raises:
        UserError: the file is missing, or is not the card's.
    """
    given = card.score.get("question", "{prompt}")
    if isinstance(given, str):
        return given
    if not card.path(given["file"]).is_file():
        raise UserError(f"{card.path(given['file'])} is missing: write there, word for word, {given['source']}.")
    return weights.find(card, given).read_bytes().decode().replace("{text_prompt}", "{prompt}")
