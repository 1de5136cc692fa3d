"""Scorers that are a CLIP: HPSv2, PickScore, CLIPScore, LAION's aesthetic predictor, and the embedded ones.

Source of the formulas: HPSv2 tgxs002/HPSv2 @ 866735e, img_score.py:76-81; PickScore yuvalkirstain/PickScore
@ f79607f, README.md; CLIPScore jmhessel/clipscore @ 1036465, clipscore.py; aesthetic
christophschuhmann/improved-aesthetic-predictor @ 6934dd8, simple_inference.py. The model itself is open_clip's, whose
keys and tokens are those of HPSv2; weights of transformers' CLIPModel are renamed.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmalign.records import UserError
from mmalign.scoring import weights
from mmalign.scoring.head import AspectHeads, PreferenceHead, load_aspects, make_head, pooled, tapped, with_mean
from mmalign.scoring.preprocess import PictureScorer
from mmalign.scoring.scorer import Card, nearest

MAX_MERGES = 2**24  # bytes; CLIP's own list has 3 million
REMEMBERED_PROMPTS = 4096  # best-of-N, pairs and validation ask for the same prompts again and again


class ClipScorer(PictureScorer):
    """Compares the embedding of a picture with that of its prompt.

    With image and text embeddings u and v of length 1, and s = exp(logit_scale), a score is
    cosine: u·v · cosine-logit-scale: s u·v · clipscore: 2.5 max(u·v, 0) · head: see `PreferenceHead` ·
    image-head: head(u), whatever the prompt · aspects: the mean of `AspectHeads`, each also a part of the judgement.
    """

    def __init__(self, card: Card, model: nn.Module, tokenizer: Callable, head: nn.Module | None, device):
        super().__init__(card, device)
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.head = head.to(self.device).eval().requires_grad_(False) if head else None
        if isinstance(head, AspectHeads):
            self.parts = tuple(head.heads)
        elif isinstance(head, PreferenceHead):
            self.parts = ("finish", "alignment")
        self.texts: dict[str, Tensor] = {}

    def judge(self, prepared: Sequence[Tensor], prompts: Sequence[str]) -> dict[str, Tensor]:
        """See `Scorer.judge`; a head also gives its terms, `finish` (picture alone) and `alignment` (to the prompt)."""
        formula = self.card.score["formula"]
        if formula == "aspects":
            return with_mean(self.head(self.aspect_features(prepared, prompts)), self.card.score["head"].get("weights"))
        image, layers = self.see(prepared, self.card.score.get("taps", ()) if formula == "head" else ())
        if formula == "image-head":
            return {"score": self.head(image).squeeze(-1)}
        cosine = (image * self.embed(prompts)).sum(-1)
        if formula == "head":
            finish, alignment = self.head(cosine, layers)
            return {"score": finish + alignment, "finish": finish, "alignment": alignment}
        return {"score": FORMULAS[formula](cosine, self.model.logit_scale)}

    def see(self, prepared: Sequence[Tensor], layers: Sequence[str] = ()) -> tuple[Tensor, list[Tensor]]:
        """Embeddings of length 1 [N, D] of prepared pictures, and the outputs of the tower's named layers."""
        image, outputs = tapped(self.model.visual, torch.stack(list(prepared)).to(self.device), layers)
        return F.normalize(image, dim=-1), outputs

    def aspect_features(self, prepared: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """What aspect heads judge by: both embeddings, their cosine, and the tapped layers pooled, [N, width]."""
        image, layers = self.see(prepared, self.card.score.get("taps", ()))
        text = self.embed(prompts)
        seen = [pooled(layers)] if layers else []
        return torch.cat([image, text, (image * text).sum(-1, keepdim=True), *seen], -1)

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
            image, outputs = self.see([self.prepare(media[i]) for i in rows], layers)
            embeddings.append(image)
            channels.append(pooled(outputs) if outputs else image[:, :0])
        return torch.cat(embeddings).cpu(), torch.cat(channels).cpu()

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """What the text tower reads of prompts, [N, L]."""
        prefix = self.card.score.get("prefix", "")
        return self.tokenizer([ordinary(prefix + prompt, self.tokenizer) for prompt in prompts]).to(self.device)

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings of length 1, [N, D]; each distinct prompt goes through the tower once."""
        if len(self.texts) > REMEMBERED_PROMPTS:
            self.texts.clear()
        new = [p for p in dict.fromkeys(prompts) if p not in self.texts]
        # Outside inference mode, so that the remembered embeddings may serve `score_tensor` as well.
        with torch.inference_mode(False), torch.no_grad():
            for start in range(0, len(new), 64):
                some = new[start : start + 64]
                self.texts.update(zip(some, F.normalize(read_text(self.model, self.tokens(some)), dim=-1), strict=True))
        return torch.stack([self.texts[p] for p in prompts])


def read_text(model: nn.Module, tokens: Tensor) -> Tensor:
    """`model.encode_text` of tokens [N, L], no further than to the last end of text: nothing before sees the rest."""
    if getattr(model, "text_pool_type", "") != "argmax" or getattr(model, "attn_mask", None) is None:
        return model.encode_text(tokens)
    ends = tokens.argmax(-1)
    length = int(ends.max()) + 1
    x = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    x, projection = x[torch.arange(len(x), device=x.device), ends], model.text_projection
    return projection(x) if isinstance(projection, nn.Module) else x if projection is None else x @ projection


FORMULAS = {
    "cosine": lambda cosine, logit_scale: cosine,
    "cosine-logit-scale": lambda cosine, logit_scale: logit_scale.exp() * cosine,
    "clipscore": lambda cosine, logit_scale: 2.5 * cosine.clamp(min=0),
}


# transformers' CLIPModel -> open_clip; the order counts
RENAMED = (
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
    ("text_model.encoder.layers.", "transformer.resblocks."),
    ("vision_model.embeddings.patch_embedding", "visual.conv1"),
    ("vision_model.embeddings.", "visual."),
    ("text_model.embeddings.", ""),
    ("text_model.final_layer_norm", "ln_final"),
    ("vision_model.pre_layrnorm", "visual.ln_pre"),
    ("vision_model.post_layernorm", "visual.ln_post"),
    ("position_embedding.weight", "positional_embedding"),
    ("visual_projection.weight", "visual.proj"),
    ("text_projection.weight", "text_projection"),
    ("self_attn.", "attn."),
    ("layer_norm", "ln_"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("attn.q_proj.", "attn.in_proj_"),
)


def from_transformers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIPModel's tensors under open_clip's names: query, key and value in one, projections the other way round."""
    found = {}
    for name, value in tensors.items():
        if "q_proj" in name:
            value = torch.cat([tensors[name.replace("q_proj", one)] for one in ("q_proj", "k_proj", "v_proj")])
        if name.endswith("_projection.weight"):
            value = value.T
        if not re.search(r"k_proj|v_proj|position_ids$", name):
            found[weights.renamed(name, RENAMED)] = value
    return found


def ordinary(prompt: str, tokenizer: Callable) -> str:
    """Breaks up special tokens that open_clip would find in a prompt, as what follows <end_of_text> goes unread."""
    cleaned = tokenizer.clean_fn(prompt) if hasattr(tokenizer, "clean_fn") else prompt  # which also undoes &lt; and ＜
    broken = re.sub("<(start|end)_of_text>", r"< \1_of_text>", cleaned)
    return prompt if broken == cleaned else broken


def load(card: Card, device: str | torch.device = "cpu") -> ClipScorer:
    """Builds the scorer of a card of family clip."""
    formula, known = card.score.get("formula"), (*FORMULAS, "head", "image-head", "aspects")
    if formula not in known:
        where = card.folder / "card.yaml"
        raise UserError(f"{where}: score.formula must be one of {', '.join(known)}{nearest(str(formula), known)}.")
    if formula not in FORMULAS:  # what may be missing is looked for before anything large is built
        weights.find(card, card.score.get("head") or {})
    tensors = weights.state_dict(card, card.weights)
    model, tokenizer = build(card)
    head = None if formula in FORMULAS else load_head(card, model)
    weights.fill(model, from_transformers(tensors) if "visual_projection.weight" in tensors else tensors, card)
    return ClipScorer(card, model, tokenizer, head, device)


def load_head(card: Card, model: nn.Module) -> nn.Module:
    """The head of a card's `score`."""
    taps, width = card.score.get("taps", {}), model.visual.output_dim
    if card.score["formula"] == "aspects":
        return load_aspects(card, 2 * width + 1 + 2 * sum(taps.values()))
    facts = card.score.get("head") or {}
    image_head = card.score["formula"] == "image-head"
    head = make_head(facts.get("kind", "linear"), width) if image_head else PreferenceHead(taps)
    tensors = {name.removeprefix("layers."): value for name, value in weights.state_dict(card, facts).items()}
    weights.fill(head, tensors, card)
    return head


def _merges(path: Path) -> str:
    """The file's name, once it is known to unpack, and to no more than `MAX_MERGES`."""
    try:
        with gzip.open(path) as file:
            if len(file.read(MAX_MERGES + 1)) <= MAX_MERGES:
                return str(path)
        reason = f"more than {MAX_MERGES:,} bytes"
    except (OSError, EOFError, zlib.error) as error:
        reason = str(error)
    raise UserError(f"{path}: is no gzipped list of merges ({reason}); mend the file that the card names.")


def build(card: Card) -> tuple[nn.Module, Callable]:
    """The untrained model of a card and its tokenizer (list of prompts -> [N, L] token ids)."""
    import open_clip

    name, where = card.model.get("open_clip"), card.folder / "card.yaml"
    if name:
        if name not in open_clip.list_models():
            raise UserError(f"{where}: open_clip has no model {name!r}{nearest(name, open_clip.list_models())}.")
        model, tokenizer = open_clip.create_model(name, load_weights=False), open_clip.get_tokenizer(name)
    else:
        if "open_clip_config" not in card.model:
            raise UserError(f"{where}: model needs `open_clip: NAME` or `open_clip_config: FILE`.")
        path = card.path(card.model["open_clip_config"])
        if not path.is_file():
            raise UserError(f"{where}: the model's configuration {path} is missing.")
        model = open_clip.CLIP(**json.loads(path.read_text()))
        merges = card.model.get("merges")  # a shortened list of CLIP's byte pair merges, gzipped
        files = {"bpe_path": _merges(card.path(merges))} if merges else {}
        tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length, **files)
    if "tokenizer" in card.model:  # transformers', which reads some text otherwise than open_clip's
        read = weights.tokenizer(card)
        return model, lambda prompts: read(prompts, model.context_length)["input_ids"]
    return model, tokenizer
