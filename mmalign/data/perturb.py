"""Media made worse on purpose: rejected videos, sounds and pictures for preference data without people.

Every function is pure and a function of `(seed, key)`, where the key tells an item from the others (its id, or its
place). What comes back is never what went in; None says that there is nothing to perturb, a ValueError that it cannot
be: fewer than two things, or a number out of range. Sequences are perturbed as indices, so that they serve tensors,
lists and paths alike and permutations can be undone. Text: see perturb_text.py.

Sources: drop, reverse and shuffle with their magnitudes as in TEMPLE (lscpku/TEMPLE @ 12701f4,
inference/generator_base.py:41-140); hidden image tokens as in BDHS (arXiv 2407.02477), which has no published code.
"""

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageFilter

from mmalign.records import Comparison
from mmalign.surrogate.draws import generator

Key = int | str
How = Literal["shuffle", "drop", "reverse"]

CURRICULUM = (16, 8, 4, 2)  # TEMPLE's magnitudes: what differs most, and so is easiest to tell, comes first


def keyed(stream: str, seed: int, key: Key) -> np.random.Generator:
    """The random numbers of one item for one purpose."""
    if isinstance(key, str):
        key = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
    return generator(stream, seed, key)


# --- sequences: frames of a video, clips, sounds, by their indices ---


def shuffled(count: int, seed: int, key: Key, magnitude: int | None = None) -> list[int]:
    """The indices of `count` things in another order; runs of count // magnitude (default: 1) stay together."""
    runs = _runs(count, magnitude)
    draw = keyed("shuffled", seed, key)
    order = list(range(len(runs)))
    while order == sorted(order):
        order = draw.permutation(len(runs)).tolist()
    return [index for run in order for index in runs[run]]


def reversed_order(count: int, magnitude: int | None = None) -> list[int]:
    """The indices of `count` things backwards, by runs of count // magnitude that keep their order."""
    return [index for run in reversed(_runs(count, magnitude)) for index in run]


def kept(
    count: int,
    magnitude: int,
    seed: int,
    key: Key,
    *,
    groups: Sequence[Any] | None = None,
    similarity: np.ndarray | None = None,
) -> list[int]:
    """The indices that are left when max(1, count // magnitude) of `count` things are kept, in their order.

    What a smaller magnitude drops, a larger one drops as well. Given groups ([count] ids, such as scenes), one is
    dropped as a whole before the next is begun; given similarity ([count, count], 0 or more), what is like those that
    are gone goes next.
    """
    _runs(count, magnitude)
    draw = keyed("kept", seed, key)
    order = draw.permutation(count).tolist()
    if groups is not None:
        first: dict[Any, int] = {}
        for place, index in enumerate(order):
            first.setdefault(groups[index], place)
        order.sort(key=lambda index: first[groups[index]])
    elif similarity is not None:
        order = order[:1]
        while len(order) < count:
            chance = np.asarray(similarity, dtype=float)[order].mean(axis=0)
            chance[order] = 0
            rest = np.setdiff1d(np.arange(count), order)
            share = chance[rest] / chance[rest].sum() if chance[rest].any() else None
            order.append(int(draw.choice(rest, p=share)))
    return sorted(order[count - max(1, count // magnitude) :])


def curriculum(count: int) -> list[int]:
    """TEMPLE's magnitudes for `count` things, the easiest to tell first; of those that do the same, the smallest."""
    by_kept = {max(1, count // magnitude): magnitude for magnitude in CURRICULUM}
    return [by_kept[left] for left in sorted(by_kept) if left < count]


def take(sequence: Any, indices: Sequence[int]) -> Any:
    """A list's, array's or tensor's elements at `indices`, along the first axis."""
    if isinstance(sequence, list | tuple):
        return [sequence[index] for index in indices]
    return sequence[list(indices)]


def inverse(order: Sequence[int]) -> list[int]:
    """The permutation that undoes `order`: by `take`, one after the other, they give back what was there."""
    return np.argsort(order).tolist()


def _runs(count: int, magnitude: int | None) -> list[range]:
    if count < 2 or (magnitude is not None and magnitude < 2):
        raise ValueError(f"{count} things with magnitude {magnitude}: needs 2 things or more, and 2 or more")
    size = 1 if magnitude is None else max(1, count // magnitude)
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


# --- pictures and sounds ---


def blurred(image: Image.Image, radius: float) -> Image.Image:
    """A picture under a Gaussian of `radius` pixels, above 0; one of a single colour has nothing to lose."""
    if radius <= 0:
        raise ValueError(f"radius is {radius}; it has to be above 0")
    return image.filter(ImageFilter.GaussianBlur(radius))


def hidden(count: int, ratio: float, seed: int, key: Key) -> np.ndarray:
    """Which of `count` image tokens, patches or frames are hidden: [count] bool, round(ratio · count) of them true.

    At least one is hidden; ratio 1 is no picture at all. What a smaller ratio hides, a larger one hides as well.
    """
    if count < 1 or not 0 < ratio <= 1:
        raise ValueError(f"{count} tokens with ratio {ratio}: needs 1 or more, and a ratio above 0 and up to 1")
    mask = np.zeros(count, dtype=bool)
    mask[keyed("hidden", seed, key).permutation(count)[: max(1, round(ratio * count))]] = True
    return mask


def perturb_sound(
    waveform: Any, sample_rate_hz: int, boundaries: Sequence[float], how: How, seed: int, key: Key
) -> tuple[Any, list[int]] | None:
    """A sound whose events are in another order, backwards event by event, or one fewer.

    The waveform is [channels, samples], array or tensor; the boundaries are the seconds at which one event ends and the
    next begins, rising, inside the sound; `how` is "shuffle", "reverse" (the events' order; each is played forwards) or
    "drop" (one of them). Gives the waveform and the segments' indices in it; None where all segments sound alike.
    """
    samples = waveform.shape[-1]
    edges = [0, *(round(second * sample_rate_hz) for second in boundaries), samples]
    if not boundaries or any(end <= start for start, end in pairwise(edges)):
        raise ValueError(f"boundaries {list(boundaries)} have to rise inside the {samples / sample_rate_hz:.3f} s")
    count = len(edges) - 1
    if how == "shuffle":
        order = shuffled(count, seed, key)
    elif how == "reverse":
        order = reversed_order(count)
    else:
        gone = int(keyed("drop_segment", seed, key).integers(count))
        order = [index for index in range(count) if index != gone]
    places = np.concatenate([np.arange(edges[index], edges[index + 1]) for index in order])
    changed = waveform[:, places]
    return None if changed.shape == waveform.shape and bool((changed == waveform).all()) else (changed, order)


def comparison(
    prompt: str,
    chosen: Any,
    rejected: Any,
    how: str,
    seed: int,
    key: Key,
    *,
    condition: Sequence[Any] | None = None,
    user: str | None = None,
) -> Comparison:
    """A pair whose rejected medium was made from the chosen one, or for a perturbed input.

    Its id is a function of prompt, `how` (the perturbation's name, such as "reorder_events"), seed and key; the last
    three are the rejected one's source.
    """
    source = f"{how} seed {seed} key {key}"
    name = hashlib.sha256("\0".join((prompt, source)).encode()).hexdigest()[:24]
    shown = None if condition is None else tuple(condition)
    return Comparison(
        name, prompt, (chosen, rejected), (1.0, 0.0), user=user, condition=shown, source=("original", source)
    )
