"""How a card's pictures and videos are read and sized."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from mmalign.media import frames_of
from mmalign.records import UserError, open_image
from mmalign.scoring.scorer import Card


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
        return lambda medium, name: frames_of(
            medium, **frames, each=lambda picture: fit(picture, pixels, name), name=name
        )
    return lambda medium, name: fit(open_image(medium, name=name), pixels, name)


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
