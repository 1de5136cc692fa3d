"""The frames of a video that a model is shown, taken by the file's own clock.

A model's idea of speed is the rate that it was trained at, so a frame's number means nothing: it is the moment that
counts. Source of the counts and of `ends`: qwen-vl-utils, as copied in KwaiVGI/VideoAlign @ 219ab9d, vision_process.py.
"""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmalign.records import MAX_PIXELS, Text, UserError, Video, open_image
from mmalign.scoring.scorer import Card


class Frames(list):
    """Pictures of one video, in order; `fps` of them to a second of it."""

    fps: float | None = None


def reader(card: Card) -> Callable[[Any, str], Any]:
    """How a card's media are read: (medium, its name in errors) -> a picture, or the frames of a video.

    `preprocess.pixels` is as in `fit`; `preprocess.frames` holds the arguments of `frames_of`.

    Raises:
        UserError: one of the two is not what it should be.
    """
    facts = dict(card.preprocess)
    pixels, frames = facts.pop("pixels", None), facts.pop("frames", {})
    try:
        if facts:
            raise TypeError(f"unknown field {next(iter(facts))!r}")
        if card.judges == "video":
            inspect.signature(frames_of).bind(None, **frames)
    except TypeError as error:
        raise UserError(f"{card.folder / 'card.yaml'}: preprocess: {error}.") from None
    if card.judges == "video":
        return lambda medium, name: frames_of(medium, **frames, pixels=pixels, name=name)
    return lambda medium, name: fit(open_image(medium, name=name), pixels, name)


def frames_of(
    video: Any,
    fps: float,
    *,
    multiple: int = 1,
    least: int = 1,
    most: int | None = None,
    ends: bool = False,
    pixels: Sequence[int] | None = None,
    name: str = "",
) -> Frames:
    """Frames at even distances, about `fps` a second, each the one nearest to its moment.

    Args:
        video: a `Video`, a path, a file's bytes, or a list of pictures; a list has no clock and counts as at `fps`.
        fps: frames a second.
        multiple: their number is rounded to a multiple of this.
        least: so many at least; a video with fewer frames repeats some.
        most: so many at most, then further apart.
        ends: the last frame is one of them, as qwen-vl-utils has it. Else they are 1 / `fps` seconds apart from the
            first on, and the same motion gives the same frames at any rate of the file.
        pixels: see `fit`.
        name: what to call the video in an error; default: its path.

    Raises:
        UserError: no such file ("missing_file"), no video or a damaged one ("undecodable"), or frames of over
            `MAX_PIXELS` ("too_large").
    """
    source = video.source if isinstance(video, Video) else video
    name = name or (str(source) if isinstance(source, str | Path) else "a video in memory")
    if isinstance(source, list | tuple) and source:
        stamps = [Fraction(n) / Fraction(fps) for n in range(len(source))]
    elif isinstance(source, str | Path | bytes) and not isinstance(source, Text):
        stamps = _guarded(_stamps, source, name)
    else:
        raise UserError(f"{name}: is no video; take a scorer of such media, or give a file or a list of frames.")
    n = len(stamps)
    duration = (stamps[-1] - stamps[0]) * n / (n - 1) if n > 1 else 1 / Fraction(fps)
    count = max(round(duration * Fraction(fps) / multiple) * multiple, least)
    count = min(count, most or count)
    times = np.array([float(stamp - stamps[0]) for stamp in stamps])
    moments = np.linspace(0, times[-1], count) if ends else np.arange(count) * (float(duration) / count)
    chosen = np.searchsorted((times[1:] + times[:-1]) / 2, moments)
    if isinstance(source, list | tuple):
        shown = {stamps[i]: open_image(source[i], name=f"{name}, frame {i}") for i in set(chosen)}
    else:
        shown = _guarded(_pictures, source, name, {stamps[i] for i in chosen})
    shown = {stamp: fit(picture, pixels, name) for stamp, picture in shown.items()}
    frames = Frames(shown[stamps[i]] for i in chosen)
    frames.fps = float(count / duration)
    return frames


def fit(picture: Image.Image, pixels: Sequence[int] | None, name: str = "") -> Image.Image:
    """Sides to multiples of 28, the area between two bounds, the shape kept as far as that allows; None: as it is.

    Raises:
        UserError: the picture is over 200 times as long as wide.
    """
    if pixels is None:
        return picture
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    try:
        height, width = smart_resize(picture.height, picture.width, 28, *pixels)
    except ValueError as error:
        raise UserError(f"{name}: cannot be shown to this scorer: {error}.") from None
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def _guarded(read: Callable, source: str | Path | bytes, name: str, *more: Any) -> Any:
    """`read(container, its first video stream, ...)`, with one sentence for whatever is wrong with the file."""
    try:
        import av
    except ImportError as error:
        raise UserError("Videos are read by PyAV: run `pip install mmalign[video]`.") from error
    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as file:
            stream = file.streams.video[0]
            if stream.width * stream.height > MAX_PIXELS:
                raise UserError(f"{name}: frames of more than {MAX_PIXELS:,} pixels; make them smaller.", "too_large")
            return read(file, stream, *more)
    except FileNotFoundError:
        raise UserError(f"{name}: no such video; check the path.", "missing_file") from None
    except (av.error.FFmpegError, IndexError, ValueError) as error:
        raise UserError(f"{name}: cannot be decoded ({error}); mend or remove the video.", "undecodable") from error


def _stamps(file: Any, stream: Any) -> list[Fraction]:
    """When each frame is shown, in seconds; nothing is decoded."""
    packets = [packet for packet in file.demux(stream) if packet.pts is not None]
    if not packets or len(packets) < stream.frames:
        raise ValueError(f"{len(packets)} of {stream.frames or 'its'} frames are there")
    return sorted(packet.pts * stream.time_base for packet in packets if not packet.is_discard)


def _pictures(file: Any, stream: Any, wanted: set[Fraction]) -> dict[Fraction, Image.Image]:
    """The wanted frames by their time; one held at a time beside them."""
    found = {}
    for frame in file.decode(stream):
        if frame.pts is not None and (stamp := frame.pts * stream.time_base) in wanted:
            if frame.is_corrupt:
                raise ValueError(f"the frame at {float(stamp):.3f} seconds is damaged")
            found[stamp] = frame.to_image()
            if len(found) == len(wanted):
                return found
    raise ValueError(f"{len(wanted) - len(found)} frames are damaged")
