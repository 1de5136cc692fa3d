"""Scorers that are a CLIP: HPSv2, CLIPScore, and the embedded ones.

Source of the formulas: HPSv2 tgxs002/HPSv2 @ 866735e, img_score.py:76-81; CLIPScore jmhessel/clipscore
@ 1036465, clipscore.py. The model itself is open_clip's, whose keys and tokens are those of HPSv2.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmalign.records import UserError, open_image
from mmalign.scoring import weights
from mmalign.scoring.head import PreferenceHead, tapped
from mmalign.scoring.preprocess import Preprocess
from mmalign.scoring.scorer import Card, Scorer, nearest

REMEMBERED_PROMPTS = 4096  # best-of-N, pairs and validation ask for the same prompts again and again


class ClipScorer(Scorer):
    """Compares the embedding of a picture with that of its prompt.

    With image and text embeddings u and v of length 1, and s = exp(logit_scale), a score is
    cosine: u·v · cosine-logit-scale: s u·v · clipscore: 2.5 max(u·v, 0) · head: see `PreferenceHead`.
    """

    def __init__(self, card: Card, model: nn.Module, tokenizer: Callable, head: PreferenceHead | None, device):
        self.card, self.device = card, torch.device(device)
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.head = head.to(self.device).eval().requires_grad_(False) if head else None
        self.preprocess = Preprocess.from_card(card.preprocess, f"{card.folder / 'card.yaml'}")
        self.preparation = self.preprocess
        self.texts: dict[str, Tensor] = {}

    def prepare(self, medium: Any, *, condition: Sequence = (), name: str = "") -> Tensor:
        """[3, size, size] of a picture."""
        return self.preprocess(open_image(medium, name=name))

    def score_tensor(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `Scorer.score_tensor`."""
        return self.judge([self.preprocess.tensor(one) for one in pixels.to(self.device)], prompts)["score"]

    def judge(self, prepared: Sequence[Tensor], prompts: Sequence[str]) -> dict[str, Tensor]:
        """See `Scorer.judge`; a head also gives its terms, `finish` (picture alone) and `alignment` (to the prompt)."""
        pixels = torch.stack(list(prepared)).to(self.device)
        taps = self.head.taps if self.head else ()
        image, features = tapped(self.model.visual, pixels, taps)
        cosine = (F.normalize(image, dim=-1) * self.embed(prompts)).sum(-1)
        formula = self.card.score["formula"]
        if self.head:
            finish, alignment = self.head(cosine, features)
            return {"score": finish + alignment, "finish": finish, "alignment": alignment}
        return {"score": FORMULAS[formula](cosine, self.model.logit_scale)}

    @torch.no_grad()
    def features(self, media: Sequence, layers: Sequence[str], *, batch_size: int = 32) -> tuple[Tensor, Tensor]:
        """What the image tower sees, before anything is compared with a prompt.

        Args:
            media: N pictures.
            layers: names of the tower's layers, whose outputs are [N, C, H, W] or [N, L, C].
            batch_size: how many go through at once.

        Returns:
            Embeddings of length 1 [N, D]; mean and deviation over the picture of each channel of the layers [N, F].
        """
        embeddings, channels = [], []
        for start in range(0, len(media), batch_size):
            rows = range(start, min(start + batch_size, len(media)))
            pixels = torch.stack([self.prepare(media[i]) for i in rows]).to(self.device)
            image, outputs = tapped(self.model.visual, pixels, layers)
            embeddings.append(F.normalize(image, dim=-1))
            flat = [output.flatten(2) if output.ndim == 4 else output.transpose(1, 2) for output in outputs]
            pooled = [part for value in flat for part in (value.mean(-1), value.std(-1, unbiased=False))]
            channels.append(torch.cat([pixels.new_zeros(len(pixels), 0), *pooled], -1))
        return torch.cat(embeddings).cpu(), torch.cat(channels).cpu()

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings of length 1, [N, D]; each distinct prompt goes through the tower once."""
        if len(self.texts) > REMEMBERED_PROMPTS:
            self.texts.clear()
        new = [p for p in dict.fromkeys(prompts) if p not in self.texts]
        prefix = self.card.score.get("prefix", "")
        # Outside inference mode, so that the remembered embeddings may serve `score_tensor` as well.
        with torch.inference_mode(False), torch.no_grad():
            for start in range(0, len(new), 64):
                some = new[start : start + 64]
                tokens = self.tokenizer([prefix + p for p in some]).to(self.device)
                self.texts.update(zip(some, F.normalize(self.model.encode_text(tokens), dim=-1), strict=True))
        return torch.stack([self.texts[p] for p in prompts])


FORMULAS = {
    "cosine": lambda cosine, logit_scale: cosine,
    "cosine-logit-scale": lambda cosine, logit_scale: logit_scale.exp() * cosine,
    "clipscore": lambda cosine, logit_scale: 2.5 * cosine.clamp(min=0),
}


def load(card: Card, device: str | torch.device = "cpu") -> ClipScorer:
    """Builds the scorer of a card of family clip."""
    where = card.folder / "card.yaml"
    formula = card.score.get("formula")
    if formula != "head" and formula not in FORMULAS:
        known = (*FORMULAS, "head")
        raise UserError(f"{where}: score.formula must be one of {', '.join(known)}{nearest(str(formula), known)}.")
    model, tokenizer = build(card)
    weights.fill(model, weights.state_dict(card, card.weights), card)
    head = None
    if formula == "head":
        tensors = weights.state_dict(card, card.score.get("head") or {})
        head = PreferenceHead(card.score["taps"])
        weights.fill(head, tensors, card)
    return ClipScorer(card, model, tokenizer, head, device)


def build(card: Card) -> tuple[nn.Module, Callable]:
    """The untrained model of a card and its tokenizer (list of prompts -> [N, L] token ids)."""
    import open_clip

    name, where = card.model.get("open_clip"), card.folder / "card.yaml"
    if name:
        if name not in open_clip.list_models():
            raise UserError(f"{where}: open_clip has no model {name!r}{nearest(name, open_clip.list_models())}.")
        return open_clip.create_model(name, load_weights=False), open_clip.get_tokenizer(name)
    if "open_clip_config" not in card.model:
        raise UserError(f"{where}: model needs `open_clip: NAME` or `open_clip_config: FILE`.")
    path = card.path(card.model["open_clip_config"])
    if not path.is_file():
        raise UserError(f"{where}: the model's configuration {path} is missing.")
    config = json.loads(path.read_text())
    merges = card.model.get("merges")  # a shortened list of CLIP's byte pair merges, gzipped
    files = {"bpe_path": str(card.path(merges))} if merges else {}
    tokenizer = open_clip.SimpleTokenizer(**files)
    length = config["text_cfg"].get("context_length", 77)
    return open_clip.CLIP(**config), partial(tokenizer, context_length=length)
