"""The sounds that the embedded audio model is trained on: one to three events after each other, with a caption.

An event is one of eight kinds in one of two variants: "a high beep", "three clicks". A caption says the events in
order, "first a high beep, then a low buzz, finally two clicks"; no kind comes twice in it. Loudness, lengths and gaps
are not captioned. Every event starts on a multiple of `GRID` samples with the same phase.

A share of the sounds that the base model is trained on is not what its caption says: an event is missing, or two are
exchanged, as captions of found sounds have it. So the model does both too, and "all events, in order" is a real
preference with a known answer.

Prompts are split by combination, the set of kinds in them, so that no set of one part is one of another:

    test          8 sets of three kinds, 4 of two      never trained on, by anything
    development   8 sets of three kinds, 8 of two      never trained on, by anything
    train         all others, and single events        the base model and the second judge; it contains
      pairs         16 sets of three kinds, 8 of two   preference pairs
"""

import itertools
import re
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.random import RandomState  # its stream is frozen for good, so sounds never change

RATE = 8192  # Hz
GRID = 256  # samples in a cell: 1/32 second, one latent of the model
CELLS = 64  # a sound is 2 seconds long
KINDS = ("beep", "buzz", "hiss", "whoop", "drop", "trill", "bell", "clicks")
ORDINALS = ("first", "then", "finally")
LENGTHS = (12, 13, 14)  # cells that an event lasts
ASTRAY = 0.5  # of the base model's training sounds are not what they are called
SPLITS = ("train", "pairs", "development", "test")
# Sets of kinds as places on the circle of KINDS, each turned to all 8 positions: every kind is met equally often
PARTS = {"test": ((0, 1, 3), (0, 4)), "development": ((0, 2, 5), (0, 3)), "pairs": ((0, 1, 4), (0, 1, 6), (0, 1))}

Event = tuple[str, str]  # variant and kind


def variants(kind: str) -> tuple[str, str]:
    """The two variants of a kind."""
    return ("two", "three") if kind == "clicks" else ("low", "high")


EVENTS: tuple[Event, ...] = tuple((variant, kind) for kind in KINDS for variant in variants(kind))


def caption(events: tuple[Event, ...]) -> str:
    """The text of a sequence of events."""
    named = [("" if kind == "clicks" else "a ") + f"{variant} {kind}" for variant, kind in events]
    return ", ".join(map(" ".join, zip(ORDINALS, named, strict=False))) if len(named) > 1 else named[0]


def events(prompt: str) -> tuple[Event, ...]:
    """The events that a caption names, in order; what is no event is passed over."""
    found = re.findall(rf"(\w+) ({'|'.join(KINDS)})\b", prompt)
    return tuple(event for event in found if event in EVENTS)


def _turned(places: tuple[int, ...]) -> set[frozenset[str]]:
    return {frozenset(KINDS[(place + by) % 8] for place in places) for by in range(8)}


@cache
def combinations(split: str) -> tuple[frozenset[str], ...]:
    """The sets of kinds in a split, in a fixed order."""
    parts = {name: set().union(*map(_turned, places)) for name, places in PARTS.items()}
    every = {frozenset(kinds) for n in (1, 2, 3) for kinds in itertools.combinations(KINDS, n)}
    parts["train"] = every - parts["test"] - parts["development"]
    return tuple(sorted(parts[split], key=lambda kinds: [len(kinds), *sorted(kinds)]))


@cache
def _prompts(split: str) -> tuple[str, ...]:
    orders = [order for kinds in combinations(split) for order in itertools.permutations(sorted(kinds))]
    every = [caption(tuple(zip(chosen, order, strict=True)))
             for order in orders for chosen in itertools.product(*map(variants, order))]  # fmt: skip
    return tuple(every[i] for i in RandomState(2).permutation(len(every)))


def prompts(split: str) -> list[str]:
    """All captions of a split in a fixed shuffled order: any first n are a fair sample."""
    return list(_prompts(split))


@dataclass(frozen=True)
class Piece:
    """One sound: its events, when they start and how long they last (both in cells), and how loud they are."""

    events: tuple[Event, ...]
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    loudness: tuple[float, ...]
    seed: int = 0


def random_pieces(n: int, seed: int, split: str) -> list[Piece]:
    """`n` pieces of a split; of ten 6 have three kinds, 3 have two and 1 has one, as far as the split has them."""
    rng = RandomState(seed)
    sizes = [[kinds for kinds in combinations(split) if len(kinds) == size] for size in (1, 2, 3)]
    share = np.array([1.0, 3.0, 6.0]) * [bool(sets) for sets in sizes]
    return [random_piece(rng, _random_events(rng, sizes[rng.choice(3, p=share / share.sum())])) for _ in range(n)]


def _random_events(rng: RandomState, sets: list[frozenset[str]]) -> tuple[Event, ...]:
    kinds = sorted(sets[rng.randint(len(sets))])
    return tuple((variants(kinds[i])[rng.randint(2)], kinds[i]) for i in rng.permutation(len(kinds)))


def wrong_ways(sequence: tuple[Event, ...]) -> list[tuple[Event, ...]]:
    """The sequence with two neighbours exchanged, and with an event missing."""
    exchanged = [(*sequence[:i], *sequence[i : i + 2][::-1], *sequence[i + 2 :]) for i in range(len(sequence) - 1)]
    missing = [sequence[:i] + sequence[i + 1 :] for i in range(len(sequence))]
    return exchanged + missing


def astray(rng: RandomState, sequence: tuple[Event, ...], split: str) -> tuple[Event, ...]:
    """One of the wrong ways whose set of kinds is of the split; without one, the sequence itself."""
    ways = [way for way in wrong_ways(sequence) if frozenset(kind for _, kind in way) in combinations(split)]
    return ways[rng.randint(len(ways))] if ways else sequence


def random_piece(rng: RandomState, sequence: tuple[Event, ...]) -> Piece:
    """A sequence of events in time; it begins after 1 to 4 cells, gaps are 2 to 5."""
    lengths = [int(rng.choice(LENGTHS)) for _ in sequence]
    starts, at = [], int(rng.randint(1, 5))
    for length in lengths:
        starts.append(at)
        at += length + int(rng.randint(2, 6))
    loudness = rng.uniform(0.5, 1.0, size=len(sequence))
    return Piece(sequence, tuple(starts), tuple(lengths), tuple(map(float, loudness)), int(rng.randint(2**31 - 1)))


def render(piece: Piece) -> np.ndarray:
    """The sound of a piece: float32 [16384] in [-1, 1] at 8192 Hz, the same for the same piece on every machine."""
    rng = RandomState(piece.seed)
    wave = 5e-4 * rng.standard_normal(CELLS * GRID)
    for event, start, length, loudness in zip(piece.events, piece.starts, piece.lengths, piece.loudness, strict=True):
        begin, end = start * GRID, min(start + length, CELLS) * GRID
        wave[begin:end] += loudness * sound(event, length, rng)[: end - begin]
    return wave.astype(np.float32)


def sound(event: Event, length: int, rng: RandomState) -> np.ndarray:
    """One event of some cells, with 8 ms of fading at both ends; only a hiss draws from `rng`.

    Pitches are multiples of 32 Hz, so a tone goes through zero at every cell's start.
    """
    variant, kind = event
    n, high = length * GRID, variant in ("high", "three")
    t = np.arange(n) / RATE
    match kind:
        case "beep":
            wave = 0.5 * _tone(1536 if high else 384, t)
        case "buzz":  # odd harmonics, as a square wave has them
            pitch = 224 if high else 96
            wave = 0.28 * sum(_tone(k * pitch, t) / k**0.7 for k in range(1, 3400 // pitch, 2))
        case "hiss":
            spectrum, hz = np.fft.rfft(rng.standard_normal(n)), np.fft.rfftfreq(n, 1 / RATE)
            low, top = (2300, 3500) if high else (500, 1100)
            wave = np.fft.irfft(spectrum * ((hz > low) & (hz < top)), n)
            wave *= 0.2 / wave.std()
        case "whoop" | "drop":  # one pitch a cell
            pitches = np.geomspace(*((896, 2688) if high else (224, 704)), length)[:: 1 if kind == "whoop" else -1]
            wave = 0.5 * _tone(np.repeat((pitches / 32).round() * 32, GRID), t)
        case "trill":  # two notes, two cells each in turn
            notes = (1984, 2496) if high else (576, 832)
            wave = 0.5 * _tone(np.where(np.arange(n) // (2 * GRID) % 2 == 0, *notes), t)
        case "bell":
            partials = ((1120, 1, 5), (3104, 0.7, 7)) if high else ((320, 1, 5), (896, 0.6, 7), (1728, 0.5, 9))
            wave = 0.42 * sum(size * _tone(hz, t) * np.exp(-fade * t) for hz, size, fade in partials)
        case _:  # clicks, four cells apart
            wave = np.zeros(n)
            for begin in range(0, (3 if high else 2) * 4 * GRID, 4 * GRID):
                wave[begin:] += np.exp(-120 * t[: n - begin]) * _tone(1024, t[: n - begin])
    fade = np.minimum(1, np.arange(n) / 64)
    return wave * fade[::-1] * (1 if kind in ("bell", "clicks") else fade)


def _tone(hz: float | np.ndarray, t: np.ndarray) -> np.ndarray:
    return np.sin(2 * np.pi * hz * t)
