"""The blip family against the official ImageReward."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from mmalign import bundled
from mmalign.records import UserError
from mmalign.scoring import Card, load_scorer
from mmalign.scoring.blip import build
from mmalign.scoring.head import KINDS, AspectHeads, make_head

GOLDEN = Path(__file__).parents[1] / "golden" / "scorers"
OFFICIAL = GOLDEN / "imagereward"
GOLD = json.loads((OFFICIAL / "golden.json").read_text())
RESIZED_BEFORE_RGB = ["palette_240x180.png", "rgba_240x180.png"]  # by the official code alone
PICTURES = sorted(set(GOLD["scores"]) - set(RESIZED_BEFORE_RGB))
NAMES = ["prompt-following", "aesthetic", "fidelity", "harmlessness"]


def load(folder, **changes):
    """A tiny ImageReward with some fields of its card changed."""
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    card = {
        "name": "tiny-reward",
        "family": "blip",
        "model": {
            "vision": {**vision, "image_size": 224, "patch_size": 16},
            "text": {"file": str(OFFICIAL / "med_config.json")},
            "tokenizer": str(OFFICIAL / "vocab.txt"),
        },
        "weights": {"file": str(OFFICIAL / "model_fp16.safetensors")},
        "score": {"formula": "mlp", "mean": 0.16717362830052426, "std": 1.0333394966054072},
    }
    for name, value in changes.items():
        card[name] = card[name] | value if name == "model" else value
    (folder / "card.yaml").write_text(yaml.safe_dump(card))
    return load_scorer(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load(tmp_path_factory.mktemp("tiny-reward"))


def paths(names=PICTURES):
    return [GOLDEN / "images" / name for name in names]


@pytest.mark.parametrize("name", PICTURES)
def test_scores_equal_the_official_ones(tiny, name):
    ours = tiny.score(paths([name]) * 5, GOLD["prompts"])
    torch.testing.assert_close(ours, torch.tensor(GOLD["scores"][name]), atol=5e-6, rtol=0)


@pytest.mark.parametrize("name", RESIZED_BEFORE_RGB)
def test_the_official_order_is_the_only_difference(tiny, name):
    from torchvision import transforms as T

    steps = [T.Resize(224, T.InterpolationMode.BICUBIC), T.CenterCrop(224), lambda p: p.convert("RGB"), T.ToTensor()]
    pixels = tiny.preprocess.normalise(T.Compose(steps)(Image.open(GOLDEN / "images" / name)))
    with torch.no_grad():
        official = tiny.judge([pixels] * 5, GOLD["prompts"])["score"]
    torch.testing.assert_close(official, torch.tensor(GOLD["scores"][name]), atol=5e-6, rtol=0)
    ours = tiny.score(paths([name]) * 5, GOLD["prompts"])
    assert (ours - official).abs().max() > 1e-3


def test_tokens_equal_the_official_ones(tiny):
    tokens = tiny.tokenizer(GOLD["prompts"], 35)
    assert tokens["input_ids"].tolist() == GOLD["token_ids"]
    assert tokens["attention_mask"].tolist() == GOLD["attention_mask"]


@pytest.mark.parametrize("token", ["[SEP]", "[PAD]", "[CLS]", "[DEC]"])
def test_a_special_token_in_a_prompt_is_text(tiny, token):
    ids = tiny.tokenizer([f"a cat {token} a dog"], 35)["input_ids"][0].tolist()
    assert ids.count(2) == ids.count(3) == 1  # one [CLS], one [SEP]
    assert ids.index(3) == len([i for i in ids if i]) - 1


def test_scores_do_not_depend_on_the_batch(tiny):
    prompts = [GOLD["prompts"][i % 5] for i in range(len(PICTURES))]
    together = tiny.score(paths(), prompts)
    apart = torch.cat([tiny.score([m], [p]) for m, p in zip(paths(), prompts, strict=True)])
    torch.testing.assert_close(together, apart, atol=5e-6, rtol=0)
    order = [3, 0, 5, 1, 4, 2]
    shuffled = tiny.score([paths()[i] for i in order], [prompts[i] for i in order], batch_size=4)
    torch.testing.assert_close(shuffled, together[order], atol=5e-6, rtol=0)


def test_odd_pictures_score(tiny):
    media = [*paths(RESIZED_BEFORE_RGB), Image.new("L", (300, 1), 90), Image.new("RGB", (5000, 4000), "teal")]
    assert tiny.score(media, ["a cat"] * len(media)).isfinite().all()


def test_gradients_reach_the_pixels(tiny):
    pixels = torch.rand(2, 3, 60, 90, requires_grad=True)
    tiny.score_tensor(pixels, ["a cat", "a dog"]).sum().backward()
    assert pixels.grad.abs().sum(dim=(1, 2, 3)).min() > 0
    square = torch.from_numpy(np.array(Image.open(GOLDEN / "images" / "square_224.png"))).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        torch.testing.assert_close(
            tiny.score_tensor(square, ["a cat"]), tiny.score(paths(["square_224.png"]), ["a cat"])
        )


def test_the_official_file(tmp_path, tiny):
    tensors = load_file(OFFICIAL / "model_fp16.safetensors")
    # What a checkpoint of BLIP's may hold besides, and a strict=False passed over.
    tensors |= {"blip.text_encoder.embeddings.position_ids": torch.arange(64)[None], "blip.temp": torch.ones(())}
    torch.save(tensors, tmp_path / "ImageReward.pt")
    scorer = load(tmp_path, weights={"file": "ImageReward.pt"})
    assert torch.equal(scorer.score(paths(), ["a cat"] * 6), tiny.score(paths(), ["a cat"] * 6))


def test_our_own_layout(tmp_path, tiny):
    tensors = {**tiny.model.state_dict(), **{f"mlp.{name}": value for name, value in tiny.head.state_dict().items()}}
    save_file(tensors, tmp_path / "ours.safetensors")
    scorer = load(tmp_path, weights={"file": "ours.safetensors"})
    assert torch.equal(scorer.score(paths(), ["a cat"] * 6), tiny.score(paths(), ["a cat"] * 6))


@pytest.mark.parametrize("lost", ["blip.visual_encoder.norm.bias", "mlp.layers.7.weight"])
def test_a_tensor_that_is_missing(tmp_path, lost):
    tensors = load_file(OFFICIAL / "model_fp16.safetensors")
    save_file({name: value for name, value in tensors.items() if name != lost}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="do not fit its model: missing"):
        load(tmp_path, weights={"file": "w.safetensors"})


def test_the_tokenizer_of_a_folder(tmp_path, tiny):
    from transformers import BertTokenizer

    BertTokenizer(vocab=str(OFFICIAL / "vocab.txt")).save_pretrained(tmp_path / "bert")
    scorer = load(tmp_path, model={"tokenizer": "bert"})
    assert scorer.tokenizer(GOLD["prompts"], 35)["input_ids"].tolist() == GOLD["token_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_aspects_are_heads_on_one_feature(tmp_path, tiny, kind):
    torch.manual_seed(0)
    heads = AspectHeads(NAMES, 48, kind).eval()
    save_file(heads.state_dict(), tmp_path / "heads.safetensors")
    head = {"file": "heads.safetensors", "kind": kind, "names": NAMES, "weights": {"fidelity": 0}}
    scorer = load(tmp_path, score={"formula": "aspects", "head": head})
    parts = scorer.aspects(paths(), ["a cat"] * 6)
    assert list(parts) == ["score", *scorer.parts] == ["score", *NAMES]
    counted = [parts[name] for name in NAMES if name != "fidelity"]
    torch.testing.assert_close(parts["score"], torch.stack(counted).mean(0))
    with torch.no_grad():
        features = tiny.aspect_features([tiny.prepare(path) for path in paths()], ["a cat"] * 6)
        torch.testing.assert_close(parts["aesthetic"], heads(features)["aesthetic"])


def test_imagereward_is_one_such_head(tmp_path, tiny):
    heads = AspectHeads(["reward"], 48, "mlp")
    heads.heads["reward"].load_state_dict(tiny.head.state_dict())
    save_file(heads.state_dict(), tmp_path / "heads.safetensors")
    head = {"file": "heads.safetensors", "kind": "mlp", "names": ["reward"]}
    scores = load(tmp_path, score={"formula": "aspects", "head": head}).score(paths(), ["a cat"] * 6)
    facts = tiny.card.score
    torch.testing.assert_close((scores - facts["mean"]) / facts["std"], tiny.score(paths(), ["a cat"] * 6))


def test_vp_score_has_no_weights():
    with pytest.raises(UserError, match=r"heads\.safetensors .* are missing: .*`mmalign train-scorer`"):
        load_scorer("vp-score")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"score": {"formula": "mpl"}}, "score.formula must be one of mlp, aspects; did you mean 'mlp'"),
        ({"model": {"vision": {"hidden_size": 33}}}, "they make no BLIP"),
        ({"model": {"text": {"file": "none.json"}}}, r"none\.json of scorer 'tiny-reward' are missing"),
        ({"model": {"tokenizer": "none.txt"}}, "cannot load the tokenizer 'none.txt'"),
    ],
)
def test_mistakes_in_a_card(tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        load(tmp_path, **changes)


@pytest.mark.slow
def test_a_full_imagereward_in_its_official_layout(tmp_path):
    """BLIP-large of random weights under the official names: 1.8 GB on the disk and 5 GB of memory."""
    card = Card.read(bundled("scorers") / "imagereward")
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    bert = {**sizes, "vocab_size": 30524, "max_position_embeddings": 512, "model_type": "bert", "encoder_width": 768}
    (tmp_path / "med_config.json").write_text(json.dumps(bert))
    model = {**card.model, "text": {"file": "med_config.json"}, "tokenizer": str(OFFICIAL / "vocab.txt")}
    (tmp_path / "card.yaml").write_text(yaml.safe_dump({"name": "x", "family": "blip", "model": model}))
    torch.manual_seed(0)
    state = build(Card.read(tmp_path)).state_dict()
    state |= {f"mlp.{name}": value for name, value in make_head("mlp", 768).state_dict().items()}
    names = {new: old for old, new in official_names(24)}
    official = {names.get(name, name.replace("text.", "blip.text_encoder.", 1)): value for name, value in state.items()}
    assert all(name.startswith(("blip.", "mlp.layers.")) for name in official)
    torch.save(official, tmp_path / "w.pt")
    del state, official
    scorer = load(tmp_path, model=model, weights={"file": "w.pt"}, score=card.score)
    scores = scorer.score(paths(PICTURES[:2]), ["a cat", "a dog"])
    torch.testing.assert_close(scorer.score(paths(PICTURES[1:2]), ["a dog"])[0], scores[1], atol=5e-6, rtol=0)
    (tmp_path / "w.pt").unlink()


def official_names(layers):
    """(official name, ours) of the picture's tower and the MLP, written out on their own."""
    pairs = {"cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding"}
    for end in ("weight", "bias"):
        pairs |= {
            f"patch_embed.proj.{end}": f"embeddings.patch_embedding.{end}",
            f"norm.{end}": f"post_layernorm.{end}",
        }
        for i in range(layers):
            for old, new in {
                "norm1": "layer_norm1",
                "norm2": "layer_norm2",
                "attn.qkv": "self_attn.qkv",
                "attn.proj": "self_attn.projection",
                "mlp.fc1": "mlp.fc1",
                "mlp.fc2": "mlp.fc2",
            }.items():
                pairs[f"blocks.{i}.{old}.{end}"] = f"encoder.layers.{i}.{new}.{end}"
        for i in (0, 2, 4, 6, 7):
            yield f"mlp.layers.{i}.{end}", f"mlp.{i}.{end}"
    yield from ((f"blip.visual_encoder.{old}", f"vision.{new}") for old, new in pairs.items())
