"""What `mmalign quickstart` aligns: for each modality an embedded model, its prompts and its judges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import mmalign
from mmalign.embedded import SAMPLING


@dataclass(frozen=True)
class Asked:
    """One prompt.

    Attributes:
        text: the prompt itself.
        name: what the report calls it; equal names are one cluster of the statistics.
        images: input pictures.
    """

    text: str
    name: str
    images: tuple[Any, ...] = ()


Judge = Callable[[Sequence[Any], Sequence[Asked]], Sequence[float] | np.ndarray]  # [N] media and prompts -> [N]


@dataclass(frozen=True)
class Size:
    """How much quickstart does. Chosen on development prompts (benchmarks/README.md)."""

    pair_prompts: int
    candidates: int
    test_prompts: int
    drop_fraction: float = 0.0
    steps: int | None = None  # None: the recipe's
    sampling: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """What is aligned to what.

    Attributes:
        model: in words.
        recipe: of the alignment.
        asked: split -> its prompts.
        judges: by name; the first one makes the pairs.
        roles: judge -> what it is here.
        headline: the judge of the report's first sentence, which did not make the pairs.
        size: of the whole.
        small: to see that it works.
    """

    model: str
    recipe: str
    asked: Callable[[str], list[Asked]]
    judges: Callable[[], dict[str, Judge]]
    roles: Mapping[str, str]
    headline: str
    size: Size
    small: Size


def _plain(prompts: Sequence[str]) -> list[Asked]:
    return [Asked(prompt, prompt) for prompt in prompts]


def _image_prompts(split: str) -> list[Asked]:
    from mmalign.embedded import prompts

    return _plain(prompts(split))


def _scorer(name: str) -> Judge:
    scorer = mmalign.load_scorer(name)
    return lambda media, asked: scorer.score(media, [one.text for one in asked]).numpy()


IMAGE = Task(
    model="the embedded text-to-image model",
    recipe="embedded_diffusion_dpo",
    asked=_image_prompts,
    judges=lambda: {name: _scorer(name) for name in ("embedded-hps", "embedded-heldout", "embedded-clip")},
    roles={"embedded-hps": "made the pairs", "embedded-heldout": "held out", "embedded-clip": "text alignment"},
    headline="embedded-heldout",
    size=Size(320, 4, 200, drop_fraction=0.2, sampling={**SAMPLING, "batch_size": 32}),
    small=Size(8, 2, 8, steps=4, sampling={**SAMPLING, "num_inference_steps": 4, "batch_size": 32}),
)
VIDEO_SAMPLING = {"num_inference_steps": 12, "guidance_scale": 3.0, "batch_size": 32}


def _video_prompts(split: str) -> list[Asked]:
    from mmalign.embedded import motions

    return _plain(motions.prompts(split))


def _video_judges() -> dict[str, Judge]:
    from mmalign.embedded import motions
    from mmalign.media import frames_of

    def judge(function: Callable[[np.ndarray, str], float]) -> Judge:
        def score(media: Sequence[Any], asked: Sequence[Asked]) -> list[float]:
            frames = (np.stack([np.asarray(frame) for frame in frames_of(medium, motions.FPS)]) for medium in media)
            return [function(*row) for row in zip(frames, (one.text for one in asked), strict=True)]

        return score

    functions = (motions.goes_there, motions.flows_there, motions.ground_is_right)
    return {function.__name__: judge(function) for function in functions}


VIDEO = Task(
    model="the embedded text-to-video model",
    recipe="embedded_video_dpo",
    asked=_video_prompts,
    judges=_video_judges,
    roles={"goes_there": "made the pairs", "flows_there": "held out", "ground_is_right": "the ground as asked"},
    headline="flows_there",
    size=Size(192, 4, 96, drop_fraction=0.2, sampling=VIDEO_SAMPLING),
    small=Size(8, 2, 8, steps=4, sampling={**VIDEO_SAMPLING, "num_inference_steps": 3}),
)
TASKS: dict[str, Task] = {"image": IMAGE, "video": VIDEO}
