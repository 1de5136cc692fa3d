"""The clips that the embedded video model is trained on: one object that crosses a coloured ground, with a caption.

A caption says the object, where it goes and the ground: "a fox moving left on a blue background". A share of the
training clips goes another way than its caption says, and all shake by a hidden amount, as found footage does; so a
model that was trained on them goes wrong and shakes too, and "goes where it was sent, smoothly" is a real preference
with a known answer.

Prompts are split by object x colour combination, each in four directions:

    test          24 combinations, one an object    never trained on, by anything
    development   24 combinations                   never trained on, by anything
    train         the other 144; it contains
      pairs       48 combinations                   preference pairs

Sprites: see `scenes`.
"""

import itertools
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.random import RandomState  # its stream is frozen for good, so clips never change

from mmalign.embedded import scenes

SIDE, FRAMES, FPS = 64, 9, 8  # pixels, frames, frames a second
OBJECT, STEP = 24, 3  # pixels: an object's side, and how far it goes from a frame to the next
NOUNS = scenes.NOUNS[::2]
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x to the right, y downwards
SPLITS = ("train", "pairs", "development", "test")
ASTRAY = 0.4  # of the training clips go elsewhere
NEAR = 0.25  # how far a colour may be from the ground's and still be ground, of [0, 1]


@dataclass(frozen=True)
class Clip:
    """One clip: what its caption says, where it goes indeed, and by how many pixels it shakes."""

    noun: str
    colour: str
    direction: str
    goes: str
    shake: float = 0.0
    seed: int = 0


def caption(noun: str, colour: str, direction: str) -> str:
    """The text of a clip."""
    return f"{scenes.article(noun)} {noun} moving {direction} on {scenes.article(colour)} {colour} background"


def asked(prompt: str) -> np.ndarray:
    """Where a caption sends its object: the direction as x and y."""
    return np.asarray(DIRECTIONS[prompt.partition(" moving ")[2].split()[0]], float)


@cache
def combinations(split: str) -> tuple[tuple[str, str], ...]:
    """The (noun, colour) combinations of a split. Every noun and every colour occurs in each."""
    order, colours = RandomState(0).permutation(len(NOUNS)), tuple(scenes.COLOURS)
    steps = {"test": (0,), "development": (1,), "pairs": (2, 3), "train": range(2, len(colours))}[split]
    return tuple((NOUNS[i], colours[(row + step) % len(colours)]) for row, i in enumerate(order) for step in steps)


def prompts(split: str) -> list[str]:
    """All captions of a split, four a combination, in a fixed shuffled order: any first n are a fair sample."""
    every = [caption(*both, direction) for both, direction in itertools.product(combinations(split), DIRECTIONS)]
    return [every[i] for i in RandomState(1).permutation(len(every))]


def random_clips(n: int, seed: int, split: str) -> list[Clip]:
    """`n` clips of a split as the base model meets them."""
    rng, both, ways = RandomState(seed), combinations(split), tuple(DIRECTIONS)
    clips = []
    for _ in range(n):
        way = ways[rng.randint(4)]
        goes = ways[rng.randint(4)] if rng.rand() < ASTRAY * 4 / 3 else way
        shake, own = 3 * rng.beta(1.2, 1.6), int(rng.randint(2**31 - 1))
        clips.append(Clip(*both[rng.randint(len(both))], way, goes, float(shake), own))
    return clips


def render(clip: Clip) -> np.ndarray:
    """Draws a clip: uint8 [9, 64, 64, 3], the same for the same clip on every machine."""
    rng, way = RandomState(clip.seed), np.asarray(DIRECTIONS[clip.goes], float)
    across = rng.randint(-10, 11) * way[::-1]
    tint = rng.uniform(-0.03, 0.03, size=3).astype(np.float32)
    colour, alpha, _ = scenes._sprite(clip.noun, OBJECT)
    ground = np.asarray(scenes.COLOURS[clip.colour], np.float32) / 255 + tint
    frames = np.broadcast_to(ground, (FRAMES, SIDE, SIDE, 3)).copy()
    for k, frame in enumerate(frames):
        offset = way * STEP * (k - FRAMES // 2) + across + clip.shake * rng.uniform(-1, 1, size=2)
        left, top = (round(SIDE / 2 + value - OBJECT / 2) for value in offset)
        inside = frame[top : top + OBJECT, left : left + OBJECT]
        inside += alpha * (colour - inside)
    return (frames.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _grounds(frames: np.ndarray) -> np.ndarray:
    """The ground's colour in each frame: the median of its border."""
    top, bottom, left, right = frames[:, :2], frames[:, -2:], frames[:, :, :2], frames[:, :, -2:]
    parts = [part.reshape(len(frames), -1, 3) for part in (top, bottom, left, right)]
    return np.median(np.concatenate(parts, 1), axis=1)


def steps_of_the_centre(frames: np.ndarray) -> np.ndarray:
    """How far the object's centre goes between frames, in pixels [frames - 1, 2]; zeros where no object is seen.

    Args:
        frames: uint8 [frames, height, width, 3].
    """
    pixels = np.asarray(frames, np.float32) / 255
    apart = np.abs(pixels - (_grounds(np.asarray(frames, np.float32)) / 255)[:, None, None]).max(-1)
    weight = np.clip(apart - NEAR, 0, None)
    mass = weight.sum((1, 2))
    rows, columns = np.mgrid[: frames.shape[1], : frames.shape[2]]
    centre = (
        np.stack([(weight * columns).sum((1, 2)), (weight * rows).sum((1, 2))], 1) / np.maximum(mass, 1e-6)[:, None]
    )
    seen = mass > 0
    return np.diff(centre, axis=0) * (seen[1:] & seen[:-1])[:, None]


def goes_there(frames: np.ndarray, prompt: str) -> float:
    """The judge that makes the pairs: how far the object goes where it was sent, less how much it shakes on the way.

    1 is a clip that goes there at its own speed without shaking; -1 one that goes back as fast.
    """
    steps = steps_of_the_centre(frames) / STEP
    return float(steps.mean(0) @ asked(prompt) - np.abs(steps - steps.mean(0)).mean())


def flows_there(frames: np.ndarray, prompt: str) -> float:
    """The held-out judge: the share of frames whose picture as a whole moved on in the direction that was asked.

    By phase correlation of neighbouring frames (Kuglin and Hines, 1975), which knows of no object and no ground.
    """
    grey = np.asarray(frames, float) @ [0.299, 0.587, 0.114]
    window = np.hanning(grey.shape[1])[:, None] * np.hanning(grey.shape[2])
    spectra = np.fft.fft2((grey - grey.mean((1, 2), keepdims=True)) * window)
    cross = spectra[1:] * spectra[:-1].conj()
    surface = np.fft.ifft2(cross / (np.abs(cross) + 0.01 * np.abs(cross).max((1, 2), keepdims=True) + 1e-9)).real
    height, width = surface.shape[1:]
    places = surface.reshape(len(surface), -1).argmax(1)
    shifts = np.stack([(places % width + width // 2) % width - width // 2,
                       (places // width + height // 2) % height - height // 2], 1)  # fmt: skip
    along, across = shifts @ asked(prompt), shifts @ asked(prompt)[::-1]
    return float(((along > 0) & (along >= np.abs(across))).mean())


def ground_is_right(frames: np.ndarray, prompt: str) -> float:
    """The share of frames whose ground has the colour that was asked."""
    return float(np.mean([scenes.ground(frame) == prompt.split()[-2] for frame in frames]))
