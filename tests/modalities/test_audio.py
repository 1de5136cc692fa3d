"""AudioLDM2 and Stable Audio on tiny models with the real architectures and file layouts."""

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from diffusers import CosineDPMSolverMultistepScheduler, DiffusionPipeline
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from transformers import GPT2Model

import mmalign
from mmalign.data.users import Users, write_users
from mmalign.media import make_sound
from mmalign.modalities.audio import AudioLDM2Modality, log_mel
from mmalign.objectives import PPD, DiffusionDPO, MaPO
from mmalign.records import Sound, UserError
from mmalign.surrogate import FreshNoise, Keys, VDiffusion
from mmalign.training import memory
from mmalign.training.loop import train
from mmalign.training.prepare import prepare_policy
from mmalign.training.run import Run
from mmalign.training.views import WeightViews
from tests.tiny_audio import FAMILIES, RATE, SETTINGS, comparisons, wave

quiet = {"say": lambda line: None}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: make(tmp_path_factory.mktemp("tiny")) for name, make in FAMILIES.items()}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def folder(family, folders):
    return folders[family]


@pytest.fixture
def modality(folder):
    return mmalign.load(folder)


@pytest.fixture
def audioldm2(folders):
    return mmalign.load(folders["AudioLDM2"])


@pytest.fixture
def stable_audio(folders):
    return mmalign.load(folders["Stable Audio"])


def with_media(*media):
    return replace(comparisons(2)[0], media=media, score=tuple(range(len(media))))


def probe_of(modality, items):
    encoded = modality.encode(items)
    n = len(encoded)
    keys = Keys(0, torch.arange(n) // 2, torch.arange(n) % 2, torch.zeros(n, dtype=torch.int64))
    return FreshNoise()(encoded.x0, encoded.cond, keys, modality.path)


def plain_pipeline(folder):
    plain = DiffusionPipeline.from_pretrained(folder)
    plain.set_progress_bar_config(disable=True)
    return plain


def empty_wav():
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros((0, 1)), RATE, format="WAV")
    return buffer.getvalue()


def samples(sound):
    with soundfile.SoundFile(io.BytesIO(sound.source)) as file:
        return file.read(always_2d=True).T, file.samplerate


def slaney(hz):
    """Slaney's mel scale: 3 mel to 200 Hz up to 1000 Hz, then 27 mel to a factor of 6.4."""
    hz = np.asarray(hz, dtype=np.float64)
    return np.where(hz < 1000, hz * 3 / 200, 15 + 27 * np.log(np.maximum(hz, 1) / 1000) / np.log(6.4))


def by_hand_mel(x):
    """The official front end's numbers in float64, from its constants: a sum for each frequency and band."""
    window, hop, bins = 1024, 160, 64
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    padded = np.concatenate([x[1:513][::-1], x, x[-513:-1][::-1]])
    frames = np.stack([padded[k * hop : k * hop + window] * hann for k in range(len(x) // hop)])
    turns = np.exp(-2j * np.pi * np.outer(np.arange(window), np.arange(513)) / window)
    magnitudes = np.abs(frames @ turns)
    grid = np.linspace(0, 8000, 100_001)
    edges = np.interp(np.linspace(0, slaney(8000), bins + 2), slaney(grid), grid)
    bands, f = [], np.arange(513) * RATE / window
    for low, top, high in zip(edges, edges[1:], edges[2:], strict=False):
        triangle = np.clip(np.minimum((f - low) / (top - low), (high - f) / (high - top)), 0, None)
        bands.append(triangle * 2 / (high - low))
    return np.log(np.maximum(magnitudes @ np.array(bands).T, 1e-5))


def test_log_mel_is_the_official_front_end():
    x = wave(3, 0.4)[0].astype(np.float64)
    mel = log_mel(torch.from_numpy(x), RATE, 160, 64)
    assert mel.shape == (40, 64)
    expected = by_hand_mel(x)
    error, loud = np.abs(mel.numpy() - expected), expected > -5
    assert loud.sum() > 500
    assert error[loud].max() < 1e-4
    assert error.max() < 2e-3  # torchaudio's bands are float32, and this is a logarithm of little
    assert torch.equal(log_mel(torch.zeros(1, 1600), RATE, 160, 64), torch.full((1, 10, 64), math.log(1e-5)))


def test_a_sound_is_brought_to_half_its_peak_without_its_mean_and_ends_in_silence(audioldm2):
    x = wave(1, 0.2)
    seen, size = audioldm2._read(with_media(make_sound(0.5 * x + 0.1, RATE)), 0, (5120,))
    heard = soundfile.read(io.BytesIO(make_sound(0.5 * x + 0.1, RATE).source), dtype="float32")[0]
    centred = heard - heard.mean()
    padded = np.concatenate([0.5 * centred / np.abs(centred).max(), np.zeros(5120 - len(centred))])
    assert seen.shape == (1, 32, 64)
    assert np.abs(seen[0].numpy() - by_hand_mel(padded)).max() < 1e-2
    assert size == [1.0]
    assert audioldm2._read(with_media(make_sound(np.zeros(3000), RATE)), 0, (5120,))[0].isfinite().all()


def test_encode_gives_the_vaes_latents_of_the_models_own_length(audioldm2, stable_audio):
    items = comparisons(2)[:2]
    encoded = audioldm2.encode(items)
    assert encoded.x0.shape == encoded.x0_std.shape == (4, 8, 8, 16)
    mel, _ = audioldm2._read(items[0], 0, audioldm2.frame(items[0]))
    posterior = audioldm2.pipeline.vae.encode(mel[None]).latent_dist
    assert torch.allclose(encoded.x0[:1], posterior.mean * 0.9, atol=1e-5)
    assert torch.allclose(encoded.x0_std[:1], posterior.std * 0.9, atol=1e-5)
    encoded = stable_audio.encode(items)
    assert encoded.x0.shape == (4, 8, 16)
    x, _ = samples(items[1].media[1])
    assert x.shape == (1, 4000)
    stereo = torch.from_numpy(np.pad(x.repeat(2, 0), ((0, 0), (0, 1120)))).float()
    posterior = stable_audio.pipeline.vae.encode(stereo[None]).latent_dist
    assert torch.allclose(encoded.x0[3:], posterior.mean, atol=1e-5)
    assert torch.allclose(encoded.x0_std[3:], posterior.std, atol=1e-5)
    stable_audio.audio_length_in_s = 0.1  # 1600 samples are 5 latents
    assert stable_audio.encode(items).x0.shape == (4, 8, 5)


def test_the_surrogate_is_what_the_pipelines_own_parts_give(audioldm2, stable_audio):
    items = comparisons(2)[:2]
    probe = probe_of(audioldm2, items)
    pipeline = audioldm2.pipeline
    prompts = [item.prompt for item in items for _ in item.media]
    for row, prompt in enumerate(prompts):
        embeds, mask, generated = pipeline.encode_prompt(prompt, "cpu", 1, False)
        noisy = pipeline.scheduler.add_noise(probe.x0[row], probe.noise[row], probe.t[row])[None]
        said = pipeline.unet(
            noisy,
            probe.t[row],
            encoder_hidden_states=generated,
            encoder_hidden_states_1=embeds,
            encoder_attention_mask_1=mask,
        ).sample[0]
        logp = -0.5 * (probe.noise[row] - said).square().mean()
        assert torch.allclose(probe.logp(audioldm2.predict(probe, "policy"))[row], logp, atol=1e-5)
    probe = probe_of(stable_audio, items)
    pipeline = stable_audio.pipeline
    assert isinstance(stable_audio.path, VDiffusion)
    for row, prompt in enumerate(prompts):
        embeds = pipeline.encode_prompt(prompt, "cpu", False)
        start, end = pipeline.encode_duration(0.0, 1.0, "cpu", False, 1)
        # The scheduler's sigma: it feeds x / sqrt(sigma^2 + 1), and says its own count of time
        sigma = torch.tan(probe.t[row] * torch.pi / 2)
        noisy = (probe.x0[row] + sigma * probe.noise[row])[None]
        said = pipeline.transformer(
            noisy / (sigma**2 + 1).sqrt(),
            pipeline.scheduler.precondition_noise(sigma)[None],
            encoder_hidden_states=torch.cat([embeds, start, end], dim=1),
            global_hidden_states=torch.cat([start, end], dim=2),
            rotary_embedding=get_1d_rotary_pos_embed(4, 17, use_real=True, repeat_interleave_real=False),
        ).sample[0]
        denoised = noisy[0] / (sigma**2 + 1) - sigma / (sigma**2 + 1).sqrt() * said  # c_skip, c_out of v-prediction
        error = (probe.x0[row] - denoised) * (sigma**2 + 1).sqrt() / sigma
        logp = -0.5 * error.square().mean()
        assert torch.allclose(probe.logp(stable_audio.predict(probe, "policy"))[row], logp, atol=1e-5)


def test_the_published_scheduler_says_t_itself(stable_audio, monkeypatch):
    monkeypatch.setattr(stable_audio.pipeline, "scheduler", CosineDPMSolverMultistepScheduler())
    t = torch.tensor([0.1, 0.5, 0.9])
    told = stable_audio._arguments(torch.zeros(3, 4, 16), t, {"states": None, "seconds": None})
    assert torch.allclose(told["timestep"], t, atol=1e-6)


def test_stable_audio_is_told_the_seconds_of_a_lists_first_sound(stable_audio):
    long, short = make_sound(wave(1, 2.3), RATE), make_sound(wave(2), RATE)
    encoded = stable_audio.encode([with_media(long, short), with_media(short, short)])
    embed = stable_audio.pipeline.encode_duration
    for rows, seconds in ((slice(0, 2), 3.0), (slice(2, 4), 1.0)):
        start, end = embed(0.0, seconds, "cpu", False, 1)
        assert torch.allclose(encoded.cond["seconds"][rows], torch.cat([start, end], 2).expand(2, -1, -1))
        assert torch.allclose(encoded.cond["states"][rows, -1:], end.expand(2, -1, -1))
    assert encoded.x0.shape == (4, 8, 16)


def test_a_batch_encodes_as_its_parts_and_the_empty_prompt_is_guidances(modality, family):
    items = comparisons(2)
    whole, part = modality.encode(items), modality.encode(items[1:2])
    assert torch.allclose(whole.x0[2:4], part.x0, atol=1e-5)
    for name, value in part.cond.items():
        assert torch.allclose(whole.cond[name][2:4].float(), value.float(), atol=1e-5)
    empty = modality.empty()
    dropped = whole.cond.where(torch.tensor([True] + [False] * 7), empty)
    if family == "Stable Audio":
        assert not dropped["states"][0].any()
        assert torch.equal(dropped["seconds"], whole.cond["seconds"])
    else:
        assert dropped["attention_mask"][0].sum() == 1  # T5's end
        assert torch.equal(dropped["prompt_embeds"][1:], whole.cond["prompt_embeds"][1:])


def test_generation_is_the_plain_pipeline_and_does_not_depend_on_the_batch(modality, folder, family):
    prompts, seeds = ["a dog barks then rain", "rain", "a dog"], [3, 4, 5]
    settings = SETTINGS[family]
    made = modality.generate(prompts, seeds=seeds, **settings, batch_size=2, negative_prompt="wind")
    plain = plain_pipeline(folder)
    for prompt, seed, sound in zip(prompts, seeds, made, strict=True):
        noise = torch.Generator().manual_seed(seed)
        audio = plain(prompt, generator=noise, **settings, negative_prompt="wind").audios[0]
        expected, rate = samples(make_sound(np.asarray(audio), RATE))
        heard, own_rate = samples(sound)
        assert own_rate == rate == sound.sample_rate_hz == RATE
        assert expected.shape == heard.shape == (2 if family == "Stable Audio" else 1, 5120)
        assert np.abs(expected).max() > 0.05
        assert np.abs(expected - heard).max() < 1e-3  # batched kernels round otherwise
    alone = modality.generate(prompts[:1], seeds=seeds[:1], **settings)[0]
    theirs = plain(prompts[0], generator=torch.Generator().manual_seed(3), **settings).audios[0]
    assert alone.source == make_sound(np.asarray(theirs), RATE).source
    assert alone.source != modality.generate(prompts[:1], seeds=[9], **settings)[0].source
    assert samples(modality.generate(["a dog"], seeds=[1], **settings, audio_length_in_s=0.1)[0])[0].shape[1] == 1600


def test_published_folders_name_a_gpt2_that_cannot_generate(folders, audioldm2):
    again = mmalign.load(folders["AudioLDM2"])
    again.pipeline.language_model = again.pipeline.language_model.transformer
    assert isinstance(again.pipeline.language_model, GPT2Model)
    expected, got = audioldm2._embed(["rain"]), again._embed(["rain"])
    assert torch.equal(got["generated_prompt_embeds"], expected["generated_prompt_embeds"])


def add_lora(modality):
    config = LoraConfig(r=2, lora_alpha=6, target_modules=modality.lora_targets(), init_lora_weights=False)
    inject_adapter_in_model(config, modality.network, "policy")
    return modality


def test_saved_lora_sounds_the_same_in_plain_peft_and_comes_back(modality, folder, family, tmp_path):
    add_lora(modality).save(tmp_path)
    settings = SETTINGS[family]
    ours = modality.generate(["rain"], seeds=[1], **settings)[0]
    with WeightViews(modality)("reference"):
        base = modality.generate(["rain"], seeds=[1], **settings)[0]
    assert ours.source != base.source
    assert base.source == mmalign.load(folder).generate(["rain"], seeds=[1], **settings)[0].source
    plain = plain_pipeline(folder)
    PeftModel.from_pretrained(getattr(plain, modality.part), tmp_path)
    theirs = plain("rain", generator=torch.Generator().manual_seed(1), **settings).audios[0]
    assert ours.source == make_sound(np.asarray(theirs), RATE).source
    again = mmalign.load(folder, lora=tmp_path)
    assert again.generate(["rain"], seeds=[1], **settings)[0].source == ours.source


def test_bfloat16_generates_with_a_float32_vae(folder, family):
    modality = mmalign.load(folder, dtype=torch.bfloat16)
    assert modality.pipeline.vae.dtype == torch.float32
    heard, _ = samples(modality.generate(["rain"], seeds=[1], **SETTINGS[family])[0])
    assert np.isfinite(heard).all()
    assert heard.any()


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (lambda: make_sound(wave(1, channels=2), RATE), "has 2 channels, and .* makes 1; mix them"),
        (lambda: make_sound(wave(1, 0.01), RATE), "160 samples are less than a latent .640 of 16000 Hz"),
        (lambda: Sound(empty_wav()), "holds no samples"),
        (lambda: "nowhere.flac", "no such sound"),
    ],
)
def test_a_sound_that_does_not_fit_is_one_sentence(made, sentence, audioldm2):
    with pytest.raises(UserError, match=sentence) as error:
        audioldm2.encode([with_media(made(), make_sound(wave(2), RATE))])
    assert "\n" not in str(error.value)
    assert "'sounds-0', sound 0" in str(error.value)


def test_channels_and_lengths_of_a_stereo_model(stable_audio):
    stereo = make_sound(wave(1, channels=2), RATE)
    encoded = stable_audio.encode([with_media(stereo, make_sound(wave(1), RATE))])
    assert not torch.allclose(encoded.x0[0], encoded.x0[1], atol=1e-3)
    with pytest.raises(UserError, match=r"has 3 channels, and .* makes 2"):
        stable_audio.encode([with_media(make_sound(wave(1, channels=3), RATE))])
    for seconds in (0.4, 0.01):
        stable_audio.audio_length_in_s = seconds
        with pytest.raises(UserError, match=rf"audio_length_in_s {seconds}: .* takes 0.02 to 0.32 seconds"):
            stable_audio.encode([with_media(stereo)])
        with pytest.raises(UserError, match=r"takes 0\.02 to 0\.32 seconds"):
            stable_audio.generate(["rain"], seeds=[1])


def test_a_speech_model_is_refused(audioldm2, monkeypatch):
    monkeypatch.setattr(audioldm2.pipeline.text_encoder_2.config, "model_type", "vits")
    with pytest.raises(UserError, match="speaks transcriptions"):
        AudioLDM2Modality(audioldm2.pipeline, "speech")


def test_a_missing_package_is_one_sentence(folders, tmp_path):
    """The published scheduler of Stable Audio needs torchsde."""
    folder = tmp_path / "published"
    folder.mkdir()
    for path in folders["Stable Audio"].iterdir():
        (folder / path.name).symlink_to(path)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").unlink()
    index["scheduler"] = ["diffusers", "DPMSolverSDEScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    try:
        import torchsde  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        with pytest.raises(UserError, match="requires the torchsde library") as error:
            mmalign.load(folder)
        assert "\n" not in str(error.value)
    else:
        mmalign.load(folder)


@pytest.fixture
def recipe(folder, tmp_path):
    return Run(
        pretrained_model_name_or_path=str(folder),
        dataset_name="sounds",
        output_dir=str(tmp_path / "run"),
        objective=DiffusionDPO(beta=2000),
        max_train_steps=2,
        learning_rate=1e-2,
        train_batch_size=2,
        rank=2,
        proportion_empty_prompts=0.2,
        seed=7,
    )


@pytest.mark.parametrize("changes", [{"audio_length_in_s": 0.16}, {"use_lora": False}], ids=str)
def test_the_memory_plan_counts_what_autograd_keeps(recipe, changes, monkeypatch):
    monkeypatch.setattr("mmalign.modalities.audio.FLAN_T5_TOKENS", 32)
    monkeypatch.setattr("mmalign.modalities.audio.T5_TOKENS", 32)
    run = replace(recipe, **changes)
    skeleton = mmalign.skeleton(run.pretrained_model_name_or_path)
    trained, planned = memory.measured(skeleton, run, samples=4, dtype=torch.float32)
    modality = mmalign.load(run.pretrained_model_name_or_path)
    prepare_policy(modality, run)
    items = comparisons(2)[:2]
    probe = probe_of(modality, items)
    with memory.Saved(modality.network) as kept:
        modality.predict(probe, "policy")
    assert trained == sum(p.numel() for p in modality.network.parameters() if p.requires_grad)
    assert planned == pytest.approx(kept.bytes, rel=0.1)
    assert skeleton.media(1, None, run.length)[1:] == modality._read(items[0], 0, modality.frame(items[0]))[0].shape
    if not run.use_lora:
        assert {"network", "vae", "text_encoder", "projection_model"} <= skeleton.parts.keys()
        checkpointed = memory.plan(replace(run, gradient_checkpointing=True), torch.float32).parts
        assert checkpointed["activations"] < planned
        assert checkpointed["encoders and VAE"] > 0


def losses(output):
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_two_steps_start_at_ln_2_alike_in_parts_and_from_a_cache(recipe, family, tmp_path):
    def run_it(name, comparisons=None, **changes):
        run = replace(recipe, output_dir=str(tmp_path / name), **changes)
        modality = None
        if comparisons is not None:
            modality = mmalign.load(run.pretrained_model_name_or_path, dtype=torch.float32)
        return losses(train(run, modality=modality, comparisons=comparisons, **quiet))

    items = comparisons(2)
    whole = run_it("whole", items)
    assert whole[0] == pytest.approx(math.log(2), rel=1e-6)
    assert whole[1] != whole[0]
    cut = {"gradient_checkpointing": True, "backward": "two-pass", "rows_at_once": 3}
    assert run_it("cut", items, **cut) == pytest.approx(whole, rel=1e-3)
    data = tmp_path / "data"
    data.mkdir()
    rows = []
    for item in items:
        for k, sound in enumerate(item.media):
            (data / f"{item.id}-{k}.flac").write_bytes(sound.source)
        names = [{"sound": f"{item.id}-{k}.flac"} for k in range(2)]
        rows.append({"id": item.id, "prompt": item.prompt, "media": names, "score": item.score})
    (data / "comparisons.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cached = run_it("cached", dataset_name=str(data), cache_dir=str(tmp_path / "cache"))
    assert cached == pytest.approx(run_it("live", dataset_name=str(data)), rel=1e-4)


def test_ppd_tells_the_network_whose_taste_it_is(recipe, folder, family, tmp_path):
    write_users(tmp_path / "users.safetensors", Users({"user-0": torch.tensor([1.0, -1]), "user-1": torch.ones(2)}, {}))
    users = {"users": str(tmp_path / "users.safetensors"), "user_dropout": 0.0}
    run = replace(recipe, objective=PPD(beta=500), **users, learning_rate=0.1)
    output = train(run, modality=mmalign.load(folder), comparisons=comparisons(2), **quiet)
    assert losses(output)[1] != losses(output)[0]
    again_run = replace(run, output_dir=str(tmp_path / "checkpointed"), gradient_checkpointing=True)
    checkpointed = train(again_run, modality=mmalign.load(folder), comparisons=comparisons(2), **quiet)
    assert losses(checkpointed) == pytest.approx(losses(output), rel=1e-4)
    again = mmalign.load(folder, user_layers=output)
    base, nobody, somebody = (
        again.generate(["rain"], seeds=[1], **SETTINGS[family], user=user)[0].source
        for user in (None, torch.zeros(2), torch.tensor([1.0, -1]))
    )
    assert base == nobody == mmalign.load(folder).generate(["rain"], seeds=[1], **SETTINGS[family])[0].source
    assert somebody != base


def test_mapo_trains_the_whole_network_and_its_folder_is_a_pipeline(recipe, folder, family):
    run = replace(recipe, objective=MaPO(), use_lora=False, learning_rate=1e-3)
    modality = mmalign.load(folder)
    output = train(run, modality=modality, comparisons=comparisons(2), **quiet)
    ours = modality.generate(["rain"], seeds=[1], **SETTINGS[family])[0]
    plain = plain_pipeline(output)
    theirs = plain("rain", generator=torch.Generator().manual_seed(1), **SETTINGS[family]).audios[0]
    assert ours.source == make_sound(np.asarray(theirs), RATE).source
    assert ours.source != mmalign.load(folder).generate(["rain"], seeds=[1], **SETTINGS[family])[0].source
