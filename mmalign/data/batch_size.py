"""How many things a model makes at once, found out while it works."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

from mmalign.records import UserError

FASTER = 1.05  # a larger batch has to make so many times the things a second
SPARE = 0.8  # share of the free memory that a larger batch may take

T = TypeVar("T")


class BatchSize:
    """A batch size that is doubled from 1 as long as that is faster and memory allows.

    On an accelerator memory is found out by running out of it; on the CPU, where that ends the process, by what the
    process held while it made a batch, against what is free.

    Args:
        device: Of the model, which is loaded.
        fixed: A size that does not grow.
        most: No larger than this.

    Attributes:
        now: The size of the next batch.
    """

    def __init__(self, device: Any, fixed: int | None = None, most: int = 64):
        import psutil

        self.now, self.most, self.growing = fixed or 1, most, fixed is None
        self.watched = device.type == "cpu"
        self.rate, self.warm = 0.0, False
        self.process, self.free = psutil.Process(), lambda: psutil.virtual_memory().available
        self.base = self._held()

    def run(self, count: int, make: Callable[[], T | None]) -> T | None:
        """What `make` gives for a batch of `count`; decides how large the next is, unless that is None."""
        started = time.monotonic()
        with self._looking() if self.growing and self.watched else nullcontext([]) as seen:
            made = make()
        if made is not None and self.growing and count == self.now:
            self._decide(count / (time.monotonic() - started), seen)
        return made

    def shrink(self, label: str) -> None:
        """After memory ran out.

        Raises:
            UserError: There is no smaller size.
        """
        if self.now == 1:
            raise UserError(
                f"{label}: one candidate alone does not fit into memory; ask for smaller ones (--height, --width,"
                " --max-new-tokens) or take a smaller model."
            )
        self.growing, self.now = False, self.now // 2

    def _decide(self, rate: float, seen: Sequence[int]) -> None:
        if not self.warm:  # the first batch pays for what is done once
            self.warm = True
        elif rate < FASTER * self.rate:
            self.growing, self.now = False, self.now // 2
        elif 2 * self.now > self.most or not self._fits(seen):
            self.growing = False
        else:
            self.rate, self.now = rate, 2 * self.now

    def _fits(self, seen: Sequence[int]) -> bool:
        """Whether memory is free for twice what the batch took above the model; what is still held counts as free."""
        if not seen:
            return True
        need = 2 * (max(seen) - self.base) - (self._held() - self.base)
        return need < SPARE * self.free()

    def _held(self) -> int:
        return self.process.memory_info().rss

    @contextmanager
    def _looking(self) -> Iterator[list[int]]:
        """Bytes that the process holds, looked at many times a second while the block runs."""
        seen, done = [self._held()], threading.Event()

        def look() -> None:
            while not done.wait(0.02):
                seen.append(self._held())

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield seen
        finally:
            done.set()
            thread.join()
