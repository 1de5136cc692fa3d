"""Answers that a model makes up about a picture it can hardly see: rejected ones without people or a second model.

Bias-driven hallucination sampling, arXiv 2407.02477 sections 3.4 and E (no code was published): nearly all of the
picture's tokens are hidden from attention, and the true answer is followed sentence by sentence, so that what differs
is what the picture would have told.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from mmalign.data.perturb import comparison, hidden, keyed
from mmalign.records import Comparison, Text, UserError

SENTENCE = re.compile(r"\S.*?(?:[.!?](?=\s)|$)\s*", re.DOTALL)
OPPOSITE = {"yes": "no", "Yes": "No", "YES": "NO", "no": "yes", "No": "Yes", "NO": "YES"}


def same_words(one: str, other: str) -> bool:
    """Whether two answers differ in nothing but case, spaces and marks."""
    return re.findall(r"\w+", one.casefold()) == re.findall(r"\w+", other.casefold())


def hallucinated(
    modality: Any,
    items: Sequence[Comparison],
    *,
    share: float = 0.99,
    tries: int = 5,
    alike: Callable[[str, str], bool] = same_words,
    seed: int = 0,
    max_new_tokens: int = 128,
    progress: Callable[[int], None] | None = None,
) -> list[Comparison]:
    """Pairs of a comparison's best answer and one that the model made up; a function of seed, ids and weights.

    Args:
        modality: a vision-language model: its `generate` takes `starts`, `hidden` and `stop`.
        items: each has pictures for its condition and `Text` answers; one answer will do.
        share: of the picture's tokens that are hidden; the paper's 0.99 is for LLaVA 1.6, whose tokens repeat each
            other. Exactly that share here, each token by itself there.
        tries: an answer that is like the true one is made again with other tokens hidden and sentences cut elsewhere;
            the last try follows the true answer no more. The paper's number.
        alike: whether two answers say the same. The paper: the cosine of their embeddings by all-mpnet-base-v2 is
            above 0.97.
        seed: of everything random.
        max_new_tokens: for a sentence, and for the whole answer of the last try.
        progress: is told how many items were finished.

    Returns:
        The pairs, in the items' order; without those whose answer came out word for word as it was at the last try.

    Raises:
        ValueError: share is not in (0, 1], or tries is below 1.
        UserError: an item shows no picture, or its best medium is no text.
    """
    if not 0 < share <= 1 or tries < 1:
        raise ValueError(f"share is {share} and tries {tries}: needs a share in (0, 1], and 1 or more")
    made: list[Comparison] = []
    for item in items:
        answer = item.media[int(np.argmax(item.score))]
        if not item.condition or not isinstance(answer, Text):
            missing = "its best medium is no text" if item.condition else "it shows no picture that could be hidden"
            raise UserError(f"comparison {item.id!r}: {missing}; leave it out.")
        other = answer
        for number in range(tries):
            key = f"{item.id} try {number}"
            sentences = SENTENCE.findall(answer) if number < tries - 1 else [""]
            other = _made_up(
                modality,
                item,
                sentences,
                partial(hidden, ratio=share, seed=seed, key=key),
                keyed("bdhs", seed, key),
                max_new_tokens,
            )
            if not alike(answer, other):
                break
        if other != answer:
            shown = {"condition": item.condition, "user": item.user}
            made.append(comparison(item.prompt, answer, other, f"bdhs {share:g}", seed, item.id, **shown))
        if progress:
            progress(1)
    return made


def _made_up(
    modality: Any,
    item: Comparison,
    sentences: Sequence[str],
    hide: Callable[[int], Any],
    draw: np.random.Generator,
    max_new_tokens: int,
) -> Text:
    """The sentences again, each after the true ones before it: it begins as it did and ends as the model has it."""
    before = ["".join(sentences[:place]).rstrip() for place in range(len(sentences))]
    starts = [
        f"{text} {begun}".strip()
        for text, begun in zip(before, (_begun(sentence, draw) for sentence in sentences), strict=True)
    ]
    count = len(sentences)
    said = modality.generate(
        [item.prompt] * count,
        seeds=draw.integers(2**31, size=count).tolist(),
        images=[item.condition] * count,
        starts=starts,
        hidden=[hide] * count,
        stop="." if any(sentences) else None,
        max_new_tokens=max_new_tokens,
    )
    spaces = [sentence[len(sentence.rstrip()) :] for sentence in sentences]
    new = (whole[len(text) :].strip() for whole, text in zip(said, before, strict=True))
    return Text("".join(text + space for text, space in zip(new, spaces, strict=True)).strip())


def _begun(sentence: str, draw: np.random.Generator) -> str:
    """A sentence up to a random word, without the mark that ends it; yes and no at its start turn every other time."""
    words = sentence.rstrip().rstrip(".!?").split(" ")
    begun = words[: draw.integers(len(words) + 1)]
    first = begun[0].rstrip(",") if begun else ""
    if first in OPPOSITE and draw.random() < 0.5:
        begun[0] = begun[0].replace(first, OPPOSITE[first])
    return " ".join(begun)
