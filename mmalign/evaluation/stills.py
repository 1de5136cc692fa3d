"""What a page shows of a medium: the medium itself, and a picture that stands for it."""

from __future__ import annotations

import base64
import io
import math
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmalign.media import frames_of, make_sound, make_video, sound_of
from mmalign.records import Sound, Text, Video, open_image

FPS, RATE_HZ = 8, 16_000  # of media that do not say theirs
FLOOR_DB = 70  # below the loudest, where a spectrogram is black


def still(medium: Any, side: int = 256) -> Image.Image:
    """A picture of a medium.

    Of a video it is four of its frames, the first at the top left and the last at the bottom right; of a sound its
    spectrogram, time to the right and the pitch upwards; of a text the text.

    Args:
        medium: what `open_image` takes, or a `Video`, `Sound` or `Text`.
        side: pixels; of what is drawn here, pictures keep their size.

    Raises:
        UserError: it cannot be read.
    """
    if isinstance(medium, Text):
        return _written(medium, side)
    if isinstance(medium, Video):
        frames = frames_of(medium, medium.fps or FPS)
        chosen = [frames[round(place)] for place in np.linspace(0, len(frames) - 1, 4)]
        width, height = chosen[0].size
        sheet = Image.new("RGB", (2 * width, 2 * height))
        for n, frame in enumerate(chosen):
            sheet.paste(frame, (n % 2 * width, n // 2 * height))
        return sheet
    return _spectrogram(medium, side) if isinstance(medium, Sound) else open_image(medium)


def element(medium: Any, side: int = 320) -> dict[str, str]:
    """What a page needs to show a medium: its `kind` ("img", "video", "audio" or "text"), `src` and `still`.

    `src` is a data URI, or the text; a picture is scaled to at most `side` pixels. A video or sound whose file a
    browser may not play is written anew.
    """
    if isinstance(medium, Text):
        return {"kind": "text", "src": str(medium)}
    if isinstance(medium, Video):
        return {"kind": "video", "src": data("video/mp4", _playable(medium))}
    if isinstance(medium, Sound):
        return {"kind": "audio", "src": data("audio/flac", _playable(medium)), "still": png(_spectrogram(medium, side))}
    picture = open_image(medium)
    if max(picture.size) > side:
        picture = picture.copy()
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return {"kind": "img", "src": png(picture)}


def png(picture: Image.Image) -> str:
    """A picture as a data URI."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return data("image/png", buffer.getvalue())


def data(kind: str, content: bytes) -> str:
    """A data URI of a file's content."""
    return f"data:{kind};base64," + base64.b64encode(content).decode()


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, most: int = 3) -> list[str]:
    """At most `most` lines that fit the width."""
    letters = max(4, int(width / font.getlength("n")))
    return textwrap.wrap(text, letters, max_lines=most, placeholder=" …") or [""]


def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib."""
    from matplotlib.font_manager import FontProperties, findfont

    return ImageFont.truetype(findfont(FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")), size)


def _playable(medium: Video | Sound) -> bytes:
    """The file's own content where a browser plays it: MP4, and FLAC; else made anew."""
    content = medium.source if isinstance(medium.source, bytes) else Path(medium.source).read_bytes()
    if content[:4] == b"fLaC" or content[4:8] == b"ftyp":
        return content
    if isinstance(medium, Video):
        frames = frames_of(medium, medium.fps or FPS)
        made: Any = make_video(frames, medium.fps or FPS)
    else:
        rate = medium.sample_rate_hz or RATE_HZ
        made = make_sound(sound_of(medium, rate)[0], rate)
    return made.source


def _spectrogram(sound: Sound, side: int) -> Image.Image:
    from matplotlib import colormaps

    rate = sound.sample_rate_hz or RATE_HZ
    wave = sound_of(sound, rate, mono=True)[0][0]
    window = 2 ** round(math.log2(rate / 32))  # some 30 ms
    starts = np.linspace(0, max(0, len(wave) - window), side).astype(int)
    padded = np.pad(wave, (0, max(0, window - len(wave))))
    parts = np.stack([padded[start : start + window] for start in starts]) * np.hanning(window)
    level = 20 * np.log10(np.abs(np.fft.rfft(parts)) + 1e-9).T[::-1]
    shade = np.clip(1 + (level - level.max()) / FLOOR_DB, 0, 1)
    picture = Image.fromarray((colormaps["magma"](shade)[..., :3] * 255).astype(np.uint8))
    return picture.resize((side, side), Image.Resampling.BILINEAR)


def _written(text: str, side: int) -> Image.Image:
    sheet, letters = Image.new("RGB", (side, side), "#f4f4f6"), font(max(10, side // 16))
    gap = side // 16
    lines = wrapped(text, letters, side - 2 * gap, most=10)
    ImageDraw.Draw(sheet).multiline_text((gap, gap), "\n".join(lines), "#222222", letters, spacing=side // 40)
    return sheet
