"""The clip family against the official HPSv2, and the properties every scorer must have."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from mmalign import bundled
from mmalign.records import UserError
from mmalign.scoring import Card, load_scorer
from mmalign.scoring.clip import read_text
from mmalign.scoring.head import KINDS, AspectHeads, make_head

GOLDEN = Path(__file__).parents[1] / "golden" / "scorers"
HPS = json.loads((GOLDEN / "hpsv2" / "golden.json").read_text())
PICTURES = sorted(HPS["scores_fp32_cpu"])
SLICES = np.load(GOLDEN / "hpsv2" / "pre_slices_stride8.npz")


def load(folder, **changes):
    """A tiny HPSv2 with some fields of its card changed."""
    card = {
        "name": "tiny-hps",
        "family": "clip",
        "model": {"open_clip_config": str(GOLDEN / "hpsv2" / "config.json")},
        "weights": {"file": str(GOLDEN / "hpsv2" / "model_fp16.safetensors")},
        "preprocess": {
            "size": 224,
            "resize": "long-side-pad",
            "interpolation": "bicubic-tensor",
            "antialias": True,
        },
        "score": {"formula": "cosine"},
    }
    (folder / "card.yaml").write_text(yaml.safe_dump(card | changes))
    return load_scorer(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load(tmp_path_factory.mktemp("tiny-hps"))


def picture(name):
    return Image.open(GOLDEN / "images" / name)


@pytest.mark.parametrize(("antialias", "key"), [(True, "scores_fp32_cpu"), (False, "scores_fp32_cpu_noantialias")])
def test_scores_equal_the_official_ones(tmp_path, antialias, key):
    pre = {"size": 224, "resize": "long-side-pad", "interpolation": "bicubic-tensor", "antialias": antialias}
    scorer = load(tmp_path, preprocess=pre)
    prompts = HPS["prompts"][:5]  # the sixth has special tokens in it, see below
    for name in PICTURES:
        ours = scorer.score([GOLDEN / "images" / name] * len(prompts), prompts)
        torch.testing.assert_close(ours, torch.tensor(HPS[key][name][:5]), atol=5e-7, rtol=0)


def test_tokens_equal_the_official_ones(tiny):
    assert tiny.tokenizer(HPS["prompts"]).tolist() == HPS["token_ids"]


@pytest.mark.parametrize(
    ("prompt", "cut"),
    [
        (HPS["prompts"][5], ""),
        ("a photo <end_of_text> of a cat", "a photo"),
        ("a photo &lt;END_OF_TEXT&gt; of a cat", "a photo"),
        ("<end_of_text>", ""),
    ],
)
def test_a_special_token_in_a_prompt_does_not_end_it(tiny, prompt, cut):
    media = [picture("square_224.png")] * 2
    scores = tiny.score(media, [prompt, cut])
    assert abs(scores[0] - scores[1]) > 1e-4


@pytest.mark.parametrize("name", [*PICTURES, "rgba_240x180.png"])
def test_pixels_equal_the_official_ones(tiny, name):
    pixels = tiny.preprocess(picture(name))
    assert pixels.shape == (3, 224, 224)
    np.testing.assert_allclose(pixels[:, ::8, ::8], SLICES[name][:3], atol=2e-6)


def test_a_long_side_of_the_right_size_is_padded_too(tiny):
    pixels = tiny.preprocess(Image.new("RGB", (224, 160), "white"))
    assert pixels.shape == (3, 224, 224)
    assert pixels[0, 0, 0] < 0 < pixels[0, 112, 112]


def test_scores_do_not_depend_on_the_batch(tiny):
    media = [GOLDEN / "images" / name for name in PICTURES]
    prompts = [HPS["prompts"][i % 4] for i in range(len(media))]
    together = tiny.score(media, prompts, batch_size=7)
    apart = torch.cat([tiny.score([m], [p]) for m, p in zip(media, prompts, strict=True)])
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=0)
    order = [3, 0, 6, 1, 5, 2, 4]
    shuffled = tiny.score([media[i] for i in order], [prompts[i] for i in order], batch_size=3)
    torch.testing.assert_close(shuffled, together[order], atol=1e-6, rtol=0)
    assert together.dtype == torch.float32
    assert tiny.score([], []).shape == (0,)


def test_padding_is_not_read_and_does_not_matter(tiny):
    prompts = ["a fox", "a red fox by the river", HPS["prompts"][0], "fox " * 200]
    for some in (prompts[:2], prompts[:3], prompts):
        tokens = tiny.tokens(some)
        lengths = []
        with (
            torch.no_grad(),
            tiny.model.token_embedding.register_forward_hook(
                lambda layer, given, out, n=lengths: n.append(out.shape[1])
            ),
        ):
            torch.testing.assert_close(read_text(tiny.model, tokens), tiny.model.encode_text(tokens), atol=1e-6, rtol=0)
        assert lengths == [int((tokens != 0).sum(1).max()), 77]


def test_each_prompt_is_encoded_once(tmp_path):
    scorer = load(tmp_path)
    seen = []
    scorer.model.token_embedding.register_forward_hook(lambda layer, given, out: seen.append(len(given[0])))
    scorer.score([picture("square_224.png")] * 4, ["a", "b", "a", "a"], batch_size=2)
    scorer.score([picture("small_100x60.png")], ["b"])
    assert sum(seen) == 2


def test_gradients_reach_the_pixels(tiny):
    pixels = torch.rand(2, 3, 60, 90, requires_grad=True)
    tiny.score([picture("square_224.png")], ["a cat"])  # an embedding remembered from inference serves here too
    scores = tiny.score_tensor(pixels, ["a cat", "a dog"])
    scores.sum().backward()
    assert pixels.grad.abs().sum(dim=(1, 2, 3)).min() > 0


def test_tensor_path_equals_the_picture_path(tiny):
    image = picture("landscape_320x200.png").convert("RGB")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    torch.testing.assert_close(tiny.score_tensor(pixels, ["a cat"]), tiny.score([image], ["a cat"]), atol=1e-6, rtol=0)


def test_formulas(tmp_path, tiny):
    media, prompts = [picture(name) for name in PICTURES], ["a photo of a cat"] * len(PICTURES)
    cosine = tiny.score(media, prompts)
    scaled = load(tmp_path, score={"formula": "cosine-logit-scale"}).score(media, prompts)
    torch.testing.assert_close(scaled, cosine * tiny.model.logit_scale.exp(), rtol=1e-5, atol=1e-6)
    clipped = load(tmp_path, score={"formula": "clipscore", "prefix": "a photo of a "})
    torch.testing.assert_close(clipped.score(media, ["cat"] * len(media)), 2.5 * cosine.clamp(min=0))


@pytest.mark.parametrize("pre", [{"resize": "long-side-pad", "interpolation": "bicubic-tensor"}, {}])
def test_odd_pictures_score(tmp_path, pre):
    scorer = load(tmp_path, preprocess={"size": 224, **pre})
    media = [picture("rgba_240x180.png"), picture("palette_240x180.png"), picture("gray_L_240x180.png")]
    media += [Image.new("RGB", size, "teal") for size in ((300, 1), (1, 9000), (1, 1), (5000, 4000))]
    scores = scorer.score(media, ["a cat"] * len(media))
    assert scores.isfinite().all()
    assert len(scores.unique()) > 3


def test_transparency_is_white(tiny):
    clear = Image.new("RGBA", (60, 60), (255, 0, 0, 0))
    scores = tiny.score([clear, Image.new("RGB", (60, 60), "white")], ["a cat"] * 2)
    assert scores[0] == scores[1]


# PickScore: the weights and the tokenizer of transformers


@pytest.fixture(scope="module")
def pickscore(tmp_path_factory):
    """A tiny PickScore in the hub's layout: its scorer, and transformers' own model and tokenizer."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("pickscore")
    official = SimpleTokenizer()
    vocabulary = {k.replace("<start_of_text>", "<|startoftext|>"): v for k, v in official.encoder.items()}
    vocabulary = {k.replace("<end_of_text>", "<|endoftext|>"): v for k, v in vocabulary.items()}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=list(official.bpe_ranks))
    tokenizer.save_pretrained(folder)
    tower = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 64}
    tower |= {"projection_dim": 12, "hidden_act": "gelu"}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 49408},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    model = CLIPModel(config).eval()
    for parameter in model.parameters():  # biases too, so that none may be lost
        torch.nn.init.normal_(parameter, std=0.2)
    model.logit_scale.data.fill_(4.6)
    model.save_pretrained(folder)
    ours = {
        "embed_dim": 12,
        "vision_cfg": {"layers": 2, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }
    (folder / "ours.json").write_text(json.dumps(ours))
    scorer = load(
        folder,
        model={"open_clip_config": "ours.json", "tokenizer": "."},
        weights={"file": "model.safetensors"},
        preprocess={"size": 32},
        score={"formula": "cosine-logit-scale"},
    )
    return scorer, model, tokenizer


def test_pickscore_equals_transformers(pickscore):
    scorer, model, tokenizer = pickscore
    prompts = HPS["prompts"][:5]
    for name in PICTURES:
        pixels = scorer.preprocess(picture(name))[None]
        texts = tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
        with torch.no_grad():
            image = model.get_image_features(pixels).pooler_output
            text = model.get_text_features(**texts).pooler_output
            cosine = torch.nn.functional.cosine_similarity(image, text)
        ours = scorer.score([picture(name)] * len(prompts), prompts)
        torch.testing.assert_close(ours, model.logit_scale.exp() * cosine, atol=1e-4, rtol=0)  # of about 100


def test_pickscore_tokens_are_those_of_transformers(pickscore):
    scorer, _, tokenizer = pickscore
    prompts = ["a &amp; b", "\u201chat\u201d \ufb01ne", "a  CAT", "word " * 100, ""]
    want = tokenizer(prompts, padding="max_length", truncation=True, max_length=77).input_ids
    assert scorer.tokenizer(prompts).tolist() == want


def test_a_special_token_of_transformers_does_not_end_a_prompt(pickscore):
    scores = pickscore[0].score([picture("square_224.png")] * 2, ["a photo <|endoftext|> of a cat", "a photo"])
    assert abs(scores[0] - scores[1]) > 1e-3


def test_a_tokenizer_that_is_missing(tmp_path):
    (tmp_path / "none").mkdir()
    model = {"open_clip_config": str(GOLDEN / "hpsv2" / "config.json"), "tokenizer": "none"}
    with pytest.raises(UserError, match="cannot load the tokenizer 'none'"):
        load(tmp_path, model=model)


# Heads


@pytest.mark.parametrize(("kind", "layers"), [("mlp", (0, 2, 4, 6, 7)), ("mlp-relu", (0, 3, 6, 9, 11))])
def test_laion_heads_judge_the_picture_alone(tmp_path, tiny, kind, layers):
    media = [picture(name) for name in PICTURES]
    x = tiny.features(media, ())[0]
    torch.manual_seed(0)
    tensors, sizes = {}, (x.shape[1], 1024, 128, 64, 16, 1)
    for i, layer in enumerate(layers):
        weight, bias = torch.randn(sizes[i + 1], sizes[i]) / sizes[i] ** 0.5, torch.randn(sizes[i + 1]) / 4
        tensors |= {f"layers.{layer}.weight": weight, f"layers.{layer}.bias": bias}
        x = x @ weight.T + bias
        x = x.relu() if kind == "mlp-relu" and i < 4 else x
    torch.save(tensors, tmp_path / "head.pth")
    scorer = load(tmp_path, score={"formula": "image-head", "head": {"file": "head.pth", "kind": kind}})
    torch.testing.assert_close(scorer.score(media, ["a cat"] * len(media)), x[:, 0], atol=1e-5, rtol=0)
    assert not scorer.texts  # no prompt was encoded


def test_a_head_of_another_kind_is_refused(tmp_path):
    torch.save(make_head("mlp", 32).state_dict(), tmp_path / "head.pth")
    with pytest.raises(UserError, match="kind must be one of linear, mlp"):
        load(tmp_path, score={"formula": "image-head", "head": {"file": "head.pth", "kind": "mpl"}})


TAPS = {"transformer.resblocks.0": 32}


@pytest.mark.parametrize("taps", [{}, TAPS])
@pytest.mark.parametrize("kind", KINDS)
def test_aspect_heads(tmp_path, tiny, kind, taps):
    names, width = ["prompt-following", "aesthetic"], tiny.model.visual.output_dim
    torch.manual_seed(0)
    heads = AspectHeads(names, 2 * width + 1 + 2 * sum(taps.values()), kind).eval()
    save_file(heads.state_dict(), tmp_path / "heads.safetensors")
    head = {"file": "heads.safetensors", "kind": kind, "names": names, "weights": {"aesthetic": 3}}
    scorer = load(tmp_path, score={"formula": "aspects", "taps": taps, "head": head})
    media, prompts = [picture(name) for name in PICTURES[:4]], ["a", "b", "c", "d"]
    parts = scorer.aspects(media, prompts)
    assert list(parts) == ["score", *scorer.parts] == ["score", *names]
    torch.testing.assert_close(parts["score"], (parts["prompt-following"] + 3 * parts["aesthetic"]) / 4)
    image, pooled = tiny.features(media, list(taps))
    text = tiny.embed(prompts)
    with torch.no_grad():
        want = heads(torch.cat([image, text, (image * text).sum(-1, keepdim=True), pooled], -1))
    torch.testing.assert_close(parts["aesthetic"], want["aesthetic"], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(scorer.aspects(media, prompts, batch_size=1), parts, atol=2e-6, rtol=1e-5)
    pixels = torch.rand(2, 3, 40, 40, requires_grad=True)
    scorer.score_tensor(pixels, ["a", "b"]).sum().backward()
    assert pixels.grad.isfinite().all()
    assert pixels.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ({"file": "card.yaml"}, "score.head.names must list"),
        ({"file": "card.yaml", "names": ["score"]}, "score.head.names must list"),
        ({"file": "card.yaml", "names": ["a"]}, "holds no weights that can be read safely"),
        ({"file": "heads.safetensors", "names": ["a"]}, r"heads\.safetensors of scorer 'tiny-hps' are missing: put"),
        ({"file": "x", "names": ["a"], "missing": "train it"}, "are missing: train it"),
    ],
)
def test_mistakes_in_aspect_heads(tmp_path, head, words):
    with pytest.raises(UserError, match=words):
        load(tmp_path, score={"formula": "aspects", "head": head})


@pytest.mark.slow
def test_a_full_hpsv2_in_its_official_layout(tmp_path):
    """ViT-H-14 of random weights: about 4 GB on the disk and 9 GB of memory."""
    from mmalign.scoring.clip import build

    card = Card.read(bundled("scorers") / "hpsv2.1")
    torch.manual_seed(0)
    state = build(card)[0].state_dict()
    assert sum(value.numel() for value in state.values()) == 986_109_441
    torch.save({"epoch": 0, "state_dict": state}, tmp_path / "w.pt")
    want = state["visual.proj"][:2, :3].clone()
    del state
    changes = {"model": card.model, "weights": {"file": "w.pt", "key": "state_dict"}, "preprocess": card.preprocess}
    scorer = load(tmp_path, **changes)
    assert torch.equal(scorer.model.visual.proj[:2, :3], want)
    media = [picture(name) for name in PICTURES[:2]]
    scores = scorer.score(media, ["a cat", "a dog"])
    assert scores.abs().max() <= 1
    torch.testing.assert_close(scorer.score(media[1:], ["a dog"])[0], scores[1], atol=1e-6, rtol=0)
    (tmp_path / "w.pt").unlink()
