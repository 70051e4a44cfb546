"""What commands show while they work, on standard error: notes and progress."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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
    """Yield show(what, done, total): bars on a terminal, otherwise a line every ten seconds."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield show


def _lines() -> Callable[[str, int, int], None]:
    last: dict[str, float] = {}

    def show(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - last.setdefault(what, now) > INTERVAL:
            last[what] = now
            note(f"{what} {done}/{total}")

    return show
