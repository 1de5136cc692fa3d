"""Reward models on Qwen2-VL, read at special tokens of the question: VideoReward and HPSv3.

Sources: KwaiVGI/VideoAlign @ 219ab9d, inference.py and trainer.py:60-170; MizzenAI/HPSv3 1.0.0, hpsv3/inference.py and
hpsv3/model/qwen2vl_trainer.py. Both call the decoder without position ids, for which transformers 4.45 counts tokens
one by one, pictures included, instead of Qwen2-VL's grid of time, height and width. They were trained so; so do we.
Deviations: LoRA is merged into the weights; the head runs in float32 (official: VideoReward's in bfloat16).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign.records import UserError
from mmalign.scoring import weights
from mmalign.scoring.chat import Chat
from mmalign.scoring.frames import reader
from mmalign.scoring.scorer import Card, Scorer
from mmalign.scoring.vlm import question_of, source_of
from mmalign.storage import read_json


class RewardScorer(Scorer):
    """A head on the hidden states of the card's `tokens`, x [N, tokens, outputs].

    axes: (x - mean) / std for each of the card's `axes`, one a token, and their sum
    gaussian: x = (mu, log sigma) of one token; the score is mu

    Attributes:
        chat: with a Qwen2-VL without its language-model head, whose tokenizer knows the tokens.
        head: the head's tensors; see `apply_head`.
        norm: mean and std of each axis, [2, axes]; None for gaussian.
    """

    def __init__(self, card: Card, device: str | torch.device):
        self.card, self.tokens, self.axes = card, card.score["tokens"], card.score.get("axes", ())
        self.question, self.read = question_of(card), reader(card)  # before gigabytes are fetched
        self.preparation = ("reward-vlm", card.judges, repr(card.preprocess))
        self.parts = tuple(self.axes) or ("sigma",)
        if any(self.question.count(token) != 1 for token in self.tokens):
            raise UserError(f"{card.folder / 'card.yaml'}: the question must hold each of {self.tokens} once.")
        self.chat, self.head, self.norm = build(card, device)
        self.dtype = str(self.chat.model.dtype).removeprefix("torch.")
        self.ids = torch.tensor(self.chat.processor.tokenizer.convert_tokens_to_ids(self.tokens), device=device)

    def prepare(self, medium: Any, *, condition: Sequence = (), name: str = "") -> Any:
        """The picture or frames, in the size that the card says."""
        return self.read(medium, name)

    def judge(self, prepared: Sequence[Any], prompts: Sequence[str]) -> dict[str, Tensor]:
        """See `Scorer.judge`; the axes, or sigma, under their names."""
        for prompt in prompts:
            if any(token in prompt for token in self.tokens):
                raise UserError(f"{prompt[:60]!r}: the prompt holds a special token of {self.card.name}; remove it.")
        contents = [[m, self.question.replace("{prompt}", p)] for m, p in zip(prepared, prompts, strict=True)]
        batch = self.chat.inputs(contents, do_resize="pixels" not in self.card.preprocess)
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)
        hidden = self.chat.model(**batch, position_ids=positions, use_cache=False).last_hidden_state
        asked = torch.isin(batch["input_ids"], self.ids)
        x = apply_head(self.head, hidden[asked].float()).unflatten(0, (len(prompts), -1))  # [N, tokens, outputs]
        if self.norm is None:
            return {"score": x[:, 0, 0], "sigma": x[:, 0, 1].exp()}
        mean, std = self.norm
        values = ((x.diagonal(dim1=1, dim2=2) if x.shape[2] > 1 else x[..., 0]) - mean) / std  # [N, axes]
        return {"score": values.sum(1), **dict(zip(self.axes, values.T, strict=True))}


def apply_head(head: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Linear layers with ReLU between them, from the tensors of a Sequential (`3.weight`) or of one layer."""
    names = sorted((name for name in head if name.endswith("weight")), key=lambda name: [len(name), name])
    for n, name in enumerate(names):
        x = F.linear(x.relu() if n else x, head[name], head.get(name.replace("weight", "bias")))
    return x


def load(card: Card, device: str | torch.device = "cpu") -> RewardScorer:
    """Builds the scorer of a card of family reward-vlm."""
    if card.score.get("formula") != ("axes" if "axes" in card.score else "gaussian"):
        raise UserError(f"{card.folder / 'card.yaml'}: score.formula must be gaussian, or axes with a list of `axes`.")
    return RewardScorer(card, device)


def build(card: Card, device: str | torch.device) -> tuple[Chat, dict[str, Tensor], Tensor | None]:
    """The `chat`, `head` and `norm` of a card.

    Raises:
        UserError: a file is missing, or does not fit the others.
    """
    from transformers import AutoConfig, AutoProcessor, Qwen2VLModel

    base, norm = source_of(card), None
    told = read_json(weights.find(card, card.model["config"])) if "config" in card.model else {}
    tensors = plain(weights.state_dict(card, card.weights), told.get("peft_lora_config", {}).get("lora_alpha", 0))
    head = {name[8:]: tensors.pop(name).float().to(device) for name in [*tensors] if name.startswith("rm_head.")}
    try:
        if axes := card.score.get("axes"):
            known = told["inference_config"]
            norm = torch.tensor([[known[f"{a}_{fact}"] for a in axes] for fact in ("mean", "std")], device=device)
        processor = AutoProcessor.from_pretrained(base, trust_remote_code=False)
        shape = AutoConfig.from_pretrained(base, trust_remote_code=False)
        shape.text_config.vocab_size = len(tensors["language_model.embed_tokens.weight"])
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        model, report = Qwen2VLModel.from_pretrained(
            None, config=shape, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
        if lost := sorted(report["missing_keys"] | report["unexpected_keys"] | (set() if head else {"rm_head"})):
            raise ValueError(f"{len(lost)} are on one side only, such as {lost[0]}")
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            f"{card.folder / 'card.yaml'}: {base} cannot be had, or the weights do not fit it "
            f"({str(error).strip().splitlines()[0]})."
        ) from error
    chat = Chat(model.to(device), processor, base)  # before the tokens are added: it refuses control tokens
    processor.tokenizer.add_tokens(card.score["tokens"], special_tokens=True)
    return chat, head, norm


def plain(tensors: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """A checkpoint of transformers 4 or 5, with or without PEFT's LoRA around it, as Qwen2VLModel has it, and the head.

    Args:
        tensors: `visual.*`, `model.*`, `lm_head.*` (left out) and `rm_head.*`, or PEFT's names for them.
        alpha: of the LoRA, which is merged: W + alpha / rank · B A.
    """
    tensors = {name.removeprefix("base_model.model."): value for name, value in tensors.items()}
    made = {}
    for name, value in tensors.items():
        if ".lora_" in name or name.startswith("lm_head."):
            continue
        down = tensors.get(name.replace("base_layer.weight", "lora_A.default.weight"), value)
        if down is not value:
            up = tensors[name.replace("base_layer.weight", "lora_B.default.weight")]
            value = (value.float() + alpha / len(down) * up.float() @ down.float()).to(value.dtype)
        name = re.sub(r"^model\.(?!visual\.|language_model\.)", "language_model.", name.replace(".base_layer.", "."))
        made[name.removeprefix("model.")] = value
    return made
