"""A report as a table: by rich on a terminal, otherwise plain columns."""

from __future__ import annotations

import math
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rotmole.evaluation.report import Cell, Measure, Report

_DIGITS = {"chrf": 1, "perplexity": 2}


def format_measure(metric: str, measure: Measure | None, *, signed: bool = False) -> str:
    """Return a figure and its interval as text, such as "0.930 [0.905, 0.949]".

    Args:
        metric: its name decides the number of digits.
        measure: None gives "".
        signed: put a sign before positive figures too, as for differences.
    """
    if measure is None:
        return ""
    digits = _DIGITS.get(metric, 3)

    def figure(value: float) -> str:
        if not math.isfinite(value):
            return "-"
        return f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"

    return f"{figure(measure.value)} [{figure(measure.low)}, {figure(measure.high)}]"


def rows(report: Report, *, metrics: Sequence[str] | None = None) -> list[list[str]]:
    """Return a report's table: the header, then lines of task, group, metric, rows and systems.

    With exactly two systems the last column is their paired difference.

    Args:
        metrics: names of the metrics to show; None shows all.
    """
    names = list(report.systems)
    paired = len(names) == 2
    lines = [["task", "group", "metric", "rows", *names, *(["difference"] if paired else [])]]
    cells = {name: _by_task_and_group(report.systems[name].cells) for name in names}
    for name in names:
        if len(report.systems[name].examples) > 1:
            cells[name]["", ""] = report.systems[name].overall
    changes = _by_task_and_group(report.differences[names[1]]) if paired else {}
    for task, group in dict.fromkeys(key for name in names for key in cells[name]):
        by_system = [cells[name].get((task, group), {}) for name in names]
        for metric in dict.fromkeys(metric for cell in by_system for metric in cell):
            if metrics is not None and metric not in metrics:
                continue
            measures = [cell.get(metric) for cell in by_system]
            count = next(str(measure.n) for measure in measures if measure is not None)
            line = [task or "overall", group, metric, count]
            line += [format_measure(metric, measure) for measure in measures]
            if paired:
                change = changes.get((task, group), {}).get(metric)
                line.append(format_measure(metric, change, signed=True))
            lines.append(line)
    return lines


def _by_task_and_group(cells: Sequence[Cell]) -> dict[tuple[str, str], Mapping[str, Measure]]:
    return {(cell.task, cell.group): cell.metrics for cell in cells}


def print_table(lines: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """Print lines of equal length, the header first, as a table with an optional title.

    On a terminal the table fits its width, and no cell is cut: if needed, intervals go below their
    figures, then the cells before the figures share a column, and at last each line becomes a
    paragraph.
    """
    if not sys.stdout.isatty():
        if title is not None:
            print(title)
        print(plain_text(lines))
        return
    from rich.console import Console

    size = shutil.get_terminal_size()
    console = Console(width=size.columns, height=size.lines)
    broken = [[text.replace(" [", "\n[", 1) for text in line] for line in lines]
    for cells in (lines, broken, _joined(broken)):
        widths = [max(len(part) for text in column for part in text.split("\n"))
                  for column in zip(*cells, strict=True)]  # fmt: skip
        if sum(widths) + 3 * len(widths) + 1 <= console.width:
            console.print(rich_table(cells, title=title))
            return
    if title is not None:
        print(title)
    print(paragraphs(lines))


def _first_figure(lines: Sequence[Sequence[str]]) -> int:
    """Return the index of the first column with intervals, 1 if there is none."""
    return next((i for i, cells in enumerate(zip(*lines, strict=True)) if "[" in "".join(cells)), 1)


def _joined(lines: Sequence[Sequence[str]]) -> list[list[str]]:
    """Join the cells before the figures: the last two below the others."""
    first = _first_figure(lines)
    halves = ((line[: max(first - 2, 0)], line[max(first - 2, 0) : first]) for line in lines)
    joined = ["\n".join(" ".join(filter(None, half)) for half in pair if half) for pair in halves]
    return [[text, *line[first:]] for text, line in zip(joined, lines, strict=True)]


def paragraphs(lines: Sequence[Sequence[str]]) -> str:
    """Return lines of equal length, the header first, as one paragraph a line.

    The cells before the figures are its heading, the others one line each with their column's
    name.
    """
    header, *body = lines
    first = _first_figure(lines)
    width = max(map(len, header[first:]), default=0)
    texts = []
    for line in body:
        named = zip(header[:first], line[:first], strict=True)
        head = [f"{text} {name}" if text.isdecimal() else text for name, text in named if text]
        parts = zip(header[first:], line[first:], strict=True)
        texts.append("\n".join([" ".join(head), *(f"  {n:<{width}}  {t}" for n, t in parts if t)]))
    return "\n".join(texts)


def print_lines(lines: Sequence[str]) -> None:
    """Print sentences, wrapped at words on a terminal."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for line in lines:
        if width is None:
            print(line)
        else:
            print(textwrap.fill(line, width, subsequent_indent="  ", break_long_words=False))


def plain_text(lines: Sequence[Sequence[str]]) -> str:
    """Return lines of equal length, the header first, as columns padded with spaces."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
    return "\n".join(padded)


def rich_table(lines: Sequence[Sequence[str]], *, title: str | None = None) -> Any:
    """Return lines of equal length, the header first, as a rich.table.Table."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title)
    for name in lines[0]:
        table.add_column(name, justify="right" if name == "rows" else "left", no_wrap=True)
    tall = any("\n" in text for text in lines[0])
    for line in lines[1:]:
        # Text, because rich would read "[0.9, 0.95]" in a string as a style.
        table.add_row(*(Text(text) for text in line), end_section=tall)
    return table


def footnotes(report: Report) -> list[str]:
    """Return lines below the table that explain intervals, time and settings."""
    seconds = ", ".join(f"{name} {system.seconds:.1f} s" for name, system in report.systems.items())
    settings = ", ".join(
        f"{key} {value}" for key, value in report.settings.items() if value is not None
    )
    cut = {task: len(ids) for system in report.systems.values() for task, ids in system.cut.items()}
    shortened = ", ".join(f"{task} {count}" for task, count in cut.items() if count)
    return [
        "[low, high]: 95 % interval over test rows; another training seed may differ by more.",
        f"time: {seconds}",
        *([f"settings: {settings}"] if settings else []),
        *([f"rows whose prompt was cut (long_rows): {shortened}"] if shortened else []),
    ]
