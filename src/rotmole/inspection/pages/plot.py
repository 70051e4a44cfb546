"""One figure of a report: how it is drawn, its numbers as a table, how to act on it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rotmole.drawing import WIDTH, draw, pdf, series, short, standalone
from rotmole.files import atomic_write_bytes, atomic_write_text, make_folder
from rotmole.inspection.pages.sheets import Sheet

MARKERS = 15
"""Markers of a line, at most."""


@dataclass(frozen=True)
class Plot:
    """A figure.

    Attributes:
        name: of its file, without ending.
        title: above it.
        caption: how to read it and how to act on it.
        sheet: the same numbers.
        paint: draws it on an empty matplotlib figure.
        height, width: inches.
    """

    name: str
    title: str
    caption: str
    sheet: Sheet
    paint: Callable[[Any], None]
    height: float = 2.9
    width: float = WIDTH

    @property
    def svg(self) -> str:
        """The figure for a page."""
        return draw(
            self.paint, name=self.name, label=self.title, height=self.height, width=self.width,
            description=f"{self.caption} The table after the figure has its numbers.",
        )  # fmt: skip

    def write(self, folder: Path) -> list[Path]:
        """Write the figure as SVG and as PDF."""
        place = make_folder(folder)
        return [
            atomic_write_text(place / f"{self.name}.svg", standalone(self.svg) + "\n"),
            atomic_write_bytes(
                place / f"{self.name}.pdf", pdf(self.paint, height=self.height, width=self.width)
            ),
        ]


def file_names(stem: str, tasks: Sequence[str]) -> list[str]:
    """Return a name for a file of each task, of letters that every file system and page takes.

    >>> file_names("usage", ["de", "../de", "漢"])
    ['usage-de', 'usage-de-2', 'usage-3']
    """
    names: list[str] = []
    for place, task in enumerate(tasks, 1):
        name = "-".join([stem, *re.findall("[A-Za-z0-9]+", task)])
        names.append(f"{name}-{place}" if name in (stem, *names) else name)
    return names


def marked(index: int, points: int) -> dict[str, Any]:
    """Return the style of a line; of many points only some get the marker that tells it apart."""
    step = math.ceil(points / MARKERS)
    return series(index) | ({"markevery": (index % step, step)} if step > 1 else {})


def ticks(axes: Any, names: Sequence[str], room: int = 10) -> None:
    """Name the places of a horizontal axis, as many as there is room for."""
    step = max(1, math.ceil(len(names) / room))
    long = max(map(len, names), default=0) > 5
    axes.set_xticks(
        range(0, len(names), step),
        [short(name, 14) for name in names[::step]],
        rotation=30 if long else 0,
        ha="right" if long else "center",
    )


def mean(values: Sequence[float | None]) -> float:
    """Return the mean of the known values, NaN if there are none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else math.nan


def first_upper(text: str) -> str:
    """Return a text as the beginning of a sentence."""
    return text[:1].upper() + text[1:]
