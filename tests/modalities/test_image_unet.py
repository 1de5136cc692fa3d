"""SD1.5 and SDXL on tiny models with the real architecture and file layout."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig
from safetensors.torch import load_file

import mmalign
from mmalign.modalities.image_unet import KOHYA_FILE, LORA_FILE
from mmalign.records import Comparison, UserError
from mmalign.surrogate import Cond, FreshNoise, Keys, NoisedProbe
from mmalign.training.views import WeightViews
from tests.conftest import picture


def add_lora(modality, rank=2, alpha=6):
    modality.network.add_adapter(
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=modality.lora_targets(), init_lora_weights=False),
        "policy",
    )
    return modality


def probe_of(modality, comparisons):
    encoded = modality.encode(comparisons)
    n = len(encoded)
    keys = Keys(0, torch.arange(n) // 2, torch.arange(n) % 2, torch.zeros(n, dtype=torch.int64))
    return FreshNoise()(encoded.x0, encoded.cond, keys, modality.path)


def test_encode_gives_latents_embeddings_and_real_time_ids(tiny_sdxl, pairs):
    modality = mmalign.load(tiny_sdxl)
    wide = Comparison(id="wide", prompt="a fox", media=(picture(1, (64, 32)), picture(2, (16, 16))), score=(1, 0))
    encoded = modality.encode([pairs[0], wide])
    assert encoded.x0.shape == encoded.x0_std.shape == (4, 4, 8, 8)
    assert (encoded.x0_std > 0).all()
    assert encoded.cond["prompt_embeds"].shape == (4, 77, 24)
    assert encoded.cond["text_embeds"].shape == (4, 16)
    # height, width, crop top, crop left, target: 64 x 32 is brought to 32 x 16 and loses 8 columns on the left;
    # a member takes the ids of its group's first picture.
    assert encoded.cond["time_ids"][2].tolist() == [32, 64, 0, 8, 16, 16]
    assert torch.equal(encoded.cond["time_ids"][2], encoded.cond["time_ids"][3])
    decoded = modality._decode(encoded.x0[:1], {})[0]
    assert decoded.size == (16, 16)


def test_a_batch_encodes_as_its_parts(tiny_sdxl, pairs):
    modality = mmalign.load(tiny_sdxl)
    whole = modality.encode(pairs[:3])
    part = modality.encode(pairs[2:3])
    assert torch.allclose(whole.x0[4:], part.x0, atol=1e-6)
    assert torch.allclose(whole.cond["prompt_embeds"][4:], part.cond["prompt_embeds"], atol=1e-6)


def test_empty_prompt_is_what_guidance_sees(tiny_sdxl, tiny_sd15):
    xl, sd15 = mmalign.load(tiny_sdxl), mmalign.load(tiny_sd15)
    assert not xl.empty()["prompt_embeds"].any()
    assert sd15.empty()["prompt_embeds"].any()
    assert sd15.path.prediction_type == "v_prediction"


@pytest.mark.parametrize("family", ["tiny_sdxl", "tiny_sd15"])
def test_predict_equals_the_bare_unet(family, request, pairs):
    modality = mmalign.load(request.getfixturevalue(family))
    probe = probe_of(modality, pairs[:2])
    added = None if family == "tiny_sd15" else {name: probe.cond[name] for name in ("text_embeds", "time_ids")}
    expected = modality.pipeline.unet(probe.x_t, probe.t, probe.cond["prompt_embeds"], added_cond_kwargs=added).sample
    assert torch.equal(modality.predict(probe, "policy"), expected)


def test_generation_is_the_plain_pipeline_and_does_not_depend_on_the_batch(tiny_sdxl):
    modality = mmalign.load(tiny_sdxl)
    prompts, seeds = ["a fox", "red", "a red fox"], [3, 4, 5]
    pictures = modality.generate(prompts, seeds=seeds, num_inference_steps=3, guidance_scale=4.0, batch_size=2)
    alone = modality.generate(prompts[1:2], seeds=seeds[1:2], num_inference_steps=3, guidance_scale=4.0)
    assert np.abs(np.asarray(pictures[1], int) - np.asarray(alone[0], int)).max() <= 1
    plain = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    plain.set_progress_bar_config(disable=True)
    expected = plain(
        prompts[:2],
        generator=[torch.Generator().manual_seed(s) for s in seeds[:2]],
        num_inference_steps=3,
        guidance_scale=4.0,
    ).images
    assert all(np.array_equal(a, b) for a, b in zip(pictures[:2], expected, strict=True))
    assert not np.array_equal(pictures[0], modality.generate(prompts[:1], seeds=[9], num_inference_steps=3)[0])


def test_saved_lora_gives_the_same_pictures_in_plain_diffusers(tiny_sdxl, tmp_path):
    modality = add_lora(mmalign.load(tiny_sdxl))
    modality.save(tmp_path)
    settings = {"num_inference_steps": 3, "guidance_scale": 4.0}
    ours = modality.generate(["a red fox"], seeds=[1], **settings)[0]
    with WeightViews(modality)("reference"):
        base = modality.generate(["a red fox"], seeds=[1], **settings)[0]
    assert not np.array_equal(ours, base)
    for name in (LORA_FILE, KOHYA_FILE):
        plain = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
        plain.set_progress_bar_config(disable=True)
        plain.load_lora_weights(str(tmp_path), weight_name=name)
        theirs = plain("a red fox", generator=torch.Generator().manual_seed(1), **settings).images[0]
        assert np.array_equal(ours, theirs), name
        again = mmalign.load(tiny_sdxl, lora=tmp_path / name)
        assert np.array_equal(again.generate(["a red fox"], seeds=[1], **settings)[0], ours)
    kohya = load_file(tmp_path / KOHYA_FILE)
    assert {key.split(".", 1)[1] for key in kohya} == {"lora_up.weight", "lora_down.weight", "alpha"}
    assert all(value.item() == 6 for key, value in kohya.items() if key.endswith("alpha"))


def test_full_model_is_saved_as_a_pipeline(tiny_sdxl, tmp_path, pairs):
    modality = mmalign.load(tiny_sdxl)
    with torch.no_grad():
        modality.network.conv_out.bias += 1
    modality.save(tmp_path / "full")
    again = mmalign.load(tmp_path / "full")
    probe = probe_of(modality, pairs[:1])
    assert torch.equal(again.predict(probe, "policy"), modality.predict(probe, "policy"))


def test_adapters_off_is_the_base_bit_for_bit_and_comes_back(tiny_sdxl, pairs):
    base = mmalign.load(tiny_sdxl)
    modality = add_lora(mmalign.load(tiny_sdxl))
    probe = probe_of(base, pairs[:2])
    views = WeightViews(modality)
    policy = modality.predict(probe, "policy")
    with views("reference"):
        assert torch.equal(modality.predict(probe, "reference"), base.predict(probe, "policy"))
    failing = NoisedProbe(probe.path, probe.x0, probe.t, probe.noise, Cond({}))
    with pytest.raises(KeyError), views("reference"):
        modality.predict(failing, "reference")
    assert torch.equal(modality.predict(probe, "policy"), policy)
    assert not torch.equal(policy, base.predict(probe, "policy"))
    trained = [name for name, parameter in modality.network.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".policy." in name for name in trained)


def test_policy_only_conditions_are_not_seen_by_the_reference(tiny_sdxl, pairs):
    modality = mmalign.load(tiny_sdxl)
    probe = probe_of(modality, pairs[:1])
    cond = Cond({**probe.cond, "user": torch.ones(2, 3)}, frozenset({"user"}))
    assert "user" not in cond.view("reference")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tmp, xl, sd: (tmp / "nothing", None), "no such folder or file"),
        (lambda tmp, xl, sd: (tmp, None), "model_index.json"),
        (lambda tmp, xl, sd: (xl, tmp / "no.safetensors"), "no such LoRA"),
        (lambda tmp, xl, sd: (sd, "lora of xl"), "does not fit|another architecture"),
    ],
)
def test_bad_sources_are_one_sentence(make, message, tmp_path, tiny_sdxl, tiny_sd15):
    source, lora = make(tmp_path, tiny_sdxl, tiny_sd15)
    if lora == "lora of xl":
        add_lora(mmalign.load(tiny_sdxl)).save(tmp_path)
        lora = tmp_path
    with pytest.raises(UserError, match=message) as error:
        mmalign.load(source, lora=lora)
    assert "\n" not in str(error.value)


def test_an_unknown_family_names_the_known_ones(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    with pytest.raises(UserError, match="KandinskyPipeline is not supported"):
        mmalign.load(tmp_path)
