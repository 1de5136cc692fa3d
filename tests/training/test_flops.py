"""Operation counts against known totals and against what a real step computes."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import mmalign
from mmalign.modalities import Skeleton
from mmalign.modalities.image_unet import UNetModality, example
from mmalign.modalities.single_file import SDXL
from mmalign.objectives import MaPO
from mmalign.surrogate import FreshNoise, Keys
from mmalign.training import flops
from mmalign.training.prepare import prepare_policy
from tests.training.test_memory import recipe


def test_an_sdxl_lora_pair_at_1024_takes_what_is_known():
    """PEERS' floors, counted apart on the meta device: 29.9 and 43.4 TFLOP; the published sizes give the rest."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        parts = {
            "network": UNet2DConditionModel.from_config(SDXL["unet"]),
            "vae": AutoencoderKL.from_config(SDXL["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**SDXL["text_encoder"])),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**SDXL["text_encoder_2"])),
        }
    skeleton = Skeleton(parts, partial(example, parts["network"].config, 8), UNetModality.targets)
    counts = flops.operations(recipe("SDXL", rank=64, resolution=1024), skeleton)
    learning = counts["policy forward"] + counts["backward"]
    assert learning / 1e12 == pytest.approx(29.9, rel=0.03)
    assert (learning + counts["reference"]) / 1e12 == pytest.approx(43.4, rel=0.03)
    assert counts["VAE"] / 1e12 == pytest.approx(9.76, rel=0.03)
    assert counts["text"] / 1e12 == pytest.approx(0.11, rel=0.03)


@pytest.mark.parametrize("family", ["tiny_sdxl", "tiny_sd15", "tiny_sd3"])
@pytest.mark.parametrize("use_lora", [True, False])
def test_fake_tensors_count_what_a_real_step_computes(family, use_lora, request, pairs):
    run = recipe(request.getfixturevalue(family), use_lora=use_lora)
    counts = flops.operations(run)
    modality = mmalign.load(run.pretrained_model_name_or_path)
    encoded = []
    encoding = flops._count(lambda: encoded.append(modality.encode(pairs[:1])))
    assert counts["VAE"] + counts["text"] == encoding
    views = prepare_policy(modality, run)
    keys = Keys(0, torch.zeros(2, dtype=torch.int64), torch.arange(2), torch.zeros(2, dtype=torch.int64))
    probe = FreshNoise()(encoded[0].x0, encoded[0].cond, keys, modality.path)
    with views("reference"), torch.no_grad():
        assert counts["reference"] == flops._count(lambda: modality.predict(probe, "reference"))
    predicted = []
    assert counts["policy forward"] == flops._count(lambda: predicted.append(modality.predict(probe, "policy")))
    assert counts["backward"] == flops._count(lambda: predicted[0].square().mean().backward())


def test_switches_take_off_and_put_on_what_they_say(tiny_sdxl):
    run = recipe(tiny_sdxl)
    plain = flops.operations(run)
    cached = flops.operations(replace(run, cache_dir="cache", draws_per_sample=1, cache_reference=True))
    assert cached == plain | {"reference": 0, "VAE": 0, "text": 0}
    assert flops.operations(replace(run, objective=MaPO(beta=0.1)))["reference"] == 0
    again = flops.operations(replace(run, gradient_checkpointing=True))
    assert 0 < again["backward"] - plain["backward"] <= plain["policy forward"]
    assert flops.operations(replace(run, backward="two-pass")) == plain | {
        "policy forward": 2 * plain["policy forward"]
    }


@pytest.mark.parametrize("members", [3, 4, 8])
def test_the_cost_grows_linearly_with_a_lists_length(tiny_sdxl, members):
    pair, listed = flops.operations(recipe(tiny_sdxl)), flops.operations(recipe(tiny_sdxl), members=members)
    assert listed == {name: count if name == "text" else count * members // 2 for name, count in pair.items()}


def test_the_cost_is_a_quadratic_of_the_resolutions_tokens(tiny_sdxl):
    """A part for the text and the sizes, one a token (convolutions, projections), one a pair of tokens (attention)."""
    tokens, costs = zip(
        *[(side**2, sum(flops.operations(recipe(tiny_sdxl, resolution=side)).values())) for side in (16, 32, 48, 64)],
        strict=True,
    )
    quadratic = np.polyfit(tokens[:3], costs[:3], 2)
    assert (quadratic > 0).all()
    assert np.polyval(quadratic, tokens[3]) == pytest.approx(costs[3], rel=1e-9)
