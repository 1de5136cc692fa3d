"""Transformers over latents on tiny models with the real architectures and file layouts; SD3 more closely."""

import inspect
import json
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
)
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from safetensors.torch import load_file

import mmalign
from mmalign.data.export import write_comparisons
from mmalign.modalities.adapter_files import ADAPTER_FILE
from mmalign.modalities.latent import LORA_FILE
from mmalign.objectives import DiffusionDPO
from mmalign.records import UserError
from mmalign.surrogate import (
    Cond,
    FreshNoise,
    Keys,
    Likelihood,
    NoisedProbe,
    RectifiedFlow,
    VariancePreserving,
)
from mmalign.training import memory
from mmalign.training.loop import train
from mmalign.training.prepare import prepare_policy
from mmalign.training.run import Run
from mmalign.training.views import WeightViews
from tests import tiny, tiny_dit
from tests.objectives.official import GOLDEN, PAIRS

SETTINGS = {"num_inference_steps": 3, "guidance_scale": 4.0}


@pytest.fixture
def modality(tiny_sd3):
    return mmalign.load(tiny_sd3)


def add_lora(modality, rank=2, alpha=6):
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=modality.lora_targets(), init_lora_weights=False)
    inject_adapter_in_model(config, modality.network, "policy")
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


# -- every family ------------------------------------------------------------------------------------------

VARIANTS = {
    **tiny_dit.FAMILIES,
    "FLUX.1 schnell": partial(tiny_dit.tiny_flux, guidance=False),
    "PixArt-alpha": partial(tiny_dit.tiny_pixart, alpha=True),
}
PLAIN = {"FLUX.1 schnell": "FLUX.1", "PixArt-alpha": "PixArt-Sigma"}  # what a variant has in common with another


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Family -> its tiny pipeline, made when it is first asked for."""
    return cache(lambda family: VARIANTS[family](tmp_path_factory.mktemp("tiny")))


GENERATES = [name for name in VARIANTS if name != "PixArt-alpha"]  # that makes pictures of 1024 pixels or none


@pytest.fixture(params=VARIANTS)
def family(request):
    return request.param


@pytest.fixture
def settings(family):
    return tiny_dit.SETTINGS[PLAIN.get(family, family)]


@pytest.fixture
def items():
    return tiny_dit.comparisons(2)


@pytest.fixture
def small(folders, family):
    """A family's modality, for pictures of 8 x 8 latents."""
    modality = mmalign.load(folders(family))
    modality.resolution = 8 * modality.pipeline.vae_scale_factor
    return modality


def plain(folder):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sd3_by_hand(pipeline, noisy, t, prompts):
    embeds, _, pooled, _ = pipeline.encode_prompt(prompts, prompts, prompts, do_classifier_free_guidance=False)
    named = {"encoder_hidden_states": embeds, "pooled_projections": pooled}
    return pipeline.transformer(noisy, timestep=1000 * t, **named).sample


def flux_by_hand(pipeline, noisy, t, prompts):
    n, c, h, w = noisy.shape
    embeds, pooled, text_ids = pipeline.encode_prompt(prompts, prompts)
    output = pipeline.transformer(
        pipeline._pack_latents(noisy, n, c, h, w),
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        timestep=(1000 * t) / 1000,
        guidance=torch.full((n,), 3.5) if pipeline.transformer.config.guidance_embeds else None,
        txt_ids=text_ids,
        img_ids=pipeline._prepare_latent_image_ids(n, h // 2, w // 2, "cpu", torch.float32),
    ).sample
    scale = pipeline.vae_scale_factor
    return pipeline._unpack_latents(output, h * scale, w * scale, scale)


def pixart_by_hand(pipeline, noisy, t, prompts):
    embeds, mask, *_ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, clean_caption=True)
    height, width = (8 * side for side in noisy.shape[-2:])
    sizes = torch.tensor([height, width]).repeat(len(noisy), 1), torch.tensor([height / width]).repeat(len(noisy), 1)
    alpha = type(pipeline).__name__ == "PixArtAlphaPipeline"
    output = pipeline.transformer(
        noisy,
        encoder_hidden_states=embeds,
        encoder_attention_mask=mask,
        timestep=t,
        added_cond_kwargs=dict(zip(("resolution", "aspect_ratio"), sizes if alpha else (None, None), strict=True)),
    ).sample
    return output.chunk(2, dim=1)[0]


def sana_by_hand(pipeline, noisy, t, prompts):
    instruction = inspect.signature(pipeline.__call__).parameters["complex_human_instruction"].default
    embeds, mask, *_ = pipeline.encode_prompt(
        prompts, do_classifier_free_guidance=False, complex_human_instruction=instruction
    )
    named = {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
    return pipeline.transformer(noisy, timestep=1000 * t * pipeline.transformer.config.timestep_scale, **named).sample


def qwen_image_by_hand(pipeline, noisy, t, prompts):
    n, c, h, w = noisy.shape
    embeds, mask = pipeline.encode_prompt(prompts)
    output = pipeline.transformer(
        pipeline._pack_latents(noisy, n, c, h, w),
        encoder_hidden_states=embeds,
        encoder_hidden_states_mask=mask,
        timestep=(1000 * t) / 1000,
        img_shapes=[[(1, h // 2, w // 2)]] * n,
    ).sample
    scale = pipeline.vae_scale_factor
    return pipeline._unpack_latents(output, h * scale, w * scale, scale)[:, :, 0]


def z_image_by_hand(pipeline, noisy, t, prompts):
    embeds, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False)
    output = pipeline.transformer(list(noisy.unsqueeze(2)), (1000 - 1000 * t) / 1000, embeds).sample
    return -torch.stack(output).squeeze(2)


def flux2_by_hand(pipeline, noisy, t, prompts):
    embeds, text_ids = pipeline.encode_prompt(prompts)
    ids = pipeline._prepare_latent_ids(noisy)
    named = {"timestep": (1000 * t) / 1000, "encoder_hidden_states": embeds, "txt_ids": text_ids, "img_ids": ids}
    output = pipeline.transformer(pipeline._pack_latents(noisy), **named).sample
    return pipeline._unpack_latents_with_ids(output, ids)


BY_HAND = {
    "SD3": sd3_by_hand,
    "FLUX.1": flux_by_hand,
    "PixArt-Sigma": pixart_by_hand,
    "FLUX.2 klein": flux2_by_hand,
    "Qwen-Image": qwen_image_by_hand,
    "Sana": sana_by_hand,
    "Z-Image": z_image_by_hand,
}


def latents_by_hand(pipeline, values):
    """Of a batch of pictures."""
    vae, kind = pipeline.vae, type(pipeline).__name__
    if kind == "SanaPipeline":
        return vae.encode(values).latent * vae.config.scaling_factor
    if kind == "QwenImagePipeline":
        mean = vae.encode(values[:, :, None]).latent_dist.mean
        shift, scale = (torch.tensor(x)[:, None, None] for x in (vae.config.latents_mean, vae.config.latents_std))
        return (mean[:, :, 0] - shift) / scale
    if kind == "Flux2KleinPipeline":
        return pipeline._encode_vae_image(values, None)
    return (vae.encode(values).latent_dist.mean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor


@torch.no_grad()
def test_the_surrogate_equals_the_pipelines_own_parts(family, small, folders, items):
    """x0, noise and time given: VAE, noising, transformer and target by hand."""
    pipeline = plain(folders(family))
    probe = probe_of(small, items)
    for k, item in enumerate(items):
        for m in range(2):
            values, _ = small._read(item, m, small.frame(item))
            assert torch.allclose(probe.x0[2 * k + m], latents_by_hand(pipeline, values[None])[0], atol=1e-5)
    if isinstance(small.path, VariancePreserving):
        scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)  # what PixArt's script trains with
        noisy, target = scheduler.add_noise(probe.x0, probe.noise, probe.t), probe.noise
    else:
        t = probe.t[:, None, None, None]
        noisy, target = (1 - t) * probe.x0 + t * probe.noise, probe.noise - probe.x0
    prompts = [item.prompt for item in items for _ in item.media]
    output = BY_HAND[PLAIN.get(family, family)](pipeline, noisy, probe.t, prompts)
    assert output.shape == probe.x0.shape
    by_hand = -0.5 * (target - output).square().flatten(1).mean(1)
    assert torch.allclose(probe.logp(small.predict(probe, "policy")), by_hand, atol=1e-5)


@pytest.mark.parametrize("family", GENERATES, indirect=True)
def test_generation_is_the_plain_pipelines_whatever_the_batch(family, small, settings, folders):
    pictures = small.generate(["a fox", "red"], seeds=[3, 4], **settings)
    alone = small.generate(["red"], seeds=[4], **settings)
    assert np.abs(np.asarray(pictures[1], int) - np.asarray(alone[0], int)).max() <= 1
    noise = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    expected = plain(folders(family))(prompt=["a fox", "red"], generator=noise, **settings).images
    apart = max(np.abs(np.asarray(a, int) - np.asarray(b, int)).max() for a, b in zip(pictures, expected, strict=True))
    assert apart <= (family == "Sana")  # two loads of a Sana differ in float32's last place: 7 of 786,432 values by one


@pytest.mark.parametrize("family", GENERATES, indirect=True)
def test_plain_diffusers_reads_the_lora(family, small, settings, folders, tmp_path):
    base = small.generate(["a red fox"], seeds=[1], **settings)[0]
    add_lora(small).save(tmp_path)
    ours = small.generate(["a red fox"], seeds=[1], **settings)[0]
    assert not np.array_equal(ours, base)
    pipeline = plain(folders(family))
    if hasattr(pipeline, "load_lora_weights"):
        assert (tmp_path / LORA_FILE).is_file()
        pipeline.load_lora_weights(tmp_path)
    else:
        assert (tmp_path / ADAPTER_FILE).is_file()
        pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, tmp_path)
    noise = [torch.Generator().manual_seed(1)]
    assert np.array_equal(ours, pipeline(prompt=["a red fox"], generator=noise, **settings).images[0])
    again = mmalign.load(folders(family), lora=tmp_path)
    assert again.network.peft_config["policy"].lora_alpha == 6
    assert np.array_equal(ours, again.generate(["a red fox"], seeds=[1], **settings)[0])
    with WeightViews(again)("reference"):
        assert np.array_equal(base, again.generate(["a red fox"], seeds=[1], **settings)[0])


def test_buckets_keep_the_aspect_and_the_networks_sizes(small, items):
    small.resolution = 16 * small.pipeline.vae_scale_factor
    small.aspect_buckets = True
    tall = replace(items[0], media=tuple(picture.resize((40, 80)) for picture in items[0].media))
    probe = probe_of(small, [tall])
    assert probe.x0.shape[-2:] == (24 // small.folded, 8 // small.folded)
    assert small.predict(probe, "policy").shape == probe.x0.shape
    assert not torch.allclose(  # the network is told where a token stands
        small.predict(probe, "policy"),
        small.predict(replace(probe, x_t=probe.x_t.mT, cond=probe.cond), "policy").mT,
        atol=1e-4,
    )


@pytest.mark.parametrize("family", tiny_dit.FAMILIES, indirect=True)
def test_training_from_a_cache_starts_at_ln_2(family, small, folders, recipe, items, tmp_path):
    """No VAE and no text encoder are there; the reference's first answers are the policy's."""
    write_comparisons(tmp_path / "data", items)
    run = replace(
        recipe,
        pretrained_model_name_or_path=str(folders(family)),
        dataset_name=str(tmp_path / "data"),
        cache_dir=str(tmp_path / "cache"),
        resolution=small.resolution,
    )
    output = train(run, say=lambda line: None)
    losses = [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(np.log(2), rel=1e-6)
    assert losses[1] != losses[0]


@pytest.mark.parametrize("family", [name for name in VARIANTS if name != "FLUX.1 schnell"], indirect=True)
def test_the_plan_counts_each_familys_activations_and_checkpointing_leaves_the_gradient(
    family, small, folders, recipe, items
):
    run = replace(recipe, pretrained_model_name_or_path=str(folders(family)), resolution=small.resolution)
    trained, planned = memory.measured(mmalign.skeleton(folders(family)), run, samples=2, dtype=torch.float32)
    probe = probe_of(small, items[:1])
    if small.ragged:  # planned for the longest prompts
        longest = small.shapes(small.network.config)["prompt_embeds"]
        probe = replace(probe, cond=Cond({"prompt_embeds": list(torch.randn(2, *longest))}))
    gradients = []
    for checkpointing in (False, True):
        modality = mmalign.load(folders(family))
        prepare_policy(modality, replace(run, gradient_checkpointing=checkpointing))
        with memory.Saved(modality.network) as kept:
            logp = probe.logp(modality.predict(probe, "policy"))
        if not checkpointing:
            assert planned == pytest.approx(kept.bytes, rel=0.15)
        logp.sum().backward()
        parameters = [p for p in modality.network.parameters() if p.requires_grad]
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
        assert trained == sum(p.numel() for p in parameters)
    assert gradients[0].norm() > 0
    assert torch.allclose(*gradients, atol=1e-6)
    assert memory.plan(run, torch.float32).parts["encoding beyond them"] >= 0


@torch.no_grad()
def test_an_attention_backend_finds_its_place(small, items):
    probe = probe_of(small, items[:1])
    before = small.predict(probe, "policy")
    example = mmalign.skeleton(small.source).example
    assert small.use_attention("math", lambda: example(1, small.resolution, torch.float32, None)).startswith(
        "Attention: math, equal to math"
    )
    assert torch.allclose(small.predict(probe, "policy"), before, atol=1e-5)


@pytest.mark.parametrize("family", ["SD3", "FLUX.1"], indirect=True)
def test_official_flow_dpo(family, small, monkeypatch):
    """What the network says is the published code's velocity, brought into its own layout; the loss is that code's."""
    arrays = {name: torch.from_numpy(value) for name, value in np.load(GOLDEN / "flow_dpo.npz").items()}
    cond = Cond({"prompt_embeds": torch.zeros(8, 3, 24), "pooled_prompt_embeds": torch.zeros(8, 8)})
    t = torch.full((8,), 0.3)
    probe = NoisedProbe(small.path, arrays["in_model_input"], t, arrays["in_noise"], cond)
    logp = {}
    for view, name in {"policy": "in_model_pred", "reference": "in_model_pred_ref"}.items():
        said = arrays[name] if family == "SD3" else FluxPipeline._pack_latents(arrays[name], 8, 4, 8, 8)
        monkeypatch.setattr(small.network, "forward", lambda said=said, **named: (said,))
        logp[view] = probe.logp(small.predict(probe, view))
    loss = DiffusionDPO(beta=100)(Likelihood(logp), PAIRS).mean()
    assert loss.item() == pytest.approx(arrays["out_loss"].item(), rel=1e-5)


def test_a_dynamic_shift_is_not_in_the_training_times(folders):
    """As in the published scripts, whose `scheduler.timesteps` are then unshifted; schnell's shift is 1 anyway."""
    assert mmalign.load(folders("FLUX.1")).path == RectifiedFlow(density="logit-normal", shift=1.0)
    times = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True).timesteps
    assert torch.allclose(times, torch.arange(1000, 0, -1.0))


def test_pixart_generates_at_a_trained_size_and_brings_it_to_the_asked(folders):
    settings = {"num_inference_steps": 1, "height": 136, "width": 200}
    ours = mmalign.load(folders("PixArt-Sigma")).generate(["red"], seeds=[1], **settings)[0]
    noise = [torch.Generator().manual_seed(1)]
    theirs = plain(folders("PixArt-Sigma"))(prompt=["red"], generator=noise, **settings).images[0]
    assert ours.size == (200, 136)
    assert np.array_equal(ours, theirs)


def test_a_setting_that_the_pipeline_does_not_take_is_said(folders):
    modality = mmalign.load(folders("FLUX.2 klein"))
    with pytest.raises(UserError, match=r"negative_prompt: .* takes none"):
        modality.generate(["red"], seeds=[1], negative_prompt="blue")


def test_qwen_image_is_guided_by_its_own_word_for_it(folders):
    modality, settings = mmalign.load(folders("Qwen-Image")), tiny_dit.SETTINGS["Qwen-Image"]
    ours = modality.generate(["red"], seeds=[1], guidance_scale=7.0, negative_prompt="blue", **settings)[0]
    noise = [torch.Generator().manual_seed(1)]
    guided = {"true_cfg_scale": 7.0, "negative_prompt": ["blue"]}
    theirs = plain(folders("Qwen-Image"))(prompt=["red"], generator=noise, **guided, **settings).images[0]
    assert np.array_equal(ours, theirs)
    assert not np.array_equal(ours, modality.generate(["red"], seeds=[1], **settings)[0])
