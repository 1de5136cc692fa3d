"""CLAP's front end against the official arithmetic, and the properties every scorer must have."""

import io
import json

import numpy as np
import pytest
import soundfile
import torch
import yaml

from mmalign.media import sound_of
from mmalign.records import Sound, UserError
from mmalign.scoring import clap, load_scorer

RATE = 48_000
TIME = np.arange(RATE) / RATE
NOISE = np.random.default_rng(0)
WAVES = {
    "tone": 0.5 * np.sin(2 * np.pi * 1000 * TIME),
    "high tone": 0.3 * np.sin(2 * np.pi * 9999 * TIME),
    "chirp": 0.9 * np.sin(2 * np.pi * 3000 * TIME**2),
    "noise": NOISE.normal(0, 0.1, RATE),
    "quiet": NOISE.normal(0, 1e-4, RATE),
    "too loud": NOISE.normal(0, 2, RATE),
    "silence": np.zeros(RATE),
    "one sample": np.array([0.3]),
    "ten seconds": NOISE.normal(0, 0.1, 10 * RATE),
    "nearly ten": NOISE.normal(0, 0.1, 10 * RATE - 7),
}
WAVES = {name: wave.astype(np.float32) for name, wave in WAVES.items()}
LONG = NOISE.normal(0, 0.1, 23 * RATE).astype(np.float32) * np.linspace(0.1, 1, 23 * RATE, dtype=np.float32)


# --- the official front end, from its description, in float64 ---


def official(wave, fusion):
    """[T] of at most 10 s at 48 kHz -> [1001, 64] dB."""
    wave = (wave.clip(-1, 1) * np.float32(32767)).astype(np.int16) / 32767.0
    wave = np.concatenate([wave] * (480_000 // len(wave)))
    return official_mel(np.concatenate([wave, np.zeros(480_000 - len(wave))]), fusion)


def official_mel(wave, fusion):
    padded = np.pad(wave.astype(np.float32).astype(np.float64), 512, mode="reflect")
    frames = np.stack([padded[480 * i : 480 * i + 1024] for i in range(1 + len(wave) // 480)])
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    power = np.abs(np.fft.rfft(frames * hann)) ** 2
    return 10 * np.log10(np.maximum(power @ triangles(fusion), 1e-10))


def triangles(fusion):
    """[513, 64]: HTK's mel without norm for fusion, Slaney's with the area of each filter 1 otherwise."""
    if fusion:
        to_mel, to_hz = lambda f: 2595 * np.log10(1 + f / 700), lambda m: 700 * (10 ** (m / 2595) - 1)
    else:
        to_mel = lambda f: f * 3 / 200 if f < 1000 else 15 + 27 * np.log(f / 1000) / np.log(6.4)  # noqa: E731
        to_hz = np.vectorize(lambda m: m * 200 / 3 if m < 15 else 1000 * 6.4 ** ((m - 15) / 27))
    edges = to_hz(np.linspace(to_mel(50), to_mel(14_000), 66))
    hertz = np.arange(513)[:, None] * 48_000 / 1024
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    weights = np.maximum(0, np.minimum((hertz - low) / (middle - low), (high - hertz) / (high - middle)))
    return weights if fusion else weights * 2 / (high - low)


@pytest.mark.parametrize("fusion", [False, True])
@pytest.mark.parametrize("name", WAVES)
def test_the_front_end_is_the_official_one(name, fusion):
    mel, longer = clap.features(WAVES[name], fusion=fusion)
    assert mel.shape == (4 if fusion else 1, 1001, 64)
    assert mel.dtype == torch.float32
    assert not longer
    for channel in mel:
        np.testing.assert_allclose(channel, official(WAVES[name], fusion), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("fusion", "truncation"), [(False, "rand_trunc"), (True, "fusion")])
def test_transformers_agrees_when_it_starts_at_50_hertz(fusion, truncation):
    from transformers import ClapFeatureExtractor

    for name in ("tone", "noise", "silence", "nearly ten"):
        wave = (WAVES[name].clip(-1, 1) * np.float32(32767)).astype(np.int16) / 32767.0
        for lowest, agrees in ((50, True), (0, name == "silence")):
            extractor = ClapFeatureExtractor(frequency_min=lowest, truncation=truncation)
            theirs = extractor(wave.astype(np.float32), sampling_rate=RATE)["input_features"][0]
            worst = np.abs(clap.features(WAVES[name], fusion=fusion)[0].numpy() - theirs).max()
            assert (worst < 1e-2) == agrees


# --- long sounds ---


@pytest.mark.parametrize("seed", [None, b"a"])
def test_a_long_sound_is_cut_to_ten_seconds(seed):
    mel, longer = clap.features(LONG, fusion=False, seed=seed)
    assert not longer
    whole = official_mel((LONG.clip(-1, 1) * np.float32(32767)).astype(np.int16) / 32767.0, False)
    # a cut may begin between two frames: its middle frames are bracketed by loudness, which rises all along
    loud, rising = mel[0, 2:-2].mean().item(), whole.mean(1)
    places = [rising[start : start + 1001].mean() for start in (0, 1300)]
    assert places[0] - 0.1 < loud < places[1] + 0.1
    if seed is None:
        start = (len(LONG) - 480_000) // 2
        np.testing.assert_allclose(mel[0], official(LONG[start : start + 480_000], False), atol=1e-3, rtol=0)


@pytest.mark.parametrize("seed", [None, b"a", b"b"])
def test_fusion_takes_the_whole_and_a_cut_of_each_third(seed):
    mel, longer = clap.features(LONG, fusion=True, seed=seed)
    assert mel.shape == (4, 1001, 64)
    assert longer
    whole = official_mel((LONG.clip(-1, 1) * np.float32(32767)).astype(np.int16) / 32767.0, True)
    thirds = np.array_split(np.arange(len(whole) - 1000), 3)
    for cut, third in zip(mel[1:], thirds, strict=True):
        found = [s for s in third if np.abs(whole[s : s + 1001] - cut.numpy()).max() < 1e-3]
        assert len(found) == 1
        assert seed is not None or found == [(third[0] + third[-1]) // 2]
    np.testing.assert_allclose(mel[0].mean(), whole.mean(), atol=0.05)


@pytest.mark.parametrize("beyond", [1, 479, 480, 960, 1440])
def test_a_little_over_ten_seconds(beyond):
    wave = LONG[: 480_000 + beyond]
    for seed in (None, b"a"):
        mel, longer = clap.features(wave, fusion=True, seed=seed)
        assert mel.shape == (4, 1001, 64)
        assert longer == (beyond >= 480)
        assert clap.features(wave, fusion=False, seed=seed)[0].shape == (1, 1001, 64)


def test_the_content_decides_the_place_of_a_cut():
    first, again, other = (clap.features(LONG, fusion=False, seed=s)[0] for s in (b"a", b"a", b"b"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# --- decoding ---


# --- the whole scorer, on random weights in the layout of the real folder ---


def write_clap(folder, fusion=False):
    from transformers import ClapConfig, ClapModel, RobertaTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    symbols = ["<s>", "<pad>", "</s>", "<unk>", *bytes_to_unicode().values(), "Ġdog", "<mask>"]
    merges = ["Ġ d", "o g", "Ġd og"]
    symbols += [merge.replace(" ", "") for merge in merges[:2]]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({symbol: i for i, symbol in enumerate(symbols)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    RobertaTokenizer.from_pretrained(folder, model_max_length=512).save_pretrained(folder)
    text = {"vocab_size": len(symbols), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"intermediate_size": 32, "projection_dim": 16, "max_position_embeddings": 514}
    audio = {"patch_embeds_hidden_size": 4, "hidden_size": 32, "depths": [1, 1, 1, 1]}
    audio |= {"num_attention_heads": [1, 2, 2, 2], "projection_dim": 16}
    audio |= {"enable_fusion": True, "fusion_type": "aff_2d"} if fusion else {}
    torch.manual_seed(0)
    model = ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=16))
    for parameter in model.parameters():  # as initialised the embeddings are all but equal
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.3)
    model.audio_model.audio_encoder.batch_norm.running_mean.fill_(-40)
    model.audio_model.audio_encoder.batch_norm.running_var.fill_(400)
    model.save_pretrained(folder)
    return folder


def write_card(folder, **changes):
    facts = {"name": "tiny", "family": "clap", "judges": "audio", "model": {"transformers": "model"}}
    (folder / "card.yaml").write_text(yaml.safe_dump(facts | changes))
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "fusion"])
def folder(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("clap")
    write_clap(place / "model", request.param)
    return write_card(place)


@pytest.fixture(scope="module")
def tiny(folder):
    return load_scorer(folder)


def encoded(wave):
    file = io.BytesIO()
    soundfile.write(file, wave, RATE, format="WAV", subtype="FLOAT")
    return file.getvalue()


NAMES = ["tone", "noise", "silence", "one sample", "chirp"]
MEDIA = [Sound(encoded(WAVES[name])) for name in NAMES] + [Sound(encoded(LONG))]
PROMPTS = ["a dog", "rain on a roof", "nothing", "", "a dog", "<s> " + "long " * 100]


def test_scores_are_cosines_of_the_model(tiny):
    scores = tiny.score(MEDIA, PROMPTS)
    assert scores.isfinite().all()
    assert scores.unique().numel() == len(MEDIA)
    for medium, prompt, score in zip(MEDIA, PROMPTS, scores, strict=True):
        mel, longer = clap.features(sound_of(medium, RATE, mono=True)[0][0], fusion=tiny.fusion, seed=medium.source)
        # as the official code has it: 77 tokens, padded
        tokens = tiny.tokenizer([prompt], padding="max_length", truncation=True, max_length=77, return_tensors="pt")
        assert tokens["input_ids"].shape == (1, 77)
        with torch.no_grad():
            out = tiny.model(**tokens, input_features=mel[None], is_longer=torch.tensor([[longer]]))
        expected = (out.audio_embeds * out.text_embeds).sum()
        assert abs(score - expected) < 1e-6


def test_scores_do_not_depend_on_the_batch(tiny):
    together = tiny.score(MEDIA, PROMPTS)
    apart = torch.cat([tiny.score([m], [p]) for m, p in zip(MEDIA, PROMPTS, strict=True)])
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=0)
    order = [3, 0, 5, 1, 4, 2]
    shuffled = tiny.score([MEDIA[i] for i in order], [PROMPTS[i] for i in order], batch_size=2)
    torch.testing.assert_close(shuffled, together[order], atol=1e-6, rtol=0)
    assert together.dtype == torch.float32
    assert tiny.score([], []).shape == (0,)


def test_each_prompt_is_encoded_once(folder, monkeypatch):
    scorer = load_scorer(folder)
    seen, encode = [], scorer.model.get_text_features
    monkeypatch.setattr(scorer.model, "get_text_features", lambda **kw: seen.append(1) or encode(**kw))
    scorer.score(MEDIA[:4], ["a", "b", "a", "a"], batch_size=2)
    assert len(seen) == 2


def test_the_place_of_the_cut_is_on_the_card(folder, tiny, tmp_path):
    model = {"transformers": str(folder / "model")}
    centre = load_scorer(write_card(tmp_path, model=model, preprocess={"crop": "centre"}))
    one, other = (s.score(MEDIA[-2:], PROMPTS[-2:]) for s in (tiny, centre))
    assert one[0] == other[0]
    assert one[1] != other[1]
    assert tiny.preparation != centre.preparation


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {}}, "model needs `transformers"),
        ({"preprocess": {"crop": "center"}}, "crop: seeded | centre"),
        ({"preprocess": {"size": 224}}, "crop: seeded | centre"),
        ({"model": {"transformers": "empty"}}, "empty: the CLAP model of 'tiny' cannot be loaded"),
        ({"model": {"transformers": "half"}}, "half: is no whole CLAP, it lacks"),
    ],
)
def test_mistakes_in_a_card(folder, tmp_path, changes, words):
    from safetensors.torch import load_file, save_file

    (tmp_path / "empty").mkdir()
    (tmp_path / "half").mkdir()
    for file in (folder / "model").iterdir():
        (tmp_path / "half" / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model" / "model.safetensors")
    audio = {name: tensor for name, tensor in tensors.items() if not name.startswith("text_projection")}
    save_file(audio, tmp_path / "half" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=words):
        load_scorer(write_card(tmp_path, **changes))
