"""Batches of whole comparisons, in an order that is a function and not a state."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np

from mmalign.records import Comparison, Sound, Text, UserError, Video, open_image


class Batches:
    """Deals comparisons to ranks, over and over.

    All epochs form one endless row of places, and step s takes the next `groups_per_batch` places of each
    rank in turn. So resuming at a step costs nothing; two ranks together see what one rank with twice the
    batch sees; and a batch is short of its size only where one comparison came up in it twice (a data set
    smaller than four such batches): it is used once.

    Args:
        comparisons: The data; only the items of a batch are read.
        groups_per_batch: Comparisons a rank gets in a step, >= 1.
        seed: Of the order.
        rank: This process, in [0, world_size).
        world_size: Number of processes.
        shuffle: Take a new order every epoch instead of the given one.
        num_workers: Threads that prepare batches ahead in `iterate`; the batches are the same for any number.
        kinds: [comparisons] a number each; those of one kind are put together, `block` by `block`, as far as they go.
        block: Comparisons of an optimizer step, all ranks together; so that the order does not depend on the ranks.

    Raises:
        UserError: There are no comparisons, or fewer than ranks.
    """

    def __init__(
        self,
        comparisons: Sequence[Comparison],
        *,
        groups_per_batch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        num_workers: int = 0,
        kinds: np.ndarray | None = None,
        block: int = 1,
    ):
        if len(comparisons) < world_size:
            raise UserError(f"The data set has {len(comparisons)} comparisons for {world_size} processes.")
        self.comparisons, self.groups_per_batch, self.seed = comparisons, groups_per_batch, seed
        self.rank, self.world_size, self.shuffle, self.num_workers = rank, world_size, shuffle, num_workers
        self.kinds, self.block = kinds, block
        self.order = lru_cache(maxsize=4)(self._order)

    def _order(self, epoch: int) -> np.ndarray:
        """[comparisons] row numbers in the order of this epoch."""
        size = len(self.comparisons)
        if not self.shuffle:
            return np.arange(size)
        order = self._shuffled(epoch)
        if epoch:  # what ended the last epoch must not begin this one: a batch across the border has it once
            tail = self._shuffled(epoch - 1)[size - size // 4 :]
            head = order[: size // 2]
            order[: size // 2] = head[np.argsort(np.isin(head, tail), kind="stable")]
        return order if self.kinds is None else self._together(order)

    def _together(self, order: np.ndarray) -> np.ndarray:
        """The order in blocks of one kind, each where its last comparison stood; what fills none comes last."""
        blocks, rests = [], []
        for kind in np.unique(self.kinds):
            places = np.flatnonzero(self.kinds[order] == kind)
            whole = len(places) // self.block * self.block
            blocks += list(places[:whole].reshape(-1, self.block))
            rests.append(places[whole:])
        blocks.sort(key=lambda places: places[-1])
        return order[np.concatenate([*blocks, *rests])]

    def _shuffled(self, epoch: int) -> np.ndarray:
        # Raw Philox numbers are the same in every numpy version, Generator.permutation promises no such thing
        raw = np.random.Philox(key=[self.seed % 2**64, epoch]).random_raw(len(self.comparisons))
        return np.argsort(raw, kind="stable")

    def _places(self, step: int) -> dict[int, int]:
        """Row number -> epoch, for this rank's share of the step."""
        first = (step * self.world_size + self.rank) * self.groups_per_batch
        places: dict[int, int] = {}
        for place in range(first, first + self.groups_per_batch):
            epoch, position = divmod(place, len(self.comparisons))
            places.setdefault(int(self.order(epoch)[position]), epoch)
        return places

    def batch(self, step: int) -> list[Comparison]:
        """This rank's comparisons of micro-step `step` >= 0, media still encoded."""
        return [self.comparisons[row] for row in self._places(step)]

    def draws(self, step: int) -> list[int]:
        """How often each comparison of the batch was visited before: its draw index."""
        return list(self._places(step).values())

    def iterate(
        self,
        start: int = 0,
        stop: int | None = None,
        *,
        prepare: Callable[[list[Comparison]], Any] | None = None,
    ) -> Iterator[tuple[Any, list[int]]]:
        """Yield (prepared batch, draw indices) from step `start` on, without end unless `stop` is given.

        Args:
            start: First step.
            stop: Step to end before.
            prepare: What the workers do with a batch; default `decode`.
        """
        prepare = prepare or decode

        def load(step: int) -> tuple[Any, list[int]]:
            return prepare(self.batch(step)), self.draws(step)

        steps = iter(range(start, 2**63 if stop is None else stop))
        if not self.num_workers:
            yield from map(load, steps)
            return
        pool = ThreadPoolExecutor(self.num_workers)
        waiting: deque[Future] = deque()
        try:
            while True:
                ahead = 2 * self.num_workers - len(waiting)
                waiting.extend(pool.submit(load, step) for step in islice(steps, ahead))
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def decode(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The same comparisons with every picture opened, those of the condition too; `Text`, `Sound` and `Video` stay.

    Raises:
        UserError: A picture does not decode; the comparison and the picture's number are named.
    """

    def opened(media: Sequence[Any], where: str) -> tuple[Any, ...]:
        return tuple(
            medium if isinstance(medium, Text | Sound | Video) else open_image(medium, name=f"{where} {number}")
            for number, medium in enumerate(media)
        )

    return [
        replace(
            item,
            media=opened(item.media, f"comparison {item.id!r}, picture"),
            condition=item.condition and opened(item.condition, f"comparison {item.id!r}, input picture"),
        )
        for item in comparisons
    ]
