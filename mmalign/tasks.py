"""What `mmalign quickstart` aligns: for each modality an embedded model, its prompts and its judges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import mmalign
from mmalign.embedded import AUDIO_SAMPLING, SAMPLING, VLM_SAMPLING
from mmalign.records import Comparison


@dataclass(frozen=True)
class Asked:
    """One prompt.

    Attributes:
        text: the prompt itself.
        name: what the report calls it; equal names are one cluster of the statistics.
        images: input pictures.
        truth: what a judge knows of them.
    """

    text: str
    name: str
    images: tuple[Any, ...] = ()
    truth: Any = None


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
        judges: by name; the first one makes the pairs, unless there is `pairs`.
        roles: judge -> what it is here.
        headline: the judge of the report's first sentence, which did not make the pairs.
        size: of the whole.
        small: to see that it works.
        pairs: count, seed and split -> preference data of another origin than the model's candidates.
        origin: of the pairs, for the report.
    """

    model: str
    recipe: str
    asked: Callable[[str], list[Asked]]
    judges: Callable[[], dict[str, Judge]]
    roles: Mapping[str, str]
    headline: str
    size: Size
    small: Size
    pairs: Callable[[int, int, str], list[Comparison]] | None = None
    origin: str = "best against worst of {size.candidates} candidates for {size.pair_prompts} prompts"


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


def _audio_prompts(split: str) -> list[Asked]:
    from mmalign.embedded import sounds

    return _plain(sounds.prompts(split))


def _audio_judges() -> dict[str, Judge]:
    import torch

    from mmalign.embedded import listen, sounds
    from mmalign.media import sound_of

    def judge(function: Callable[[Any, list[str]], Any]) -> Judge:
        def score(media: Sequence[Any], asked: Sequence[Asked]) -> np.ndarray:
            waves = [torch.from_numpy(sound_of(medium, sounds.RATE, mono=True)[0][0]) for medium in media]
            return function(torch.stack(waves), [one.text for one in asked]).numpy()

        return score

    functions = (listen.template_scores, listen.network_scores, listen.events_in_order, listen.clarity)
    return {function.__name__: judge(function) for function in functions}


def _audio_pairs(count: int, seed: int, split: str) -> list[Comparison]:
    """True sounds of captions against sounds that miss or exchange events, as Tango 2 has it (arXiv 2404.09956)."""
    from mmalign.embedded import sounds
    from mmalign.media import make_sound

    rng, pairs = np.random.RandomState(seed), []
    # The wrong ones are of `train`'s sets of kinds: within those of `pairs` there is seldom one without an event
    for i, piece in enumerate(sounds.random_pieces(count, 7000 + seed, split)):
        both = piece, sounds.random_piece(rng, sounds.astray(rng, piece.events, "train"))
        media = tuple(make_sound(sounds.render(one)[None], sounds.RATE) for one in both)
        pairs.append(Comparison(f"{split} seed {seed} {i}", sounds.caption(piece.events), media, (1.0, 0.0)))
    return pairs


AUDIO = Task(
    model="the embedded text-to-audio model",
    recipe="embedded_audio_dpo",
    asked=_audio_prompts,
    judges=_audio_judges,
    roles={
        "template_scores": "knows the synthesiser",
        "network_scores": "held out, its log-probability",
        "events_in_order": "held out, what it hears in order",
        "clarity": "of clear events, any",
    },
    headline="events_in_order",  # a log-probability differs, by hairs, between two sounds that are both right
    size=Size(2000, 2, 320, sampling={**AUDIO_SAMPLING, "batch_size": 32}),
    small=Size(8, 2, 8, steps=4, sampling={**AUDIO_SAMPLING, "num_inference_steps": 3, "batch_size": 32}),
    pairs=_audio_pairs,
    origin="true sounds against ones that miss or exchange events",
)


def _questions(split: str) -> list[Asked]:
    from PIL import Image

    from mmalign.embedded import captions, scenes

    return [
        Asked(captions.QUESTION, scenes.caption(scene), (Image.fromarray(scenes.render(scene)),), scene)
        for scene in captions.described(split)
    ]


def _answer_judges() -> dict[str, Judge]:
    from mmalign.embedded import captions

    clip = mmalign.load_scorer("embedded-clip")

    def judge(function: Callable[[str, Any], float]) -> Judge:
        return lambda said, asked: [function(answer, one.truth) for answer, one in zip(said, asked, strict=True)]

    return {
        "facts": judge(captions.score),
        "embedded-clip": lambda said, asked: clip.score([one.images[0] for one in asked], said).numpy(),
        "exact": judge(captions.exact),
        "fluent": judge(captions.fluent),
    }


VLM = Task(
    model="the embedded vision-language model",
    recipe="embedded_vlm_dpo",
    asked=_questions,
    judges=_answer_judges,
    roles={
        "facts": "made the pairs",
        "embedded-clip": "held out",
        "exact": "right word for word",
        "fluent": "is a caption",
    },
    headline="embedded-clip",
    size=Size(320, 4, 200, sampling=VLM_SAMPLING),
    small=Size(8, 2, 8, steps=4, sampling=VLM_SAMPLING),
)
TASKS: dict[str, Task] = {"image": IMAGE, "audio": AUDIO, "vlm": VLM}
