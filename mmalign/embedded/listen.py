"""Two judges of the embedded audio model: which events a sound holds, and how well they are those of the prompt.

`Templates` is made from the synthesiser: every event has a picture of its bands over time, and a sound is searched for
it. `Network` is a small convolutional network that was fitted to synthesised sounds by CTC and shares neither the
features nor the arithmetic; it is the judge that no training sees.

Shapes: N sounds [N, 16384] at 8192 Hz; F cells of 1/32 s; B bands; E events.
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.random import RandomState
from torch import Tensor, nn

from mmalign.embedded.sounds import EVENTS, GRID, LENGTHS, RATE, Event, caption, events, sound

SPAN = min(LENGTHS)  # cells of an event that are compared
BANDS = 40
HEARD = 0.6  # similarity from which on an event counts as heard
FAINT = 8  # length of the bands of an event below which it is none; the faintest in the data have 9
UNASKED = 0.5  # what all loudness outside the prompt's events would cost


@cache
def _filters() -> Tensor:
    """[257, B] triangles of equal width in mel from 60 Hz to 3.9 kHz."""
    low, high = (2595 * float(np.log10(1 + hz / 700)) for hz in (60, 3900))
    mel = torch.linspace(low, high, BANDS + 2)
    edges, hz = 700 * (10 ** (mel / 2595) - 1), torch.linspace(0, RATE / 2, GRID + 1)[:, None]
    rising = (hz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - hz) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0)


def bands(waves: Tensor) -> Tensor:
    """[N, F, B] how loud each band is in each cell, logarithmic, 0 where it is silent."""
    waves = nn.functional.pad(waves, (GRID // 2, GRID // 2))
    window = torch.hann_window(2 * GRID)
    spectrum = torch.stft(waves, 2 * GRID, GRID, window=window, center=False, return_complex=True)
    return (spectrum.abs().transpose(1, 2) @ _filters()).div(2).log1p()


@cache
def templates() -> Tensor:
    """[E, SPAN, B] of length 1: the bands of each event, the mean of 16 renderings."""
    rng = RandomState(0)
    made = [np.stack([sound(event, SPAN, rng) for _ in range(16)]) for event in EVENTS]
    patches = torch.stack([bands(torch.from_numpy(waves).float()).mean(0)[:SPAN] for waves in made])
    return patches / patches.flatten(1).norm(dim=1)[:, None, None]


def similarity(waves: Tensor) -> tuple[Tensor, Tensor]:
    """[N, E, S] cosine of each event's template and the sound from each cell on; loudness [N, F] of the cells."""
    heard = bands(waves)
    patches = heard.unfold(1, SPAN, 1).transpose(2, 3)  # [N, S, SPAN, B]
    length = patches.flatten(2).norm(dim=2)
    least = (0.25 * length.amax(1, keepdim=True)).clamp(min=FAINT)  # nor is the edge of an event one
    cosine = torch.einsum("nsfb,efb->nes", patches, templates()) / torch.maximum(length, least)[:, None]
    return cosine, heard.square().sum(2)


def template_scores(waves: Tensor, prompts: list[str]) -> Tensor:
    """[N] mean similarity of the prompt's events at their best places in order, less what loudness elsewhere costs."""
    cosine, loudness = similarity(waves)
    return torch.tensor([_in_order(*row) for row in zip(cosine, loudness, map(events, prompts), strict=True)])


def clarity(waves: Tensor, prompts: list[str]) -> Tensor:
    """[N] what `template_scores` says of a sound that was asked for the events heard in it; 0 where there is none."""
    heard = template_events(waves)
    scores = template_scores(waves, [caption(found or EVENTS[:1]) for found in heard])
    return scores * torch.tensor(list(map(bool, heard)))


def _in_order(cosine: Tensor, loudness: Tensor, asked: tuple[Event, ...]) -> float:
    """Dynamic programme over where each asked event starts, at least SPAN cells after the one before it."""
    rows = [cosine[EVENTS.index(event)].double().numpy() for event in asked]
    best, choices = rows[0], []
    for row in rows[1:]:
        before = np.maximum.accumulate(best)
        choices.append([int(best[: s + 1].argmax()) for s in range(len(best))])
        best = np.full_like(row, -1.0)
        best[SPAN:] = row[SPAN:] + before[:-SPAN]
    at = int(best.argmax())
    starts = [at]
    for choice in reversed(choices):
        at = choice[at - SPAN]
        starts.append(at)
    covered = torch.zeros(len(loudness), dtype=torch.bool)
    for start in starts:
        covered[max(start - 1, 0) : start + max(LENGTHS) + 1] = True
    unasked = (loudness[~covered].sum() / loudness.sum().clamp(min=1)).item()
    return float(best.max()) / len(asked) - UNASKED * unasked


def template_events(waves: Tensor) -> list[tuple[Event, ...]]:
    """The events heard in each sound, in order: the most similar first, none within SPAN cells of another."""
    found = []
    for cosine in similarity(waves)[0]:
        cosine, chosen = cosine.clone(), []
        while cosine.max() >= HEARD:
            event, start = divmod(int(cosine.argmax()), cosine.shape[1])
            chosen.append((start, EVENTS[event]))
            cosine[:, max(start - SPAN + 2, 0) : start + SPAN - 1] = -1
        found.append(tuple(event for _, event in sorted(chosen)))
    return found


# --- the second judge


class Network(nn.Module):
    """Log-probabilities of "nothing" and each event at 1/32 s steps, from spectra of 16 ms."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.first = nn.Conv1d(65, width, 5, stride=2, padding=2)
        self.blocks = nn.ModuleList(nn.Conv1d(width, width, 5, padding=2 * d, dilation=d) for d in (1, 2, 4, 2))
        self.last = nn.Conv1d(width, 1 + len(EVENTS), 1)

    def forward(self, waves: Tensor) -> Tensor:
        """[F, N, 1 + E]."""
        window = torch.hann_window(GRID // 2)
        spectrum = torch.stft(waves, GRID // 2, GRID // 2, window=window, center=False, return_complex=True)
        hidden = (spectrum.abs() + 0.05).log().add(1).div(2)
        hidden = torch.relu(self.first(hidden))
        for block in self.blocks:
            hidden = hidden + torch.relu(block(hidden))
        return self.last(hidden).permute(2, 0, 1).log_softmax(-1)


WEIGHTS = Path(__file__).parent / "listener.safetensors"


@cache
def network() -> Network:
    """The fitted second judge."""
    from safetensors.torch import load_file

    made = Network().eval().requires_grad_(False)
    made.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
    return made


def ctc_loss(logp: Tensor, asked: list[tuple[Event, ...]]) -> Tensor:
    """[N] minus log-probability of the events in order, all alignments together (CTC, Graves et al. 2006)."""
    labels = torch.tensor([1 + EVENTS.index(event) for sequence in asked for event in sequence])
    steps, lengths = torch.full((logp.shape[1],), len(logp)), torch.tensor([len(sequence) for sequence in asked])
    return nn.functional.ctc_loss(logp, labels, steps, lengths, reduction="none")


def network_scores(waves: Tensor, prompts: list[str]) -> Tensor:
    """[N] log-probability of the prompt's events in order, a number an event."""
    asked = [events(prompt) for prompt in prompts]
    return -ctc_loss(network()(waves), asked) / torch.tensor([len(sequence) for sequence in asked])


def network_events(waves: Tensor) -> list[tuple[Event, ...]]:
    """The events heard in each sound, in order: the likeliest at each step, repetitions joined."""
    best = [torch.unique_consecutive(row).tolist() for row in network()(waves).argmax(-1).T]
    return [tuple(EVENTS[label - 1] for label in row if label) for row in best]


def events_in_order(waves: Tensor, prompts: list[str]) -> Tensor:
    """[N] share of the prompt's events that the second judge hears in their order."""
    asked = [events(prompt) for prompt in prompts]
    heard = network_events(waves)
    return torch.tensor([in_order(*pair) / len(pair[1]) for pair in zip(heard, asked, strict=True)])


def in_order(heard: tuple[Event, ...], asked: tuple[Event, ...]) -> int:
    """How many of the asked events were heard in their order: the longest common subsequence."""
    best = [0] * (len(heard) + 1)
    for event in asked:
        diagonal = 0
        for j, other in enumerate(heard, 1):
            diagonal, best[j] = best[j], diagonal + 1 if event == other else max(best[j], best[j - 1])
    return best[-1]
