"""Videos and sounds: files to frames and samples, and back.

A model's idea of speed is the rate that it was trained at, so a frame's number means nothing: it is the moment that
counts. Source of the frames' counts and of `ends`: qwen-vl-utils, as copied in KwaiVGI/VideoAlign @ 219ab9d,
vision_process.py.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmalign.records import MAX_PIXELS, Sound, Text, UserError, Video, open_image

MAX_SAMPLES = 2**26  # 23 minutes of one channel; checked on the header, before anything is decoded
MAX_FRAMES = 2**14  # that are asked of a video, whatever its clock says
MAX_KERNEL = 2**24  # a filter of two rates without a large common divisor would fill the memory
# librosa's kaiser_best, by which the official code resampled before librosa 0.10; soxr_hq since then.
KAISER_BEST = {
    "resampling_method": "sinc_interp_kaiser",
    "lowpass_filter_width": 64,
    "rolloff": 0.9475937167399596,
    "beta": 14.769656459379492,
}


class Frames(list):
    """Pictures of one video, in order; `fps` of them to a second of it."""

    fps: float | None = None


def frames_of(
    video: Any,
    fps: float,
    *,
    multiple: int = 1,
    least: int = 1,
    most: int | None = None,
    first: int | None = None,
    ends: bool = False,
    each: Callable[[Image.Image], Image.Image] = lambda picture: picture,
    name: str = "",
) -> Frames:
    """Frames at even distances, about `fps` a second, each the one nearest to its moment.

    Args:
        video: a `Video`, a path, a file's bytes, or a list of pictures; a list has no clock and counts as at `fps`.
        fps: frames a second.
        multiple: their number is rounded to a multiple of this.
        least: so many at least; a video with fewer frames repeats some.
        most: so many at most, then further apart.
        first: the first so many of them alone.
        ends: the last frame is one of them, as qwen-vl-utils has it. Else they are 1 / `fps` seconds apart from the
            first on, and the same motion gives the same frames at any rate of the file.
        each: what is done to every chosen frame before the next is read.
        name: what to call the video in an error; default: its path.

    Raises:
        UserError: no such file ("missing_file"), no video or a damaged one ("undecodable"), or frames of over
            `MAX_PIXELS` or more than `MAX_FRAMES` of them ("too_large").
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
    if count > MAX_FRAMES:
        raise UserError(
            f"{name}: {count:,} frames at {fps:g} a second, over {MAX_FRAMES:,}; cut the video.", "too_large"
        )
    times = np.array([float(stamp - stamps[0]) for stamp in stamps])
    moments = np.linspace(0, times[-1], count) if ends else np.arange(count) * (float(duration) / count)
    chosen = np.searchsorted((times[1:] + times[:-1]) / 2, moments[:first])
    if isinstance(source, list | tuple):
        shown = {stamps[i]: open_image(source[i], name=f"{name}, frame {i}") for i in set(chosen)}
    else:
        shown = _guarded(_pictures, source, name, {stamps[i] for i in chosen})
    shown = {stamp: each(picture) for stamp, picture in shown.items()}
    frames = Frames(shown[stamps[i]] for i in chosen)
    frames.fps = float(count / duration)
    return frames


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


def sound_of(medium: Any, rate_hz: int, *, mono: bool = False, name: str = "") -> tuple[np.ndarray, bytes]:
    """A sound as float32 [channels, T] at a rate, and its file's content.

    Args:
        medium: a `Sound`, a path or a file's bytes.
        rate_hz: samples a second; another rate of the file is resampled.
        mono: its channels are averaged to one.
        name: what to call the sound in an error; default: its path.

    Raises:
        UserError: The sound is missing ("missing_file"), is damaged, empty or no sound ("undecodable"), or is too long
            ("too_large").
    """
    source = medium.source if isinstance(medium, Sound) else medium
    is_path = isinstance(source, str | Path)
    where = f"{name} ({source})" if name and is_path else name or (str(source) if is_path else "a sound in memory")
    if isinstance(source, Text) or not isinstance(source, str | Path | bytes):
        raise UserError(f"{where}: is a {type(medium).__name__} where a sound is needed; take a model of such media.")
    try:
        import soundfile
        import torch
        from torchaudio.functional import resample
    except (ImportError, OSError) as error:  # OSError: built for another torch
        raise UserError(f"sound needs torchaudio and soundfile ({error}): pip install 'mmalign[audio]'.") from error
    try:
        if is_path and Path(source).exists() and not Path(source).is_file():
            raise ValueError("it is no regular file")  # a device or a pipe may never end
        content = Path(source).read_bytes() if is_path else source
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            rate, channels = file.samplerate, file.channels
            too_large = max(file.frames * channels, file.frames * rate_hz // rate) > MAX_SAMPLES
            wave = None if too_large else file.read(dtype="float32", always_2d=True).T
    except FileNotFoundError:
        raise UserError(f"{where}: no such sound; check the path.", "missing_file") from None
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise UserError(f"{where}: cannot be decoded ({error}); mend or remove the sound.", "undecodable") from error
    common = np.gcd(rate, rate_hz)
    if wave is None or (rate // common) * (rate_hz // common) > MAX_KERNEL:
        raise UserError(f"{where}: is too long, or of an odd rate ({rate} Hz); cut or resample it.", "too_large")
    if not wave.size or not np.isfinite(wave).all():
        raise UserError(f"{where}: holds no samples, or some that are no numbers; remove the sound.", "undecodable")
    if mono:
        wave = wave.mean(axis=0, keepdims=True)
    if rate != rate_hz:
        wave = resample(torch.from_numpy(wave), rate, rate_hz, **KAISER_BEST).numpy()
    return wave, content


def make_video(frames: Sequence[Any], fps: float, *, name: str = "") -> Video:
    """Pictures of one size, shown `fps` a second, as an H.264 file in memory; odd sides lose a pixel.

    Raises:
        UserError: PyAV is missing, or was built without that codec.
    """
    try:
        import av
    except ImportError as error:
        raise UserError("Videos are written by PyAV: run `pip install mmalign[video]`.") from error
    pictures = [open_image(frame, name=f"{name or 'a video'}, frame {n}") for n, frame in enumerate(frames)]
    width, height = (side - side % 2 for side in pictures[0].size)  # yuv420p halves both
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        try:
            stream: Any = file.add_stream("libx264", Fraction(fps).limit_denominator(1001), {"crf": "15"})
        except (av.error.FFmpegError, ValueError) as error:
            raise UserError(f"This PyAV cannot write H.264 ({error}): run `pip install mmalign[video]`.") from error
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for picture in pictures:
            file.mux(stream.encode(av.VideoFrame.from_image(picture.crop((0, 0, width, height)))))
        file.mux(stream.encode(None))
    return Video(buffer.getvalue(), fps)


def make_sound(wave: Any, rate_hz: int) -> Sound:
    """Samples [channels, T] or [T] in [-1, 1] as a 16-bit FLAC file in memory; what is beyond is clipped.

    Raises:
        UserError: soundfile is missing.
    """
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise UserError(f"sound needs soundfile ({error}): pip install 'mmalign[audio]'.") from error
    buffer = io.BytesIO()
    samples = np.clip(np.atleast_2d(np.asarray(wave, dtype=np.float32)).T, -1, 1)
    soundfile.write(buffer, samples, rate_hz, format="FLAC", subtype="PCM_16")
    return Sound(buffer.getvalue(), rate_hz)
