"""Pictures, captions and preferences for the embedded scorers, with the oracle that only this file knows.

The oracle likes a picture for its finish and for being true to its prompt:

    utility = q - cost of each wrong attribute,    P(a preferred to b) = sigmoid(SHARPNESS · (u_a - u_b))

Both pictures of a comparison answer one prompt, and wrong grounds are drawn evenly from all colours, so
neither the noun nor the colour of the ground says which one is preferred.
"""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from mmalign.embedded.scenes import COLOURS, NOUNS, PLACES, SIZES, Scene, caption, combinations, render

COST = {"noun": 1.0, "colour": 0.8, "size": 0.4, "place": 0.4}  # in units of finish, whose whole range is 1
CHOICES = {"noun": NOUNS, "colour": tuple(COLOURS), "size": tuple(SIZES), "place": tuple(PLACES)}
SHARPNESS = 12.0  # a difference of 0.25 in finish is agreed on by 95 %


def combos(split: str, without: str = "") -> list[tuple[str, str]]:
    """The (noun, colour) combinations of a split, less those of another."""
    away = set(combinations(without)) if without else set()
    return [both for both in combinations(split) if both not in away]


def scene(rng: np.random.Generator, allowed: list[tuple[str, str]]) -> Scene:
    """A scene of an allowed combination with finish uniform in [0, 1]."""
    noun, colour = allowed[rng.integers(len(allowed))]
    size, place = (str(rng.choice(CHOICES[name])) for name in ("size", "place"))
    return fresh(rng, Scene(noun, colour, size, place))


def fresh(rng: np.random.Generator, scene: Scene) -> Scene:
    """Another picture of the same caption: new finish, new seed."""
    return replace(scene, q=float(rng.random()), seed=int(rng.integers(2**31 - 1)))


def changed(rng: np.random.Generator, scene: Scene, name: str, allowed: set | None = None) -> Scene:
    """The scene with one attribute different, with its own finish and seed."""
    others = [value for value in CHOICES[name] if value != getattr(scene, name)]
    if allowed is not None and name in ("noun", "colour"):
        free = [v for v in others if (replace(scene, **{name: v}).noun, replace(scene, **{name: v}).colour) in allowed]
        others = free or others
    return fresh(rng, replace(scene, **{name: str(rng.choice(others))}))


def families(rng: np.random.Generator, count: int, allowed: list[tuple[str, str]]) -> list[Scene]:
    """`count` scenes in fours: one, and three that differ from it in ground, noun, and size or place."""
    inside, out = set(allowed), []
    while len(out) < count:
        base = scene(rng, allowed)
        last = "size" if rng.random() < 0.5 else "place"
        out += [base, *(changed(rng, base, name, inside) for name in ("colour", "noun", last))]
    return out[:count]


def utility(scene: Scene, asked: Scene) -> float:
    """What the oracle thinks of a picture of `scene` for the caption of `asked`."""
    return scene.q - sum(cost for name, cost in COST.items() if getattr(scene, name) != getattr(asked, name))


def answer(rng: np.random.Generator, asked: Scene) -> Scene:
    """A picture for a prompt: true to it six times in ten, else with one or two wrong attributes."""
    made = fresh(rng, asked)
    for _ in range(rng.choice(3, p=(0.6, 0.3, 0.1))):
        made = changed(rng, made, str(rng.choice(tuple(COST))))
    return made


def comparisons(rng: np.random.Generator, count: int, allowed: list[tuple[str, str]]):
    """Prompts, pictures a, pictures b, and the oracle's noisy choice: 1 where a is preferred, else 0."""
    asked = [scene(rng, allowed) for _ in range(count)]
    a, b = [answer(rng, s) for s in asked], [answer(rng, s) for s in asked]
    gap = np.array([utility(x, s) - utility(y, s) for x, y, s in zip(a, b, asked, strict=True)])
    chosen = rng.random(count) < 1 / (1 + np.exp(-SHARPNESS * gap))
    return [caption(s) for s in asked], a, b, torch.from_numpy(chosen.astype(np.float32))


def draw(scenes: list[Scene]) -> torch.Tensor:
    """Renders scenes: [N, 3, 64, 64] in [0, 1]."""
    return torch.from_numpy(np.stack([render(s) for s in scenes])).permute(0, 3, 1, 2).float().div(255)


def worn(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Gives half the pictures faults of generated ones: blur, fine and coarse noise, shifts of colour."""

    def some(share: float, top: float) -> torch.Tensor:
        amount = torch.rand(len(pixels), 1, 1, 1, generator=generator) * top
        return amount * (torch.rand(len(pixels), 1, 1, 1, generator=generator) < share)

    out = torch.lerp(pixels, F.avg_pool2d(F.pad(pixels, (1,) * 4, mode="replicate"), 3, 1), some(0.5, 1.0))
    small = F.interpolate(F.avg_pool2d(out, 2), scale_factor=2, mode="bilinear")
    out = torch.lerp(out, small, some(0.2, 1.0))
    coarse = torch.randn(len(out), 3, 8, 8, generator=generator)
    out = out + F.interpolate(coarse, scale_factor=8, mode="bilinear") * some(0.4, 0.06)
    out = out + torch.randn(out.shape, generator=generator) * some(0.4, 0.05)
    out = out + torch.randn(len(out), 3, 1, 1, generator=generator) * some(0.4, 0.03)
    return out.clamp(0, 1)
