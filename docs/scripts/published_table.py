"""Write the price of the published studies in docs/compare.md.

python docs/scripts/published_table.py
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "experiments" / "published" / "price.json"
PAGE = ROOT / "docs" / "compare.md"
START, END = "<!-- published -->", "<!-- end of published -->"
HEADER = (
    "study", "method", "parameters, M", "cells", "tokens of a cell, M",
    "10^15 operations of a cell", "hours of all cells", "memory, GB",
)  # fmt: skip
SPEED = 1e14
"""Operations in a second, for the hours."""


def table() -> str:
    """Return the table: a line for each method, and one for each study."""
    lines = [HEADER, ["---"] * len(HEADER)]
    for study, content in json.loads(FIGURES.read_text(encoding="utf-8")).items():
        methods = content["methods"]
        for name, price in methods.items():
            figures = [price["parameters"] / 1e6, price["tokens"] / 1e6, price["operations"] / 1e15]
            parameters, tokens, operations = (f"{figure:.1f}" for figure in figures)
            hours = f"{price['cells'] * price['operations'] / SPEED / 3600:.1f}"
            memory = f"{price['memory'] / 1e9:.1f}"
            lines.append(
                [study, name, parameters, str(price["cells"]), tokens, operations, hours, memory]
            )
        cells = sum(price["cells"] for price in methods.values())
        whole = sum(price["cells"] * price["operations"] for price in methods.values())
        hours = f"{whole / SPEED / 3600:.1f}"
        lines.append([study, f"all, on {content['model']}", "", str(cells), "", "", hours, ""])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(text: str) -> str:
    """Return docs/compare.md with the table of the committed figures between its two markers."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
