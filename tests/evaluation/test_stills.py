"""What stands for a medium on a page."""

import base64

import numpy as np
import pytest
from PIL import Image

from mmalign.evaluation.report import write_report
from mmalign.evaluation.stills import element, still
from mmalign.media import frames_of, make_sound, make_video, sound_of
from mmalign.records import Sound, Text, Video
from tests.conftest import picture
from tests.evaluation.test_report import some_result

RATE = 16_000
COLOURS = ["red", "green", "blue", "white"]
FILM = make_video([Image.new("RGB", (32, 16), colour) for colour in COLOURS], 4)
SECONDS = np.arange(RATE) / RATE
RISING = make_sound(0.5 * np.sin(2 * np.pi * (500 + 2500 * SECONDS) * SECONDS), RATE)


def content(uri):
    return base64.b64decode(uri.partition("base64,")[2])


def test_a_video_is_four_of_its_frames():
    sheet = still(FILM)
    assert sheet.size == (64, 32)
    for n, colour in enumerate(COLOURS):
        found = sheet.getpixel((16 + n % 2 * 32, 8 + n // 2 * 16))
        assert np.allclose(found, Image.new("RGB", (1, 1), colour).getpixel((0, 0)), atol=12)


def test_a_sound_is_its_spectrogram():
    shade = np.asarray(still(RISING, 64).convert("L"), float)
    height = 64 - shade.argmax(0)  # of the loudest pitch, from below
    # 500 Hz of 8000 at the start, 5500 at the end (the pitch is the phase's derivative)
    assert height[4] == pytest.approx(64 * (500 + 5000 * 4 / 64) / 8000, abs=3)
    assert height[60] == pytest.approx(64 * (500 + 5000 * 60 / 64) / 8000, abs=3)


def test_a_text_is_written():
    short, long = (np.asarray(still(Text(words), 128).convert("L")) for words in ("a", "a word " * 40))
    assert short.shape == (128, 128)
    assert (long < 128).sum() > 10 * (short < 128).sum() > 0


def test_elements_hold_the_media(tmp_path):
    (tmp_path / "a.mp4").write_bytes(FILM.source)
    for film in (FILM, Video(tmp_path / "a.mp4")):
        shown = element(film)
        assert (shown["kind"], content(shown["src"])) == ("video", FILM.source)
    assert content(element(RISING)["src"]) == RISING.source
    assert element(Text("<i>"))["src"] == "<i>"
    assert element(picture(1, size=(640, 320)))["src"].startswith("data:image/png")


def test_what_a_browser_does_not_play_is_written_anew():
    import io

    import av
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, np.zeros(RATE), RATE, format="WAV")
    heard = content(element(Sound(file.getvalue(), RATE))["src"])
    assert heard[:4] == b"fLaC"
    assert sound_of(heard, RATE)[0].shape == (1, RATE)
    film = io.BytesIO()
    with av.open(film, "w", format="avi") as out:
        stream = out.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for colour in COLOURS:
            out.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (32, 16), colour))))
        out.mux(stream.encode(None))
    seen = content(element(Video(film.getvalue(), 4))["src"])
    assert seen[4:8] == b"ftyp"
    assert len(frames_of(seen, 4)) == 4


@pytest.mark.parametrize(
    ("medium", "tag"), [(FILM, "<video controls"), (RISING, "<audio controls"), (Text("<b>yes"), "&lt;b&gt;yes")]
)
def test_a_report_plays_them_side_by_side(medium, tag, tmp_path):
    media, prompts = [medium] * 3, ["a", "b", "c"]
    told = {"title": "t", "result": some_result(), "prompts": prompts, "base": media, "aligned": media}
    page = write_report(tmp_path, **told, conditions=[(picture(1),)] * 3).read_text()
    assert page.count(tag) == 6
    assert page.count('alt="shown: ') == 3
    assert "<b>yes" not in page
    assert Image.open(tmp_path / "grid.png").size[0] > 256
