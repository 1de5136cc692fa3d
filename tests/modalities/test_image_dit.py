"""SD3 on a tiny model with the real architecture and file layout."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from peft import LoraConfig
from safetensors.torch import load_file

import mmalign
from mmalign.modalities.latent import LORA_FILE
from mmalign.objectives import DiffusionDPO
from mmalign.records import UserError
from mmalign.surrogate import FreshNoise, Keys, RectifiedFlow
from mmalign.training import memory
from mmalign.training.loop import train
from mmalign.training.prepare import prepare_policy
from mmalign.training.run import Run
from mmalign.training.views import WeightViews
from tests import tiny

SETTINGS = {"num_inference_steps": 3, "guidance_scale": 4.0}


@pytest.fixture
def modality(tiny_sd3):
    return mmalign.load(tiny_sd3)


def add_lora(modality, rank=2, alpha=6):
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=modality.lora_targets(), init_lora_weights=False)
    modality.network.add_adapter(config, "policy")
    return modality


def probe_of(modality, comparisons):
    encoded = modality.encode(comparisons)
    n = len(encoded)
    keys = Keys(0, torch.arange(n) // 2, torch.arange(n) % 2, torch.zeros(n, dtype=torch.int64))
    return FreshNoise()(encoded.x0, encoded.cond, keys, modality.path)


def plain_pipeline(folder, **parts):
    plain = StableDiffusion3Pipeline.from_pretrained(folder, **parts)
    plain.set_progress_bar_config(disable=True)
    return plain


def test_encode_gives_shifted_latents_and_both_embeddings(modality, pairs):
    encoded = modality.encode(pairs[:2])
    assert encoded.x0.shape == encoded.x0_std.shape == (4, 16, 8, 8)
    assert encoded.cond["prompt_embeds"].shape == (4, 77 + 256, 24)
    assert encoded.cond["pooled_prompt_embeds"].shape == (4, 8 + 12)
    pixels, _ = modality._read(pairs[0], 0, modality.frame(pairs[0]))
    posterior = modality.pipeline.vae.encode(pixels[None]).latent_dist
    assert torch.allclose(encoded.x0[:1], (posterior.mean - 0.0609) * 1.5305, atol=1e-6)
    assert torch.allclose(encoded.x0_std[:1], posterior.std * 1.5305, atol=1e-6)
    assert modality._decode(encoded.x0[:1], {})[0].size == (16, 16)


def test_a_batch_encodes_as_its_parts_and_each_prompt_once(modality, pairs, monkeypatch):
    part = modality.encode(pairs[4:5])
    asked = []
    real = modality.pipeline.encode_prompt
    monkeypatch.setattr(
        modality.pipeline, "encode_prompt", lambda prompts, *a, **k: asked.extend(prompts) or real(prompts, *a, **k)
    )
    whole = modality.encode(pairs[:5])
    assert sorted(asked) == ["", "a fox", "a red fox", "red"]
    assert torch.allclose(whole.x0[8:], part.x0, atol=1e-6)
    for name, value in part.cond.items():
        assert torch.allclose(whole.cond[name][8:], value, atol=1e-6)
    assert torch.allclose(modality.empty()["prompt_embeds"], whole.cond["prompt_embeds"][6:7], atol=1e-6)


def test_predict_equals_the_bare_transformer(modality, pairs):
    probe = probe_of(modality, pairs[:2])
    expected = modality.pipeline.transformer(
        hidden_states=probe.x_t,
        timestep=1000 * probe.t,
        encoder_hidden_states=probe.cond["prompt_embeds"],
        pooled_projections=probe.cond["pooled_prompt_embeds"],
    ).sample
    assert torch.equal(modality.predict(probe, "policy"), expected)
    assert torch.equal(probe.target, probe.noise - probe.x0)


def test_path_and_scheduler_mean_the_same_time_and_sign(modality, pairs):
    """What the sampler does with a prediction is what the path does: noise at t = 1, data at t = 0, Euler between."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(modality.pipeline.scheduler.config)
    probe = probe_of(modality, pairs[:1])
    scheduler.set_timesteps(4)
    sigmas = scheduler.sigmas
    t, s = (sigma.repeat(2) for sigma in sigmas[1:3])
    assert scheduler.timesteps[1] == pytest.approx(1000 * sigmas[1].item())
    scheduler.set_begin_index(1)
    noisy = scheduler.scale_noise(probe.x0, scheduler.timesteps[1:2].repeat(2), probe.noise)
    assert torch.allclose(noisy, modality.path.interpolate(probe.x0, probe.noise, t), atol=1e-6)
    stepped = scheduler.step(probe.target, scheduler.timesteps[1], noisy).prev_sample
    assert torch.allclose(stepped, modality.path.move(probe.target, noisy, t, s), atol=1e-5)
    assert torch.allclose(stepped, modality.path.interpolate(probe.x0, probe.noise, s), atol=1e-5)


def test_training_times_are_the_published_scripts(modality):
    """They look a logit-normal draw up in the scheduler's own, shifted, timesteps (flow_grpo, diffusers' scripts)."""
    assert modality.path == RectifiedFlow(density="logit-normal", shift=3.0)
    u = torch.linspace(0.01, 0.99, 99)
    normal = torch.sigmoid(torch.special.ndtri(u))
    timesteps = FlowMatchEulerDiscreteScheduler(shift=3.0).timesteps.flip(0)  # ascending: 1 - u is as likely as u
    expected = timesteps[(1000 * normal).long()]
    assert torch.allclose(1000 * modality.path.timesteps(u), expected, atol=3.0)  # theirs are whole steps of 1 to 3


def test_generation_is_the_plain_pipeline_and_does_not_depend_on_the_batch(modality, tiny_sd3):
    prompts, seeds = ["a fox", "red", "a red fox"], [3, 4, 5]
    pictures = modality.generate(prompts, seeds=seeds, **SETTINGS, batch_size=2)
    alone = modality.generate(prompts[1:2], seeds=seeds[1:2], **SETTINGS)
    assert np.abs(np.asarray(pictures[1], int) - np.asarray(alone[0], int)).max() <= 1
    noise = [torch.Generator().manual_seed(seed) for seed in seeds[:2]]
    expected = plain_pipeline(tiny_sd3)(prompts[:2], generator=noise, **SETTINGS).images
    assert all(np.array_equal(a, b) for a, b in zip(pictures[:2], expected, strict=True))
    assert not np.array_equal(pictures[0], modality.generate(prompts[:1], seeds=[9], **SETTINGS)[0])


def test_saved_lora_gives_the_same_pictures_in_plain_diffusers_and_comes_back(modality, tiny_sd3, tmp_path):
    add_lora(modality).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LORA_FILE]
    assert all(key.startswith("transformer.") for key in load_file(tmp_path / LORA_FILE))
    ours = modality.generate(["a red fox"], seeds=[1], **SETTINGS)[0]
    with WeightViews(modality)("reference"):
        base = modality.generate(["a red fox"], seeds=[1], **SETTINGS)[0]
    assert not np.array_equal(ours, base)
    plain = plain_pipeline(tiny_sd3)
    plain.load_lora_weights(tmp_path)
    theirs = plain("a red fox", generator=[torch.Generator().manual_seed(1)], **SETTINGS).images[0]
    assert np.array_equal(ours, theirs)
    again = mmalign.load(tiny_sd3, lora=tmp_path, dtype=torch.bfloat16)
    assert again.network.peft_config["policy"].lora_alpha == 6
    trained = {name: p for name, p in again.network.named_parameters() if ".policy." in name}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    expected = dict(modality.network.named_parameters())
    assert trained.keys() == {name for name in expected if ".policy." in name}
    assert again.network.dtype == torch.bfloat16
    assert again.pipeline.vae.dtype == torch.float32


def test_adapters_off_is_the_base_bit_for_bit_and_comes_back(modality, tiny_sd3, pairs):
    base = mmalign.load(tiny_sd3)
    add_lora(modality)
    probe = probe_of(base, pairs[:2])
    policy = modality.predict(probe, "policy")
    with WeightViews(modality)("reference"):
        assert torch.equal(modality.predict(probe, "reference"), base.predict(probe, "policy"))
    assert torch.equal(modality.predict(probe, "policy"), policy)
    assert not torch.equal(policy, base.predict(probe, "policy"))


def test_without_t5_its_tokens_are_zeros(pairs, tmp_path):
    folder = tiny.tiny_sd3(tmp_path / "no_t5", t5=False)
    modality = mmalign.load(folder)
    embeds = modality.encode(pairs[:1]).cond["prompt_embeds"]
    assert embeds.shape == (2, 77 + 256, 24)
    assert embeds[:, :77].any()
    assert not embeds[:, 77:].any()
    assert "text_encoder_3" not in mmalign.skeleton(folder).parts
    ours = modality.generate(["a fox"], seeds=[3], **SETTINGS)[0]
    plain = plain_pipeline(folder, text_encoder_3=None, tokenizer_3=None)
    theirs = plain("a fox", generator=[torch.Generator().manual_seed(3)], **SETTINGS).images[0]
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("other", ["sdxl", "wider"])
def test_a_wrong_lora_is_one_sentence(other, modality, tiny_sdxl, tmp_path):
    if other == "sdxl":
        add_lora(mmalign.load(tiny_sdxl)).save(tmp_path)
    else:
        modality.pipeline.transformer = modality.network = tiny.sd3_transformer(num_attention_heads=3)
        add_lora(modality).save(tmp_path)
    with pytest.raises(UserError, match=r"does not fit|another architecture") as error:
        mmalign.load(modality.source, lora=tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("resolution", [18, 64])
def test_a_resolution_that_does_not_fit_is_said(modality, resolution, pairs):
    modality.resolution = resolution
    with pytest.raises(UserError, match="multiples of 4 pixels up to 48"):
        modality.encode(pairs[:1])


@pytest.fixture
def recipe(tiny_sd3, tmp_path):
    return Run(
        pretrained_model_name_or_path=str(tiny_sd3),
        dataset_name="pairs",
        output_dir=str(tmp_path / "run"),
        objective=DiffusionDPO(beta=100),  # yifan123/flow_grpo config/dpo.py
        max_train_steps=2,
        learning_rate=1e-2,
        train_batch_size=2,
        rank=2,
        proportion_empty_prompts=0.2,
        checkpointing_steps=1,
        seed=7,
    )


@pytest.mark.parametrize("changes", [{"use_lora": True}, {"use_lora": False}, {"resolution": 24}], ids=str)
def test_the_memory_plan_counts_what_autograd_keeps(recipe, changes, pairs):
    run = replace(recipe, **changes)
    skeleton = mmalign.skeleton(run.pretrained_model_name_or_path)
    trained, planned = memory.measured(skeleton, run, samples=2, dtype=torch.float32)
    modality = mmalign.load(run.pretrained_model_name_or_path)
    prepare_policy(modality, run)
    probe = probe_of(modality, pairs[:1])
    with memory.Saved(modality.network) as kept:
        modality.predict(probe, "policy")
    assert trained == sum(p.numel() for p in modality.network.parameters() if p.requires_grad)
    assert planned == pytest.approx(kept.bytes, rel=0.1)


def test_the_plan_of_a_run_sees_every_part_and_checkpointing(recipe):
    plain = memory.plan(recipe, torch.float32).parts
    assert plain["encoders and VAE"] > 0
    checkpointed = memory.plan(replace(recipe, gradient_checkpointing=True), torch.float32).parts
    assert checkpointed["activations"] < plain["activations"]


def test_two_steps_of_dpo_start_at_ln_2_and_resume_bit_for_bit(recipe, pairs, tmp_path):
    def run_it(run, watch=None):
        modality = mmalign.load(run.pretrained_model_name_or_path, dtype=torch.float64)
        output = train(run, modality=modality, comparisons=pairs[:4], watch=watch, say=lambda line: None)
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows], load_file(output / LORA_FILE)

    class Killed(Exception):
        pass

    def kill(step, metrics):
        if step == 2:
            raise Killed

    losses, weights = run_it(replace(recipe, output_dir=str(tmp_path / "whole")))
    assert losses[0] == pytest.approx(0.6931471805599453, rel=1e-12)
    assert losses[1] != losses[0]
    with pytest.raises(Killed):
        run_it(recipe, kill)
    resumed, same = run_it(replace(recipe, resume_from_checkpoint="latest"))
    assert resumed == losses
    assert same.keys() == weights.keys()
    assert all(torch.equal(same[key], weights[key]) for key in weights)
    cut = {"gradient_checkpointing": True, "backward": "two-pass", "rows_at_once": 3}
    other, _ = run_it(replace(recipe, **cut, output_dir=str(tmp_path / "cut")))
    assert other == pytest.approx(losses, rel=1e-9)
