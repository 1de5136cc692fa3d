"""Frames by the clock: what a model sees does not depend on how often the camera looked. Sounds by their samples."""

import io

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from mmalign import media as module
from mmalign.media import frames_of, make_sound, make_video, sound_of
from mmalign.records import Sound, Text, UserError, Video
from tests.conftest import picture


def moving(seconds):
    """A bright column that crosses the picture in four seconds."""
    row = np.clip(255 - 12 * abs(np.arange(64) - 16 * seconds), 0, 255).astype(np.uint8)
    return Image.fromarray(np.repeat(row[None], 32, 0)).convert("RGB")


def write(path, pictures, stamps=None, *, fps=None, codec="png", base=1000):
    """A film; without stamps (in 1/base seconds) at an even rate."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=fps or base)
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt = "rgb24" if codec == "png" else "yuv420p"
        for n, one in enumerate(pictures):
            frame = av.VideoFrame.from_image(one)
            frame.pts = n if stamps is None else stamps[n]
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def film(path, fps, seconds=4, **settings):
    return write(path, [moving(n / fps) for n in range(round(fps * seconds))], fps=fps, **settings)


def same(one, other):
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_same_motion_at_two_rates_gives_the_same_frames(tmp_path):
    slow, fast = (frames_of(film(tmp_path / f"{fps}.mov", fps), 2) for fps in (8, 24))
    assert same(slow, fast)
    assert same(slow, [moving(n / 2) for n in range(8)])
    assert slow.fps == fast.fps == 2


def test_a_film_of_uneven_rate_is_read_by_its_stamps(tmp_path):
    stamps = [0, 100, 200, 500, 900, 1000, 1500, 1900, 2000, 2500, 2750]
    path = write(tmp_path / "uneven.mov", [moving(stamp / 1000) for stamp in stamps], stamps)
    assert same(frames_of(path, 2), [moving(n / 2) for n in range(6)])


def test_a_codec_that_stores_frames_out_of_order(tmp_path):
    found = frames_of(film(tmp_path / "h264.mp4", 24, codec="libx264"), 2)
    for n, one in enumerate(found):
        assert np.abs(np.asarray(one, int) - np.asarray(moving(n / 2), int)).mean() < 6
    assert len(found) == 8


@pytest.mark.parametrize(("total", "fps", "count"), [(96, 24, 8), (37, 10, 8), (45, 15, 6), (33, 10, 6), (10, 10, 4)])
def test_with_both_ends_the_frames_are_those_of_the_official_code(tmp_path, total, fps, count):
    """Count and numbers as vision_process.py computes them: an even number, four at least, first to last."""
    path = write(tmp_path / "numbered.mov", [Image.new("RGB", (8, 8), (n, 0, 0)) for n in range(total)], fps=fps)
    found = [one.getpixel((0, 0))[0] for one in frames_of(path, 2, multiple=2, least=4, most=768, ends=True)]
    assert found == np.linspace(0, total - 1, count).round().astype(int).tolist()


def test_most_spreads_the_frames_and_least_repeats_them(tmp_path):
    path = film(tmp_path / "a.mov", 8)
    few = frames_of(path, 8, most=4)
    assert same(few, [moving(n) for n in range(4)])
    assert few.fps == 1
    assert len(frames_of(film(tmp_path / "b.mov", 8, seconds=0.25), 2, multiple=2, least=4)) == 4


def test_a_file_its_bytes_and_its_pictures(tmp_path):
    path = film(tmp_path / "a.mov", 8)
    expected = frames_of(path, 2)
    for other in (str(path), path.read_bytes(), Video(path, fps=99), Video(path.read_bytes())):
        assert same(frames_of(other, 2), expected)
    assert same(frames_of(list(expected), 2), expected)
    assert same(frames_of(list(expected), 2, most=2), [expected[0], expected[4]])


def test_a_list_may_hold_encoded_pictures():
    buffer = io.BytesIO()
    picture(1).save(buffer, "PNG")
    assert same(frames_of([buffer.getvalue()], 2), [picture(1)])


def test_damaged_films(tmp_path, monkeypatch):
    whole = film(tmp_path / "a.mov", 8).read_bytes()
    for name, content in {"cut": whole[: len(whole) // 2], "noise": bytes(range(256)) * 9, "empty": b""}.items():
        with pytest.raises(UserError, match=f"{name}: cannot be decoded") as error:
            frames_of(content, 2, name=name)
        assert error.value.reason == "undecodable"
    start = whole.find(b"IHDR", len(whole) // 2)
    with pytest.raises(UserError, match="cannot be decoded"):
        frames_of(whole[:start] + bytes(40) + whole[start + 40 :], 8)
    with pytest.raises(UserError, match="no such video") as error:
        frames_of(tmp_path / "none.mp4", 2)
    assert error.value.reason == "missing_file"
    monkeypatch.setattr(module, "MAX_PIXELS", 100)
    with pytest.raises(UserError, match="more than 100 pixels") as error:
        frames_of(whole, 2)
    assert error.value.reason == "too_large"


@pytest.mark.parametrize("medium", [Text("a"), picture(1), [], 3])
def test_what_is_no_video(medium):
    with pytest.raises(UserError, match="is no video"):
        frames_of(medium, 2)


RATE = 48_000
TIME = np.arange(RATE) / RATE
TONE = (0.5 * np.sin(2 * np.pi * 1000 * TIME)).astype(np.float32)
NOISE = np.random.default_rng(0).normal(0, 0.1, RATE).astype(np.float32)


def encoded(wave, rate=RATE, kind="WAV", subtype="FLOAT"):
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=kind, subtype=subtype)
    return file.getvalue()


def test_a_sound_is_a_path_or_bytes(tmp_path):
    content = encoded(NOISE)
    (tmp_path / "a.wav").write_bytes(content)
    for medium in (Sound(content), Sound(tmp_path / "a.wav"), tmp_path / "a.wav", str(tmp_path / "a.wav"), content):
        (wave,), same = sound_of(medium, RATE, mono=True)
        assert same == content
        np.testing.assert_array_equal(wave, NOISE)


def test_channels_are_averaged():
    stereo = np.stack([TONE, NOISE], axis=1)
    (wave,), _ = sound_of(Sound(encoded(stereo)), RATE, mono=True)
    np.testing.assert_allclose(wave, stereo.mean(axis=1), atol=1e-7)


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 96_000])
def test_other_rates_are_resampled(rate):
    time = np.arange(rate) / rate
    (wave,), _ = sound_of(Sound(encoded(0.5 * np.sin(2 * np.pi * 1000 * time), rate)), RATE)
    assert len(wave) == RATE
    inner = slice(RATE // 10, -RATE // 10)
    np.testing.assert_allclose(wave[inner], TONE[inner], atol=1e-4)


def test_the_rate_of_the_file_counts():
    assert sound_of(Sound(encoded(TONE[:24_000], 24_000), sample_rate_hz=16_000), RATE)[0].shape == (1, RATE)


FLAC = encoded(NOISE, kind="FLAC", subtype="PCM_16")


@pytest.mark.parametrize(
    ("medium", "reason", "words"),
    [
        (Sound(b"RIFF nothing"), "undecodable", "row 7: cannot be decoded"),
        (Sound(b""), "undecodable", "row 7: cannot be decoded"),
        (Sound(FLAC[: len(FLAC) // 2]), "undecodable", "row 7: "),
        (Sound(encoded(np.zeros(0))), "undecodable", "row 7: holds no samples"),
        (Sound(encoded(np.array([0.1, np.nan]))), "undecodable", "row 7: holds no samples, or some"),
        (Sound("absent.wav"), "missing_file", r"row 7 \(absent\.wav\): no such sound"),
        (Sound(encoded(np.zeros(9), 47_999)), "too_large", r"odd rate \(47999 Hz\)"),
        (Sound(encoded(np.zeros(1500), 1)), "too_large", "too long"),
        (Video(b""), "bad_row", "is a Video where a sound is needed"),
        (Text("words"), "bad_row", "is a Text where a sound is needed"),
    ],
)
def test_what_cannot_be_heard_is_named(medium, reason, words):
    with pytest.raises(UserError, match=words) as error:
        sound_of(medium, RATE, name="row 7")
    assert error.value.reason == reason


def test_a_video_that_was_made_is_read_again():
    made = make_video([moving(n / 8) for n in range(12)], 8)
    found = frames_of(made, 8)
    assert (len(found), found.fps, found[0].size) == (12, 8, (64, 32))
    assert max(np.abs(np.asarray(a, int) - np.asarray(moving(n / 8), int)).mean() for n, a in enumerate(found)) < 4
    assert frames_of(make_video([picture(1, size=(15, 9))], 7.5), 7.5)[0].size == (14, 8)


def test_a_sound_that_was_made_is_read_again():
    stereo = np.stack([TONE, NOISE * 30])
    wave, _ = sound_of(make_sound(stereo, RATE), RATE)
    np.testing.assert_allclose(wave, stereo.clip(-1, 1), atol=1e-4)
    assert sound_of(make_sound(TONE, RATE), RATE)[0].shape == (1, RATE)
