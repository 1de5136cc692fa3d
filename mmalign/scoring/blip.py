"""Scorers on BLIP: ImageReward, and heads for several aspects in the manner of VP-Score.

The text encoder reads the prompt while it looks at the picture's 197 tokens; its first token is the feature that a
head judges by. Two layouts of weights are read: the official one (`blip.visual_encoder.*`, `blip.text_encoder.*`,
`mlp.layers.*`), and that of this module (`vision.*`, `text.*`, `mlp.*`).

Source: zai-org/ImageReward @ c1392c6, ImageReward.py and models/BLIP. Deviations: see `Preprocess` for pictures that
are not RGB; [DEC], [ENC] and other special tokens written out in a prompt are ordinary text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mmalign.records import UserError
from mmalign.scoring import weights
from mmalign.scoring.head import AspectHeads, load_aspects, make_head, with_mean
from mmalign.scoring.preprocess import PictureScorer
from mmalign.scoring.scorer import Card, nearest
from mmalign.storage import read_json

PROMPT_TOKENS = 35  # longer prompts are cut, as those that ImageReward was trained on

# official -> transformers; the order counts
RENAMED = (
    ("blip.visual_encoder.", "vision."),
    ("blip.text_encoder.", "text."),
    ("mlp.layers.", "mlp."),
    ("vision.cls_token", "vision.embeddings.class_embedding"),
    ("vision.pos_embed", "vision.embeddings.position_embedding"),
    ("vision.patch_embed.proj", "vision.embeddings.patch_embedding"),
    ("vision.blocks.", "vision.encoder.layers."),
    ("vision.norm.", "vision.post_layernorm."),
    (".attn.proj.", ".self_attn.projection."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
)


class BlipScorer(PictureScorer):
    """Judges the feature that BLIP makes of a picture and its prompt.

    mlp: (MLP(feature) - mean) / std · aspects: the mean of `AspectHeads`, each also a part of the judgement.
    """

    def __init__(self, card: Card, model: nn.ModuleDict, tokenizer: Callable, head: nn.Module, device):
        super().__init__(card, device)
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.head = head.to(self.device).eval().requires_grad_(False)
        self.parts = tuple(head.heads) if isinstance(head, AspectHeads) else ()

    def judge(self, prepared: Sequence[Tensor], prompts: Sequence[str]) -> dict[str, Tensor]:
        """See `Scorer.judge`."""
        judged, facts = self.head(self.aspect_features(prepared, prompts)), self.card.score
        if self.parts:
            return with_mean(judged, facts["head"].get("weights"))
        return {"score": (judged.squeeze(-1) - facts.get("mean", 0)) / facts.get("std", 1)}

    def aspect_features(self, prepared: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """What heads judge by: the text encoder's first token, [N, width]."""
        seen = self.model["vision"](torch.stack(list(prepared)).to(self.device)).last_hidden_state
        tokens = {name: value.to(self.device) for name, value in self.tokenizer(prompts, PROMPT_TOKENS).items()}
        read = self.model["text"](tokens["input_ids"], tokens["attention_mask"], encoder_hidden_states=seen)
        return read.last_hidden_state[:, 0]


def load(card: Card, device: str | torch.device = "cpu") -> BlipScorer:
    """Builds the scorer of a card of family blip."""
    formula, known = card.score.get("formula"), ("mlp", "aspects")
    if formula not in known:
        where = card.folder / "card.yaml"
        raise UserError(f"{where}: score.formula must be one of {', '.join(known)}{nearest(str(formula), known)}.")
    if formula == "aspects":  # first, as they are what may be missing
        weights.find(card, card.score.get("head") or {})
    tokenizer, model = weights.tokenizer(card), build(card)
    width = model["text"].config.hidden_size
    tensors = weights.state_dict(card, card.weights)
    # The projections of BLIP's training and old buffers are of no use here.
    kept = ("vision.", "text.", "mlp.")
    tensors = {weights.renamed(name, RENAMED): value for name, value in tensors.items() if "position_ids" not in name}
    tensors = {name: value for name, value in tensors.items() if name.startswith(kept)}
    mlp = {name.removeprefix("mlp."): tensors.pop(name) for name in list(tensors) if name.startswith("mlp.")}
    weights.fill(model, tensors, card)
    if formula == "aspects":
        return BlipScorer(card, model, tokenizer, load_aspects(card, width), device)
    head = make_head("mlp", width)
    weights.fill(head, mlp, card)
    return BlipScorer(card, model, tokenizer, head, device)


def build(card: Card) -> nn.ModuleDict:
    """The untrained `vision` and `text` encoders of a card.

    Its `model` has `vision`, the fields of transformers' BlipVisionConfig, and `text`, the file of BLIP's
    `med_config.json`.

    Raises:
        UserError: one of them is missing or wrong.
    """
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    try:
        # BLIP's vision transformer is timm's, whose small number is not transformers' default.
        vision = BlipVisionConfig(**{"layer_norm_eps": 1e-6, **card.model["vision"]})
        facts = read_json(weights.find(card, card.model["text"]))
        facts = {name: value for name, value in facts.items() if name not in ("architectures", "model_type")}
        # `is_decoder` makes the layers that look at the picture; the text is still read in both directions.
        text = BlipTextConfig(**facts | {"encoder_hidden_size": vision.hidden_size, "is_decoder": True})
        return nn.ModuleDict({"vision": BlipVisionModel(vision), "text": BlipTextModel(text, add_pooling_layer=False)})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{card.folder / 'card.yaml'}: model needs `vision`, fields of BlipVisionConfig, and `text`, the file of a "
            f"med_config.json; they make no BLIP ({type(error).__name__}: {error})."
        ) from error
