"""Captions and answers made worse on purpose: events in another order, missing or wrong, and wrong objects.

As in perturb.py everything is a function of `(seed, key)`, and None says that there is nothing to perturb.

Source: event sequences as in Tango 2 (arXiv 2404.09956), written from the paper.
"""

import re
from collections.abc import Collection, Sequence

from mmalign.data.perturb import Key, keyed

_ORDERED = r"\s*,?\s*\b(?:and then|followed by|then|after|before)\b\s*|\s*,\s*(?:and\s+)?"
_SPLIT = {
    True: re.compile(f"({_ORDERED})", re.IGNORECASE),
    False: re.compile(rf"({_ORDERED}|\s*\bwhile\b\s*)", re.IGNORECASE),
}
_AN = re.compile(r"(?!uni|use|eu|one\b|once|ubi)[aeiou]|hour|honest|heir|honou?r", re.IGNORECASE)


def events(caption: str) -> list[str]:
    """What happens in a caption, in its order: its parts between "then", "followed by", "after", "while" and commas."""
    parts, slots, _ = _parts(caption, ordered=False)
    return [parts[slot] for slot in slots]


def reorder_events(caption: str, seed: int, key: Key) -> str | None:
    """The events of a caption in another order, its connectives in place; None where fewer than two follow each other.

    What "while" joins happens at once, so it stays together.
    """
    parts, slots, end = _parts(caption, ordered=True)
    found = [parts[slot] for slot in slots]
    if len({text.casefold() for text in found}) < 2:
        return None
    draw = keyed("reorder_events", seed, key)
    while True:
        order = draw.permutation(len(slots))
        if any(found[new].casefold() != old.casefold() for new, old in zip(order, found, strict=True)):
            break
    for slot, new in zip(slots, order, strict=True):
        parts[slot] = found[new]
    return _sentence(parts, end, caption)


def drop_event(caption: str, seed: int, key: Key) -> str | None:
    """A caption without one of its events; None where it has fewer than two."""
    parts, slots, end = _parts(caption, ordered=False)
    if len(slots) < 2:
        return None
    # events of no text, as before a leading "After", go with the connective beside them
    parts = [part for slot in slots for part in parts[max(slot - 1, 0) : slot + 1]][slots[0] > 0 :]
    gone = int(keyed("drop_event", seed, key).integers(len(slots)))
    del parts[slice(0, 2) if gone == 0 else slice(2 * gone - 1, 2 * gone + 1)]
    return _sentence(parts, end, caption)


def swap_event(caption: str, other: str, seed: int, key: Key) -> str | None:
    """A caption with one of its events replaced by one of another caption's; None where it has fewer than two.

    Also None where the other caption has no event of its own.
    """
    parts, slots, end = _parts(caption, ordered=False)
    known = {parts[slot].casefold() for slot in slots}
    new = [text for text in events(other) if text.casefold() not in known]
    if len(slots) < 2 or not new:
        return None
    draw = keyed("swap_event", seed, key)
    parts[slots[draw.integers(len(slots))]] = new[draw.integers(len(new))]
    return _sentence(parts, end, caption)


def _parts(caption: str, *, ordered: bool) -> tuple[list[str], list[int], str]:
    """Event, connective, event …, the places of events with text, and the mark that ends the sentence.

    The first event is as inside a sentence.
    """
    text = caption.strip()
    body = text.rstrip(".!")
    parts = _SPLIT[ordered].split(body)
    word = parts[0].partition(" ")[0]
    if word == "A" or word[1:].islower():  # "TV" and "I" stay as they are
        parts[0] = parts[0][:1].lower() + parts[0][1:]
    return parts, [place for place in range(0, len(parts), 2) if parts[place]], text[len(body) :]


def _sentence(parts: Sequence[str], end: str, caption: str) -> str:
    text = "".join(parts).strip()
    return (text[:1].upper() + text[1:] if caption.strip()[:1].isupper() else text) + end


def wrong_object(text: str, vocabulary: Collection[str], seed: int, key: Key) -> str | None:
    """A caption or answer that names another object: a word of the vocabulary in place of one that is there.

    Whole words, wherever that word stands; its case and an article before it are kept right. The new word is none that
    the text has. None where the text names nothing of the vocabulary, or all of it.
    """
    words = sorted({word.casefold() for word in vocabulary}, key=lambda word: (-len(word), word))
    there = [word for word in words if re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE)]
    new = [word for word in words if word not in there]
    if not there or not new:
        return None
    draw = keyed("wrong_object", seed, key)
    old, word = there[draw.integers(len(there))], new[draw.integers(len(new))]

    def replaced(match: re.Match[str]) -> str:
        article, space, found = match.groups()
        made = word.upper() if found.isupper() and len(found) > 1 else word
        made = made[:1].upper() + made[1:] if found[0].isupper() else made
        if not article:
            return made
        return article[0] + ("n" if _AN.match(word) else "") + space + made

    return re.sub(rf"\b(?:(an?)(\s+))?({re.escape(old)})\b", replaced, text, flags=re.IGNORECASE)
