"""Wan and CogVideoX on tiny models with the real architecture and file layout."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors.torch import load_file

import mmalign
from mmalign.media import frames_of, make_sound, make_video
from mmalign.modalities.latent import LORA_FILE
from mmalign.objectives import DiffusionDPO
from mmalign.recipe import load_recipe
from mmalign.records import Comparison, Text, UserError, Video
from mmalign.surrogate import FreshNoise, Keys, NoisedProbe, RectifiedFlow
from mmalign.training import memory
from mmalign.training.cached import framed
from mmalign.training.flops import operations
from mmalign.training.loop import train
from mmalign.training.prepare import prepare_policy
from mmalign.training.run import Run
from mmalign.training.views import WeightViews
from tests import tiny_video
from tests.conftest import picture

WAN, COG = "Wan 2.1", "CogVideoX 2b"
SETTINGS = tiny_video.SETTINGS[WAN]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return {name: build(tmp_path_factory.mktemp("video")) for name, build in tiny_video.FAMILIES.items()}


@pytest.fixture(params=tiny_video.FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def folder(folders, family):
    return folders[family]


@pytest.fixture
def modality(folder):
    return small(mmalign.load(folder))


def small(modality):
    modality.resolution, modality.num_frames = tiny_video.RUN["resolution"], tiny_video.RUN["num_frames"]
    return modality


@pytest.fixture(scope="session")
def pairs():
    return tiny_video.comparisons(2)


def add_lora(modality):
    config = LoraConfig(r=2, lora_alpha=6, target_modules=modality.lora_targets(), init_lora_weights=False)
    modality.network.add_adapter(config, "policy")
    return modality


def probe_of(modality, comparisons):
    encoded = modality.encode(comparisons)
    n = len(encoded)
    keys = Keys(0, torch.arange(n) // 2, torch.arange(n) % 2, torch.zeros(n, dtype=torch.int64))
    return FreshNoise()(encoded.x0, encoded.cond, keys, modality.path)


def plain_pipeline(folder):
    plain = DiffusionPipeline.from_pretrained(folder)
    plain.set_progress_bar_config(disable=True)
    return plain


def as_it_is(seed):
    """A video that fills the clip's frame."""
    return tiny_video.video(seed, size=(32, 16))


def test_the_surrogate_is_what_the_pipelines_own_parts_give(modality, folder, family):
    """Latents, noisy latents, prediction and target by hand, of a plain pipeline's VAE, scheduler and transformer."""
    pair = Comparison(id="one", prompt="a red fox", media=(as_it_is(1), as_it_is(2)), score=(1, 0))
    plain, probe, encoded = plain_pipeline(folder), probe_of(modality, [pair]), modality.encode([pair])
    clips = [frames_of(medium, modality.own.fps)[:9] for medium in pair.media]
    with torch.no_grad():
        posterior = plain.vae.encode(plain.video_processor.preprocess_video(clips)).latent_dist
        tokens = 512 if family == WAN else 226
        prompt, _ = plain.encode_prompt("a red fox", do_classifier_free_guidance=False, max_sequence_length=tokens)
    named = {"encoder_hidden_states": prompt.expand(2, -1, -1), "return_dict": False}
    if family == WAN:
        config = plain.vae.config
        mean, std = (torch.tensor(values).view(1, 4, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
        x0, x0_std = (posterior.mean - mean) / std, posterior.std / std
        t = probe.t.view(-1, 1, 1, 1, 1)
        noisy, target = (1 - t) * x0 + t * probe.noise, probe.noise - x0
        named["timestep"] = 1000 * probe.t
    else:
        scale = plain.vae.config.scaling_factor
        x0, x0_std = (value.permute(0, 2, 1, 3, 4) * scale for value in (posterior.mean, posterior.std))
        noisy = plain.scheduler.add_noise(x0, probe.noise, probe.t)
        target = plain.scheduler.get_velocity(x0, probe.noise, probe.t)
        named["timestep"] = probe.t
        if family == "CogVideoX 5b":
            named["image_rotary_emb"] = plain._prepare_rotary_positional_embeddings(16, 32, 3, torch.device("cpu"))
    predicted = plain.transformer(hidden_states=noisy, **named)[0]
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(encoded.x0, x0, **close)
    torch.testing.assert_close(encoded.x0_std, x0_std, **close)
    torch.testing.assert_close(probe.x_t, noisy, **close)
    torch.testing.assert_close(probe.target, target, **close)
    torch.testing.assert_close(modality.predict(probe, "policy"), predicted, **close)
    torch.testing.assert_close(
        probe.logp(modality.predict(probe, "policy")), -(predicted - target).square().flatten(1).mean(1) / 2, **close
    )


def test_wans_path_and_scheduler_mean_the_same_time_and_sign(folders):
    modality = mmalign.load(folders[WAN])
    assert modality.path == RectifiedFlow(density="logit-normal", shift=3.0)
    scheduler = modality.pipeline.scheduler
    scheduler.set_timesteps(4)
    sigma = scheduler.sigmas[1:2]
    assert scheduler.timesteps[1].item() == pytest.approx(1000 * sigma.item(), abs=1)
    assert sigma.item() == pytest.approx(3 * 0.75 / (1 + 2 * 0.75), abs=1e-3)
    x0, noise = torch.randn(2, 1, 4, 2, 2, 4)
    noisy = modality.path.interpolate(x0, noise, sigma)
    scheduler._step_index = 1
    torch.testing.assert_close(
        scheduler.convert_model_output(modality.path.target(x0, noise, sigma), sample=noisy), x0, atol=1e-5, rtol=1e-5
    )


def test_cogvideox_has_no_signal_at_the_last_step(folders):
    path = mmalign.load(folders[COG]).path
    x0, noise = torch.randn(2, 1, 2, 4, 2, 4)
    last = torch.tensor([999])
    assert torch.equal(path.interpolate(x0, noise, last), noise)
    assert torch.allclose(path.denoised(path.target(x0, noise, last), noise, last), x0, atol=1e-6)
    shifted, plain = path.alphas_cumprod[500], mmalign.load(folders["CogVideoX 5b"]).path.alphas_cumprod[500]
    assert shifted < plain  # 2b shifts its signal-to-noise ratio by 3


def test_wans_tokens_may_share_a_time(folders):
    """Wan 2.2 TI2V-5B's pipeline gives every token its own, all alike; we give the sample's."""
    network, r = mmalign.load(folders[WAN]).network, torch.Generator().manual_seed(3)
    named = {
        "hidden_states": torch.randn(2, 4, 2, 2, 4, generator=r),
        "encoder_hidden_states": torch.randn(2, 512, 16, generator=r),
    }
    each = network(**named, timestep=torch.tensor([[300.0] * 4, [700.0] * 4]), return_dict=False)[0]
    once = network(**named, timestep=torch.tensor([300.0, 700.0]), return_dict=False)[0]
    assert torch.allclose(each, once, atol=1e-6)


def test_a_clip_is_the_beginning_at_the_models_rate_and_covers_the_frame(modality, family):
    """A picture of 80 x 24 covers 32 x 16 after it was brought to 53 x 16, of which the middle is taken."""
    stripes = [picture(n, size=(80, 24)) for n in range(40)]
    item = Comparison(id="one", prompt="", media=(Video(stripes),), score=(1,))  # without a clock: at the model's rate
    read, _ = modality._read(item, 0, modality.frame(item))
    assert read.shape == (3, 9, 16, 32)
    assert -1 <= read.min() < -0.5 < 0.5 < read.max() <= 1
    shown = stripes[4].resize((53, 16), 1).crop((10, 0, 42, 16))
    assert torch.equal(read[:, 4], torch.tensor(list(shown.getdata())).T.reshape(3, 16, 32) / 127.5 - 1)
    fast = Comparison(id="two", prompt="", media=(make_video(stripes, 2 * modality.own.fps),), score=(1,))
    every_second, _ = modality._read(fast, 0, modality.frame(fast))
    expected, _ = modality._read(replace(item, media=(Video(stripes[::2]),)), 0, (16, 32))
    assert (every_second - expected).abs().mean() < 0.05 < 0.2 < (every_second - read).abs().mean()


@pytest.mark.parametrize(
    ("medium", "sentence"),
    [
        (picture(1), "is a picture where a video is needed; take a model of pictures."),
        ("clip.mp4", "is a picture where a video is needed; take a model of pictures."),
        (make_sound(torch.zeros(100), 16000), "is a sound where a video is needed; take a model of sounds."),
        (Text("words"), "is a text where a video is needed; take a model of texts."),
        (Video("nowhere.mp4"), "video 0 (nowhere.mp4): no such video; check the path."),
        (Video(b"no video"), "cannot be decoded"),
        (Video([picture(1)] * 3), "3 frames at 16 a second where 9 are needed; that is less than a latent frame of 4"),
        (Video([picture(1)] * 7), "7 frames at 16 a second where 9 are needed; set num_frames to 5 or less, or remove"),
        (Video([picture(1, size=(1, 1))] * 9), "too small for 32 x 16"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "medium",
)
def test_a_medium_that_is_no_such_clip_is_one_sentence(medium, sentence, folders):
    modality = small(mmalign.load(folders[WAN]))
    with pytest.raises(UserError) as error:
        modality.encode([Comparison(id="one", prompt="", media=(medium,), score=(1,))])
    assert sentence in str(error.value)
    assert "comparison 'one', video 0" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_codec_is_one_sentence(modality, pairs, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(UserError, match=r"^Videos are read by PyAV: run `pip install mmalign\[video\]`.$"):
        modality.encode(pairs[:1])
    with pytest.raises(UserError, match=r"^Videos are written by PyAV"):
        modality.generate(["a fox"], seeds=[1], **SETTINGS)


def test_lengths_and_sizes_that_do_not_fit_are_said(folders, pairs):
    modality = mmalign.load(folders[WAN])
    assert (modality.num_frames, *modality.frame(pairs[0])) == (81, 480, 832)
    for resolution, frame in ((240, (240, 416)), (720, (720, 1248)), (16, (16, 32))):
        modality.resolution = resolution
        assert modality.frame(pairs[0]) == frame
    modality.resolution = 100
    with pytest.raises(UserError, match=r"176 x 100 pixels: this model takes multiples of 16\."):
        modality.encode(pairs[:1])
    modality.resolution, modality.num_frames = 16, 15
    with pytest.raises(UserError, match="num_frames 15: this model takes 1 and multiples of 4 more, such as 13 or 17"):
        modality.encode(pairs[:1])
    modality.num_frames = 1
    assert modality.encode(pairs[:1]).x0.shape == (2, 4, 1, 2, 4)
    with pytest.raises(UserError, match="num_frames 6"):
        modality.generate(["a fox"], seeds=[1], num_frames=6)
    with pytest.raises(UserError, match="num_frames 6"):
        mmalign.skeleton(folders[WAN]).example(1, 16, torch.float32, 6)


def test_cogvideox_takes_odd_numbers_of_latent_frames(folders, tmp_path):
    modality = mmalign.load(folders[COG])
    with pytest.raises(UserError, match="num_frames 13: this model takes 1 and multiples of 8 more, such as 9 or 17"):
        modality.generate(["a fox"], seeds=[1], num_frames=13)


def test_a_run_asks_videos_for_no_buckets_and_no_seconds(folders):
    run = Run(str(folders[WAN]), "videos", "out", DiffusionDPO(beta=1), 1, 1e-4)
    for changes in ({"aspect_buckets": True}, {"audio_length_in_s": 2.0}):
        with pytest.raises(UserError, match=f"{next(iter(changes))} is given, but .* has no such; leave it out"):
            framed(mmalign.load(folders[WAN]), replace(run, **changes))


def test_wan_with_two_transformers_is_refused(tmp_path):
    folder = tiny_video.tiny_wan(tmp_path, transformer_2=tiny_video.wan_transformer(), boundary_ratio=0.9)
    for load in (mmalign.load, mmalign.skeleton):
        with pytest.raises(UserError, match="has two transformers"):
            load(folder)


def test_cogvideox_one_and_a_half_is_refused(folders, tmp_path):
    config = json.loads((folders[COG] / "transformer" / "config.json").read_text())
    shutil.copytree(folders[COG], tmp_path, dirs_exist_ok=True)
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config | {"patch_size_t": 2}))
    with pytest.raises(UserError, match=r"CogVideoX 1\.5 takes frames in pairs"):
        mmalign.skeleton(tmp_path)


def test_a_batch_encodes_as_its_parts_and_the_empty_prompt_is_one(modality, pairs):
    part, whole = modality.encode(pairs[2:3]), modality.encode(pairs[:3])
    torch.testing.assert_close(whole.x0[4:], part.x0)
    torch.testing.assert_close(whole.cond["prompt_embeds"][4:], part.cond["prompt_embeds"], atol=1e-5, rtol=1e-5)
    assert modality.empty()["prompt_embeds"].shape == (1, *part.cond["prompt_embeds"].shape[1:])


def test_generation_is_the_plain_pipeline_and_does_not_depend_on_the_batch(modality, folder):
    prompts, seeds = ["a fox", "red"], [3, 4]
    videos = modality.generate(prompts, seeds=seeds, negative_prompt="slow", batch_size=2, **SETTINGS)
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    plain = plain_pipeline(folder)(
        prompts, negative_prompt=["slow"] * 2, generator=noise, output_type="pil", **SETTINGS
    )
    assert videos == [make_video(frames, modality.own.fps) for frames in plain.frames]
    (alone,) = modality.generate(prompts[1:], seeds=seeds[1:], negative_prompt="slow", fps=4, **SETTINGS)
    shown, again = (np.stack([np.float32(p) for p in frames_of(v, v.fps)]) for v in (videos[1], alone))
    assert (alone.fps, len(again)) == (4, 9)
    assert np.abs(shown - again).mean() < 4  # of 255: H.264 spends its bits otherwise at another rate
    assert modality.generate(["a fox"], seeds=[9], **SETTINGS) != videos[:1]


def test_length_and_size_of_what_is_made_are_those_of_the_training_clips(modality):
    (made,) = modality.generate(["a fox"], seeds=[1], num_inference_steps=1)
    frames = frames_of(made, modality.own.fps)
    assert (len(frames), frames[0].size) == (9, (32, 16))


def test_saved_lora_gives_the_same_video_in_plain_diffusers_and_comes_back(modality, folder, tmp_path):
    add_lora(modality).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LORA_FILE]
    ours = modality.generate(["a red fox"], seeds=[1], **SETTINGS)
    with WeightViews(modality)("reference"):
        assert modality.generate(["a red fox"], seeds=[1], **SETTINGS) != ours
    plain = plain_pipeline(folder)
    plain.load_lora_weights(tmp_path)
    noise = [torch.Generator().manual_seed(1)]
    theirs = plain("a red fox", generator=noise, output_type="pil", **SETTINGS).frames[0]
    assert ours == [make_video(theirs, modality.own.fps)]
    again = mmalign.load(folder, lora=tmp_path, dtype=torch.bfloat16)
    trained = {name: p for name, p in again.network.named_parameters() if ".policy." in name}
    assert trained.keys() == {name for name, _ in modality.network.named_parameters() if ".policy." in name}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert (again.network.dtype, again.pipeline.vae.dtype) == (torch.bfloat16, torch.float32)


def test_half_precision_predicts_about_the_same(modality, folder, pairs):
    probe = probe_of(modality, pairs[:1])
    half = mmalign.load(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        full, rough = modality.predict(probe, "policy"), half.predict(probe, "policy")
    assert (full - rough.float()).norm() < 0.05 * full.norm()


@pytest.fixture
def recipe(folder, tmp_path):
    return Run(
        pretrained_model_name_or_path=str(folder),
        dataset_name="videos",
        output_dir=str(tmp_path / "run"),
        objective=DiffusionDPO(beta=100),
        max_train_steps=2,
        learning_rate=1e-2,
        train_batch_size=2,
        rank=2,
        proportion_empty_prompts=0.2,
        checkpointing_steps=1,
        seed=7,
        **tiny_video.RUN,
    )


@pytest.mark.parametrize("changes", [{}, {"use_lora": False}, {"resolution": 32, "num_frames": 17}], ids=str)
def test_the_memory_plan_counts_what_autograd_keeps(recipe, changes, pairs):
    run = replace(recipe, **changes)
    skeleton = mmalign.skeleton(run.pretrained_model_name_or_path)
    trained, planned = memory.measured(skeleton, run, samples=2, dtype=torch.float32)
    modality = mmalign.load(run.pretrained_model_name_or_path)
    prepare_policy(modality, run)
    shape = next(iter(skeleton.example(2, run.resolution, torch.float32, run.num_frames).values())).shape
    if run.num_frames == 9:
        assert modality.encode(pairs[:1]).x0.shape == shape
    one = probe_of(small(mmalign.load(run.pretrained_model_name_or_path)), pairs[:1])
    probe = NoisedProbe(one.path, torch.randn(shape), one.t, torch.randn(shape), one.cond)
    with memory.Saved(modality.network) as kept:
        modality.predict(probe, "policy")
    assert trained == sum(p.numel() for p in modality.network.parameters() if p.requires_grad)
    assert planned == pytest.approx(kept.bytes, rel=0.1)


@pytest.mark.parametrize("family", [WAN, COG], indirect=True)
def test_the_plan_and_the_count_of_operations_see_the_vae(recipe):
    plain = memory.plan(recipe, torch.float32).parts
    assert plain["encoders and VAE"] > 0
    longer = memory.plan(replace(recipe, num_frames=17), torch.float32).parts
    assert longer["activations"] > plain["activations"]
    checkpointed = memory.plan(replace(recipe, gradient_checkpointing=True), torch.float32).parts
    assert checkpointed["activations"] < plain["activations"]
    few, more = (operations(replace(recipe, num_frames=n))["VAE"] for n in (9, 17))
    assert more > 1.5 * few > 0


@pytest.mark.parametrize("family", [WAN, COG], indirect=True)
def test_two_steps_of_dpo_start_at_ln_2_resume_and_checkpoint_bit_for_bit(recipe, pairs, tmp_path):
    def run_it(run):
        modality = mmalign.load(run.pretrained_model_name_or_path, dtype=torch.float64)
        output = train(run, modality=modality, comparisons=pairs, say=lambda line: None)
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows], load_file(output / LORA_FILE)

    losses, weights = run_it(replace(recipe, output_dir=str(tmp_path / "whole")))
    assert losses[0] == pytest.approx(0.6931471805599453, rel=1e-9)
    assert losses[1] != losses[0]
    run_it(replace(recipe, max_train_steps=1))
    resumed, same = run_it(replace(recipe, resume_from_checkpoint="latest"))
    assert resumed == losses
    assert all(torch.equal(same[key], weights[key]) for key in weights)
    cut = {"gradient_checkpointing": True, "backward": "two-pass", "rows_at_once": 3, "attention": "math"}
    other, _ = run_it(replace(recipe, **cut, output_dir=str(tmp_path / "cut")))
    assert other == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize(("name", "family"), [("wan_flow_dpo", WAN), ("cogvideox_diffusion_dpo", "CogVideoX 5b")])
def test_the_recipes_train_a_tiny_model_of_their_family(name, family, folders, pairs, tmp_path):
    small_run = {"max_train_steps": 1, "gradient_accumulation_steps": 1, "dataloader_num_workers": 0, "rank": 2}
    run = replace(load_recipe(name), output_dir=str(tmp_path), validation_prompts=(), **small_run, **tiny_video.RUN)
    run = replace(run, pretrained_model_name_or_path=str(folders[family]))
    train(run, modality=mmalign.load(folders[family]), comparisons=pairs, say=lambda line: None)
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert row["loss"] == pytest.approx(0.6931471805599453, rel=1e-4)


def test_training_from_a_cache_needs_no_vae_and_learns_the_same(folders, pairs, tmp_path):
    """From the data on the disk: videos by their paths, encoded once, trained without VAE and text encoder."""
    (tmp_path / "data").mkdir()
    rows = []
    for item in pairs:
        paths = [f"{item.id}-{n}.mp4" for n in range(2)]
        for path, medium in zip(paths, item.media, strict=True):
            (tmp_path / "data" / path).write_bytes(medium.source)
        rows.append(
            {"id": item.id, "prompt": item.prompt, "media": [{"video": path} for path in paths], "score": item.score}
        )
    (tmp_path / "data" / "comparisons.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = Run(
        pretrained_model_name_or_path=str(folders[WAN]),
        dataset_name=str(tmp_path / "data"),
        output_dir=str(tmp_path / "live"),
        objective=DiffusionDPO(beta=100),
        max_train_steps=2,
        learning_rate=1e-2,
        rank=2,
        seed=3,
        **tiny_video.RUN,
    )

    def losses(run):
        output = train(run, say=lambda line: None)
        return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]

    cached = losses(replace(run, cache_dir=str(tmp_path / "cache"), output_dir=str(tmp_path / "cached")))
    assert cached == pytest.approx(losses(run), rel=1e-5)
