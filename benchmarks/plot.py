"""One plot for each question: every ratio with its 10-90 % range, as SVG next to the CSV.

python benchmarks/plot.py [--results FOLDER]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common import RESULTS, Row, read

LONGEST = 60  # bars of one plot


def draw(question: str, rows: list[Row], path: Path) -> None:
    """Draw horizontal bars of the median with the range as whiskers."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = rows[:LONGEST]
    figure = Figure(figsize=(11, 1.2 + 0.26 * len(rows)), layout="constrained")
    axes = figure.subplots()
    values = [row.value for row in rows]
    below = [max(row.value - row.low_10, 0) for row in rows]
    above = [max(row.high_90 - row.value, 0) for row in rows]
    places = range(len(rows))
    axes.barh(places, values, xerr=[below, above], color="#9db8d2", ecolor="#333333", capsize=2)
    labels = [f"{row.mode} {row.measure}, {row.case}" for row in rows]
    axes.set_yticks(places, labels, fontsize=6)
    axes.invert_yaxis()
    if rows[0].unit == "x":
        axes.axvline(1, color="#b03030", linewidth=1)
        axes.set_xlabel("ratio; median and 10-90 % of alternated rounds")
    else:
        axes.set_xlabel(f"{rows[0].unit}; median and 10-90 %")
    axes.set_title(question)
    axes.spines[["top", "right"]].set_visible(False)
    with mpl.rc_context({"svg.hashsalt": question}):  # the same file for the same figures
        figure.savefig(path, metadata={"Date": None})


def main() -> int:
    """Draw every question that has results."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--results", type=Path, default=RESULTS)
    given = options.parse_args()
    rows = [row for row, _ in read(given.results).values()]
    for question in dict.fromkeys(row.question for row in rows):
        mine = [row for row in rows if row.question == question]
        units = [row.unit for row in mine]
        unit = "x" if "x" in units else units[0]
        path = given.results / f"{question}.svg"
        draw(question, [row for row in mine if row.unit == unit], path)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
