"""What a person sees while something runs: a bar a stage on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], None]


@contextmanager
def stage(title: str, total: int) -> Iterator[Advance]:
    """Shows the progress of `total` things; the block is given a function that takes how many were just done."""
    with (_bar if sys.stdout.isatty() else _lines)(title, total) as advance:
        yield advance


@contextmanager
def _bar(title: str, total: int) -> Iterator[Advance]:
    from rich import progress

    columns = (
        progress.TextColumn("{task.description:<28}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("took"),
        progress.TimeElapsedColumn(),
    )
    with progress.Progress(*columns) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)


@contextmanager
def _lines(title: str, total: int) -> Iterator[Advance]:
    """A line after the first batch, with the time left, then one every tenth, and one at the end."""
    started = time.monotonic()
    done, shown = 0, -1

    def advance(count: int) -> None:
        nonlocal done, shown
        done += count
        tenth = 10 * done // max(1, total)
        if tenth > shown and 0 < done < total:
            shown = tenth
            left = (time.monotonic() - started) * (total - done) / done
            print(f"{title}: {done}/{total}, about {left:.0f} s left", flush=True)

    print(f"{title} ...", flush=True)
    yield advance
    print(f"{title}: {done}/{total} in {time.monotonic() - started:.1f} s", flush=True)


def table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Prints a table; the first column is left, the others right."""
    from rich.console import Console
    from rich.table import Table

    made = Table(title=title, title_justify="left")
    for number, name in enumerate(header):
        made.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(made)
