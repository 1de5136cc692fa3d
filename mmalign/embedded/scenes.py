"""The pictures that the embedded model is trained on: one object on a coloured ground, with a caption.

A scene says a noun, a ground colour, a size and a place, and all of them are in its caption. It also has a
hidden *finish* q in [0, 1], which no caption mentions: it drives saturation, contrast, shading and a soft
shadow. A model trained on these pictures learns the whole range from dull to vivid, so "more finish" is a
real preference with a known answer.

Prompts are split by object x colour combination, so that no caption of one part is a caption of another:

    test          48 combinations, one a noun     never trained on, by anything
    development   24 combinations                 never trained on, by anything
    train         the other 312                   the base model and the contrastive CLIP; it contains
      pairs         96 combinations               preference pairs and the training scorer
      scorer_fit    96 combinations               preferences of the held-out scorer

So the pictures of `pairs` answer prompts whose combination the base has seen, as in real preference data.
Sprites: Fluent Emoji by Microsoft, MIT licence (npm @iconify-json/fluent-emoji-flat 1.2.6).
"""

import colorsys
import itertools
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.random import RandomState  # its stream is frozen for good, so splits and pictures never change
from PIL import Image, ImageFilter

SIDE = 64  # pixels
SPRITES = Path(__file__).parent / "sprites.npz"
NOUNS = (
    "fox", "dog", "cat", "penguin", "frog", "owl", "butterfly", "fish", "octopus", "crab", "lion", "panda",
    "rabbit", "pig", "elephant", "turtle", "bee", "ladybug", "whale", "duck", "flamingo", "dinosaur",
    "banana", "strawberry", "pineapple", "watermelon", "carrot", "mushroom", "burger", "cake", "tulip",
    "sunflower", "cactus", "tree", "rocket", "car", "bus", "boat", "plane", "umbrella", "robot", "ghost",
    "guitar", "star", "house", "castle", "snowman", "teapot",
)  # fmt: skip
COLOURS = {  # ground colours at full finish: hues at least 25 degrees apart
    "red": (214, 48, 48),
    "orange": (240, 132, 36),
    "yellow": (244, 216, 66),
    "green": (62, 160, 72),
    "teal": (56, 190, 184),
    "blue": (52, 96, 208),
    "purple": (128, 62, 190),
    "pink": (246, 134, 192),
}
SIZES = {"small": 26, "": 38, "large": 52}  # pixels
PLACES = {
    "": (0, 0),
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
}
REACH = {"small": 17, "": 13, "large": 10}  # pixels off the centre; a large object may cross the edge
SPLITS = ("train", "pairs", "scorer_fit", "development", "test")


@dataclass(frozen=True)
class Scene:
    """One picture; `q` in [0, 1] is the hidden finish, `seed` moves the object and tints the ground."""

    noun: str
    colour: str
    size: str = ""
    place: str = ""
    q: float = 1.0
    seed: int = 0


def caption(scene: Scene) -> str:
    """The text of a scene, for example "a small fox on the left on a blue background"."""
    thing = f"{scene.size} {scene.noun}".strip()
    words = (article(thing), thing, scene.place, "on", article(scene.colour), scene.colour, "background")
    return " ".join(word for word in words if word)


def article(word: str) -> str:
    """The indefinite article of `word`."""
    return "an" if word[0] in "aeiou" else "a"


@cache
def combinations(split: str) -> tuple[tuple[str, str], ...]:
    """The (noun, colour) combinations of a split. Every noun and every colour occurs in `train`."""
    order = RandomState(0).permutation(len(NOUNS))
    colours = tuple(COLOURS)
    parts: dict[str, list[tuple[str, str]]] = {name: [] for name in SPLITS}
    for row, index in enumerate(order):
        for step in range(len(colours)):  # a Latin square: each colour equally often in each part
            if step == 0:
                names = ["test"]
            elif step == 1 and row < 24:
                names = ["development"]
            elif step in (2, 3):
                names = ["train", "pairs"]
            elif step in (4, 5):
                names = ["train", "scorer_fit"]
            else:
                names = ["train"]
            for name in names:
                parts[name].append((NOUNS[index], colours[(row + step) % len(colours)]))
    return tuple(parts[split])


@cache
def _prompts(split: str) -> tuple[str, ...]:
    every = [caption(Scene(*both, size, place))
             for both, size, place in itertools.product(combinations(split), SIZES, PLACES)]  # fmt: skip
    return tuple(every[i] for i in RandomState(1).permutation(len(every)))


def prompts(split: str) -> list[str]:
    """All captions of a split, 15 a combination, in a fixed shuffled order: any first n are a fair sample."""
    return list(_prompts(split))


def random_scenes(n: int, seed: int, split: str) -> list[Scene]:
    """`n` scenes of a split; finish q ~ Beta(1.2, 1.6), everything else uniform."""
    rng = RandomState(seed)
    both, sizes, places = combinations(split), tuple(SIZES), tuple(PLACES)
    return [
        Scene(*both[a], sizes[b], places[c], float(q), int(s))
        for a, b, c, q, s in zip(
            rng.randint(len(both), size=n),
            rng.randint(len(sizes), size=n),
            rng.randint(len(places), size=n),
            rng.beta(1.2, 1.6, size=n),
            rng.randint(2**31 - 1, size=n),
            strict=True,
        )
    ]


@cache
def _sprite(noun: str, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Colour [side, side, 3], alpha [side, side, 1] and blurred shadow of a sprite, float32 in [0, 1]."""
    with np.load(SPRITES) as sprites:
        image = Image.fromarray(sprites[noun]).resize((side, side), Image.Resampling.LANCZOS)
    shadow = Image.new("L", (SIDE, SIDE))
    shadow.paste(image.getchannel("A"), ((SIDE - side) // 2, (SIDE - side) // 2))
    shadow = np.asarray(shadow.filter(ImageFilter.GaussianBlur(2.5)), np.float32)[..., None] / 255
    pixels = np.asarray(image, np.float32) / 255
    return pixels[..., :3], pixels[..., 3:], shadow


def render(scene: Scene) -> np.ndarray:
    """Draws a scene: uint8 [64, 64, 3], the same for the same scene on every machine."""
    rng = RandomState(scene.seed)
    jitter = rng.randint(-2, 3, size=2)
    side = SIZES[scene.size] + int(rng.randint(-1, 2))
    tint = rng.uniform(-0.03, 0.03, size=3).astype(np.float32)
    light = np.linspace(0.10, -0.10, SIDE, dtype=np.float32)[:, None, None]  # from above

    canvas = np.asarray(COLOURS[scene.colour], np.float32) / 255 + tint + scene.q * light
    canvas = np.broadcast_to(canvas, (SIDE, SIDE, 3)).copy()
    direction = PLACES[scene.place]
    x, y = (SIDE // 2 + REACH[scene.size] * direction[axis] + int(jitter[axis]) for axis in (0, 1))
    colour, alpha, shadow = _sprite(scene.noun, side)
    canvas *= 1 - 0.5 * scene.q * _moved(shadow, x - SIDE // 2 + 2, y - SIDE // 2 + 3)
    left, top = x - side // 2, y - side // 2
    rows, columns = slice(max(top, 0), min(top + side, SIDE)), slice(max(left, 0), min(left + side, SIDE))
    inside = (slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left))
    canvas[rows, columns] += alpha[inside] * (colour[inside] - canvas[rows, columns])

    grey = canvas @ np.asarray([0.299, 0.587, 0.114], np.float32)
    canvas = grey[..., None] + (0.30 + 0.75 * scene.q) * (canvas - grey[..., None])
    canvas = 0.5 + (0.55 + 0.5 * scene.q) * (canvas - 0.5)
    return (canvas.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _moved(plane: np.ndarray, dx: int, dy: int) -> np.ndarray:
    """The plane [64, 64, 1] shifted by (dx, dy) pixels, zeros coming in."""
    out = np.zeros_like(plane)
    to_y, to_x = slice(max(dy, 0), SIDE + min(dy, 0)), slice(max(dx, 0), SIDE + min(dx, 0))
    from_y, from_x = slice(max(-dy, 0), SIDE + min(-dy, 0)), slice(max(-dx, 0), SIDE + min(-dx, 0))
    out[to_y, to_x] = plane[from_y, from_x]
    return out


def ground(picture: np.ndarray) -> str:
    """The ground colour of a picture (uint8 [64, 64, 3]): the name of the hue nearest to its border's."""
    pixels = np.asarray(picture)
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3),
                             pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)])  # fmt: skip
    hue = _hue(np.median(border, axis=0))
    return min(COLOURS, key=lambda name: abs((hue - _hue(COLOURS[name]) + 0.5) % 1 - 0.5))


def _hue(rgb: np.ndarray | tuple[int, int, int]) -> float:
    return colorsys.rgb_to_hsv(*(float(value) / 255 for value in rgb))[0]
