"""A user's embedding from a few preference pairs: their taste as a frozen model sees it (PPD, arXiv 2501.06655).

The paper takes hidden states of LLaVA-OneVision over four pairs; which layer and which pooling is not published, so
both are fields here. Where no vision-language model is at hand, an image-text encoder compares the two pictures of each
pair. Both look at one pair at a time and average, so the order of the pairs does not matter; which picture was chosen
is said by the scores, so neither does the order inside a pair.

Shapes: K pairs, D features of an embedding, L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from mmalign.records import Comparison, UserError, open_image


class Encoder(Protocol):
    """What a frozen model makes of one preference.

    Attributes:
        facts: what has to agree for two embeddings to be comparable.
    """

    facts: Mapping[str, Any]

    def __call__(self, prompt: str, chosen: Any, rejected: Any) -> Tensor:
        """[D] of two RGB pictures."""
        ...


@torch.no_grad()
def embed(pairs: Sequence[Comparison], encoder: Encoder) -> Tensor:
    """A user's embedding: the mean over their pairs, brought to a root mean square of 1.

    Args:
        pairs: K >= 1 comparisons of one user; of a list the best and the worst count.
        encoder: the same for all users that are to be compared or trained together.

    Returns:
        [D] float32.

    Raises:
        UserError: a picture cannot be read, or a user's pairs say nothing at all.
    """
    parts = []
    for item in pairs:
        best, worst = item.score.index(max(item.score)), item.score.index(min(item.score))
        chosen, rejected = (open_image(item.media[k], name=f"{item.id}[{k}]") for k in (best, worst))
        parts.append(encoder(item.prompt, chosen, rejected).float().cpu())
    return averaged(parts, pairs[0].id)


def averaged(parts: Sequence[Tensor], name: str) -> Tensor:
    """The mean of K choices [D] as an encoder sees them, brought to a root mean square of 1.

    Raises:
        UserError: they say nothing at all; it begins with `name`.
    """
    mean = torch.stack(list(parts)).double().mean(0)  # in float64 the order of the pairs leaves no trace in float32
    size = mean.square().mean().sqrt()
    if not torch.isfinite(size) or size == 0:
        raise UserError(f"{name}: the pictures of this user's pairs do not differ; give other pairs.")
    return (mean / size).float()


class PictureTower(Protocol):
    """What `PictureTaste` asks of an image-text encoder; mmalign.scoring's CLIP scorers are such."""

    def features(self, media: Sequence[Any], layers: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings of length 1 [N, E], and mean and deviation of each channel of some layers [N, F]."""
        ...

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings of length 1 [N, E]."""
        ...


@dataclass(frozen=True)
class PictureTaste:
    """What sets the chosen picture apart from the other, as an image-text encoder sees the two.

    D = F + E + 1: the relative difference (c - r) / (|c| + |r|) of each channel's mean and deviation in early layers,
    where colour, contrast and light are; the difference of the embeddings, where the content is; and by how much more
    the chosen picture follows the prompt.

    Attributes:
        tower: the encoder.
        name: of the encoder, for the record.
        layers: of the image tower.
    """

    tower: PictureTower
    name: str
    layers: tuple[str, ...] = ("act1", "act3", "layer1")

    @property
    def facts(self) -> dict[str, Any]:
        """See `Encoder`."""
        return {"encoder": self.name, "layers": list(self.layers)}

    def __call__(self, prompt: str, chosen: Any, rejected: Any) -> Tensor:
        """[D]; the negative of what it would be had the other been chosen."""
        embedding, channels = self.tower.features([chosen, rejected], self.layers)
        look = (channels[0] - channels[1]) / (channels[0].abs() + channels[1].abs()).clamp(min=1e-6)
        content = embedding[0] - embedding[1]
        return torch.cat([look, content, (self.tower.embed([prompt]).to(content) @ content)])


@dataclass(frozen=True)
class LanguageTaste:
    """Hidden states of a frozen vision-language model that is shown a preference.

    Attributes:
        model: of transformers, for image and text to text.
        processor: its own.
        name: of the model, for the record.
        layer: whose hidden states; None for the middle one, negative ones count from the last.
        pooling: mean over all tokens, or the last token, which has seen all others.
    """

    model: Any
    processor: Any
    name: str
    layer: int | None = None
    pooling: Literal["mean", "last"] = "mean"
    question: str = "Describe the taste of the person who preferred the first picture to the second."

    @property
    def facts(self) -> dict[str, Any]:
        """See `Encoder`."""
        return {"encoder": self.name, "layer": self.layer, "pooling": self.pooling, "question": self.question}

    def __call__(self, prompt: str, chosen: Any, rejected: Any) -> Tensor:
        """[D], D the model's hidden size."""
        content = [
            {"type": "text", "text": f"A person asked for: {prompt}\nPreferred:"},
            {"type": "image", "image": chosen},
            {"type": "text", "text": "Not preferred:"},
            {"type": "image", "image": rejected},
            {"type": "text", "text": self.question},
        ]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device)
        states = self.model(**inputs, output_hidden_states=True).hidden_states
        layer = len(states) // 2 if self.layer is None else self.layer
        if not -len(states) <= layer < len(states):
            raise UserError(f"layer {layer}: {self.name} has the layers 0 to {len(states) - 1}.")
        return states[layer][0].float().mean(0) if self.pooling == "mean" else states[layer][0, -1].float()


def load_language_taste(
    source: str | Path, layer: int | None = None, pooling: Literal["mean", "last"] = "mean", dtype: Any = None
) -> LanguageTaste:
    """A frozen vision-language model of transformers (LLaVA-OneVision, Qwen2-VL ...) as an encoder of tastes.

    Args:
        source: folder or hub id.
        layer: see `LanguageTaste`.
        pooling: see `LanguageTaste`.
        dtype: of the weights; default bfloat16 on an accelerator, else float32.

    Raises:
        UserError: it cannot be loaded.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
    try:
        processor = AutoProcessor.from_pretrained(str(source), trust_remote_code=False)
        model = AutoModelForImageTextToText.from_pretrained(str(source), dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{source}: is no vision-language model ({str(error).splitlines()[0]}).") from error
    return LanguageTaste(model.to(device).eval().requires_grad_(False), processor, Path(source).name, layer, pooling)
