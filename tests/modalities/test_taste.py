"""Embeddings of users: the order of the pairs leaves no trace, and different tastes look different."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import mmalign
from mmalign.embedded.scenes import random_scenes, render
from mmalign.modalities.taste import PictureTaste, embed, load_language_taste
from mmalign.records import Comparison, UserError
from tests.tiny import tiny_vlm


@pytest.fixture(scope="module")
def clip():
    return PictureTaste(mmalign.load_scorer("embedded-clip"), "embedded-clip")


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    return load_language_taste(tiny_vlm(tmp_path_factory.mktemp("tiny_vlm")))


def pairs_of(likes, seed):
    """Four pairs of scenes that differ in their finish alone; `likes` is "vivid" or "dull"."""
    pairs = []
    for i, scene in enumerate(random_scenes(4, seed, "pairs")):
        vivid, dull = (Image.fromarray(render(replace(scene, q=q))) for q in (0.9, 0.1))
        score = (1, 0) if likes == "vivid" else (0, 1)
        pairs.append(Comparison(f"{seed}-{i}", f"scene {i}", (vivid, dull), score))
    return pairs


@pytest.mark.parametrize("which", ["clip", "vlm"])
def test_order_leaves_no_trace(which, request):
    encoder = request.getfixturevalue(which)
    pairs = pairs_of("vivid", 1)
    whole = embed(pairs, encoder)
    assert whole.dtype == torch.float32
    assert whole.square().mean().item() == pytest.approx(1, rel=1e-5)
    assert torch.equal(embed(pairs[::-1], encoder), whole)
    swapped = [replace(pair, media=pair.media[::-1], score=pair.score[::-1]) for pair in pairs]
    assert torch.equal(embed(swapped, encoder), whole)
    assert not torch.equal(embed([replace(pair, score=pair.score[::-1]) for pair in pairs], encoder), whole)


def test_users_of_one_taste_are_nearer_than_of_two(clip):
    vivid = torch.stack([embed(pairs_of("vivid", seed), clip) for seed in range(4)])
    dull = torch.stack([embed(pairs_of("dull", seed), clip) for seed in range(10, 14)])
    assert torch.cdist(vivid, vivid).max() < torch.cdist(vivid, dull).min()


def test_the_opposite_choice_is_the_opposite_vector(clip):
    vivid, dull = embed(pairs_of("vivid", 3), clip), embed(pairs_of("dull", 3), clip)
    torch.testing.assert_close(vivid, -dull, rtol=0, atol=1e-5)


def test_layer_and_pooling_of_a_language_model_are_fields(vlm):
    pairs = pairs_of("vivid", 1)[:1]
    found = [
        embed(pairs, replace(vlm, layer=layer, pooling=pooling))
        for layer, pooling in ((None, "mean"), (1, "mean"), (-1, "mean"), (1, "last"))
    ]
    assert torch.equal(found[0], found[1])  # embeddings and two layers: the middle one is 1
    assert not torch.allclose(found[1], found[2])
    assert not torch.allclose(found[1], found[3])
    assert len(found[0]) == vlm.model.config.text_config.hidden_size
    assert vlm.facts["pooling"] == "mean"
    with pytest.raises(UserError, match=r"layer 7: .* has the layers 0 to 2"):
        embed(pairs, replace(vlm, layer=7))


def test_what_cannot_be_is_one_sentence(clip, tmp_path):
    same = Image.fromarray(np.full((64, 64, 3), 90, np.uint8))
    with pytest.raises(UserError, match="do not differ"):
        embed([Comparison("a", "x", (same, same), (1, 0))], clip)
    with pytest.raises(UserError, match="is no vision-language model"):
        load_language_taste(tmp_path)
