"""The clip family against the official HPSv2, and the properties every scorer must have."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from mmalign.scoring import load_scorer

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
    prompts = HPS["prompts"]
    for name in PICTURES:
        ours = scorer.score([GOLDEN / "images" / name] * len(prompts), prompts)
        torch.testing.assert_close(ours, torch.tensor(HPS[key][name]), atol=5e-7, rtol=0)


def test_tokens_equal_the_official_ones(tiny):
    assert tiny.tokenizer(HPS["prompts"]).tolist() == HPS["token_ids"]


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
    torch.testing.assert_close(together, apart, atol=2e-6, rtol=0)
    order = [3, 0, 6, 1, 5, 2, 4]
    shuffled = tiny.score([media[i] for i in order], [prompts[i] for i in order], batch_size=3)
    torch.testing.assert_close(shuffled, together[order], atol=2e-6, rtol=0)
    assert together.dtype == torch.float32
    assert tiny.score([], []).shape == (0,)


def test_each_prompt_is_encoded_once(tmp_path, monkeypatch):
    scorer = load(tmp_path)
    seen = []
    encode = scorer.model.encode_text
    monkeypatch.setattr(scorer.model, "encode_text", lambda tokens: seen.append(len(tokens)) or encode(tokens))
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


def test_clip_preprocessing_is_torchvisions(tmp_path):
    from torchvision import transforms as T

    pre = {"size": 64, "resize": "short-side-crop", "interpolation": "bicubic-pil"}
    ours = load(tmp_path, preprocess=pre).preprocess
    bicubic = T.InterpolationMode.BICUBIC
    steps = [
        T.Resize(64, interpolation=bicubic),
        T.CenterCrop(64),
        T.ToTensor(),
        T.Normalize(ours.mean, ours.std),
    ]
    for name in PICTURES:
        image = picture(name).convert("RGB")
        torch.testing.assert_close(ours(image), T.Compose(steps)(image), atol=1e-6, rtol=0)
