"""A report as lines of text: a rich table on a terminal, plain columns elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rotmole.evaluation.report import Cell, Measure, Report

_DIGITS = {"chrf": 1, "perplexity": 2}


def format_measure(metric: str, measure: Measure | None, *, signed: bool = False) -> str:
    """A figure and its interval, such as "0.930 [0.905, 0.949]".

    Args:
        metric: its name, which sets the digits.
        measure: the figure; None gives "".
        signed: show a plus sign, as differences do.
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
    """The report as a header and lines: task, group, metric, rows, one column per system.

    With exactly two systems the paired difference is the last column.

    Args:
        metrics: show these only.

    Returns:
        Equally long lists of text, the header first.
    """
    names = list(report.systems)
    paired = len(names) == 2
    lines = [["task", "group", "metric", "rows", *names, *(["difference"] if paired else [])]]
    found = {name: _by_cell(report.systems[name].cells) for name in names}
    for name in names:
        if len(report.systems[name].examples) > 1:
            found[name]["", ""] = report.systems[name].overall
    changes = _by_cell(report.differences[names[1]]) if paired else {}
    for task, group in dict.fromkeys(key for name in names for key in found[name]):
        here = [found[name].get((task, group), {}) for name in names]
        for metric in dict.fromkeys(metric for cell in here for metric in cell):
            if metrics is not None and metric not in metrics:
                continue
            measures = [cell.get(metric) for cell in here]
            count = next(str(measure.n) for measure in measures if measure is not None)
            line = [task or "overall", group, metric, count]
            line += [format_measure(metric, measure) for measure in measures]
            if paired:
                change = changes.get((task, group), {}).get(metric)
                line.append(format_measure(metric, change, signed=True))
            lines.append(line)
    return lines


def _by_cell(cells: Sequence[Cell]) -> dict[tuple[str, str], Mapping[str, Measure]]:
    return {(cell.task, cell.group): cell.metrics for cell in cells}


def plain_text(lines: Sequence[Sequence[str]]) -> str:
    """Columns padded with spaces, no line wider than its content.

    Args:
        lines: equally long lists of text, the header first.

    Returns:
        The text, lines joined by line breaks.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
    return "\n".join(padded)


def rich_table(lines: Sequence[Sequence[str]], *, title: str | None = None) -> Any:
    """The same lines as a table for a terminal.

    Args:
        lines: equally long lists of text, the header first.

    Returns:
        A rich.table.Table.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title)
    for name in lines[0]:
        table.add_column(name, justify="right" if name == "rows" else "left")
    for line in lines[1:]:
        # Text, not markup: "[0.9, 0.95]" would be read as a style.
        table.add_row(*(Text(text) for text in line), end_section=False)
    return table


def footnotes(report: Report) -> list[str]:
    """What a reader of the table has to know: intervals, cost, settings.

    Returns:
        Lines of text.
    """
    seconds = ", ".join(f"{name} {system.seconds:.1f} s" for name, system in report.systems.items())
    settings = ", ".join(
        f"{key} {value}" for key, value in report.settings.items() if value is not None
    )
    return [
        "[low, high]: 95 % interval over rows; another training seed may differ by more.",
        f"time: {seconds}",
        *([f"settings: {settings}"] if settings else []),
    ]
