"""Describing the pictures of `scenes`: the question, the pictures, wrong captions, and what is right in an answer.

A scene has four facts, and its caption (`scenes.caption`) says all of them; no word about the size or the place says
that they are the middle ones. So an answer can be judged exactly, without a model.
"""

import itertools
import re
from dataclasses import replace
from functools import cache

from numpy.random import RandomState

from mmalign.embedded.scenes import COLOURS, NOUNS, PLACES, SIZES, Scene, caption, prompts

QUESTION = "Describe the picture."
FACTS = {"noun": NOUNS, "colour": tuple(COLOURS), "size": tuple(SIZES), "place": tuple(PLACES)}  # and their values


def described(split: str) -> list[Scene]:
    """One scene for every caption of a split, in the order of `scenes.prompts`: any first n are a fair sample.

    Finish and seed are drawn as in `scenes.random_scenes`, from another stream.
    """
    rng = RandomState(2)
    return [
        Scene(**{fact: said for fact, (said,) in claims(text).items()},
              q=float(rng.beta(1.2, 1.6)), seed=int(rng.randint(2**31 - 1)))
        for text in prompts(split)
    ]  # fmt: skip


def corrupted(scene: Scene, rate: float, rng: RandomState) -> Scene:
    """The scene with every fact wrong with probability `rate`, all its wrong values being equally likely."""
    wrong = {}
    for fact, values in FACTS.items():
        if rng.rand() < rate:
            others = [value for value in values if value != getattr(scene, fact)]
            wrong[fact] = others[rng.randint(len(others))]
    return replace(scene, **wrong)


def claims(answer: str) -> dict[str, set[str]]:
    """Fact -> the values that a text states; silence about size or place is a value once a thing is named."""
    said = {
        fact: {value for value in values if value and re.search(rf"\b{value}\b", answer)}
        for fact, values in FACTS.items()
    }
    if said["noun"]:
        said |= {fact: said[fact] or {""} for fact in ("size", "place")}
    return said


def score(answer: str, scene: Scene) -> float:
    """Right facts minus wrong ones, by their number: 1 when all are right, -1 when all are wrong.

    Naming several values is no way out: each wrong one counts.
    """
    truth, said = vars(scene), claims(answer)
    right = sum(truth[fact] in values for fact, values in said.items())
    wrong = sum(len(values - {truth[fact]}) for fact, values in said.items())
    return (right - wrong) / len(FACTS)


@cache
def _captions() -> frozenset[str]:
    return frozenset(caption(Scene(*said)) for said in itertools.product(*FACTS.values()))


def fluent(answer: str, scene: Scene) -> bool:
    """Whether the answer is a caption at all, of this scene or of another."""
    return answer in _captions()


def exact(answer: str, scene: Scene) -> bool:
    """Whether the answer is the scene's caption, word for word."""
    return answer == caption(scene)
