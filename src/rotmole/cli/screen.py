"""What commands show while they work, on standard error: notes and progress."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rotmole.units import duration

INTERVAL = 10.0  # seconds between two lines of progress
LABEL = 16  # width of the names of facts


def note(text: str) -> None:
    """Print one line to standard error at once."""
    print(text, file=sys.stderr, flush=True)


def fact(name: str, text: str) -> None:
    """Print a name and a text; on a terminal, long texts break at words below themselves."""
    line = f"{name:<{LABEL}} {text}"
    if sys.stdout.isatty():
        line = textwrap.fill(
            line, max(shutil.get_terminal_size().columns, LABEL + 20),
            subsequent_indent=" " * (LABEL + 1), drop_whitespace=True, break_long_words=False,
            break_on_hyphens=False,
        )  # fmt: skip
    print(line, flush=True)


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yield show(what, done, total): bars on a terminal, otherwise lines.

    Without a terminal the first call is shown at once, with the total, and after it a line every
    ten seconds, with an estimate of the time that is left.
    """
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield show


def _lines() -> Callable[[str, int, int], None]:
    begun: dict[str, tuple[float, int]] = {}
    last: dict[str, float] = {}

    def show(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        first = what not in begun
        start, done_before = begun.setdefault(what, (now, done))
        if first or done == total or now - last[what] > INTERVAL:
            last[what] = now
            new = done - done_before
            left = (now - start) / new * (total - done) if new else 0
            note(f"{what} {done}/{total}" + (f", about {duration(left)} left" if left else ""))

    return show
