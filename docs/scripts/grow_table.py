"""Write the table of docs/grow.md from experiments/grow/results.json.

python docs/scripts/grow_table.py [--page FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "experiments" / "grow" / "results.json"
PAGE = ROOT / "docs" / "grow.md"
START, END = "<!-- grow -->", "<!-- end of grow -->"
LANGUAGES = ("de", "fr", "es", "pl")
NAMES = {
    "mixture": "mixture on de, fr, es",
    "grown-frozen": "then grown, old experts and router frozen, on pl",
    "grown-replay": "the same with 180 old rows among the 900 new ones",
    "lora": "LoRA on de, fr, es",
    "lora-on": "then trained on, on pl",
    "lora-replay": "the same with 180 old rows among the 900 new ones",
    "joint-lora": "LoRA on all four",
}


def _row(name: str, cells: list[dict[str, Any]]) -> str:
    first = cells[0]
    columns = [NAMES[name], f"{first['updates']}", f"{first['trainable_parameters']:,}"]
    columns.append(str(len(cells)))
    for language in LANGUAGES:
        scores = [cell["scores"][language] for cell in cells]
        exact = [score["exact_match"] for score in scores]
        spread = f" ({min(exact):.2f} to {max(exact):.2f})"
        columns.append(f"{mean(exact):.2f}{spread}, {mean(s['nll'] for s in scores):.3f}")
    columns.append(f"{mean(cell['text_nll'] for cell in cells):.3f}")
    return "| " + " | ".join(columns) + " |"


def table(figures: dict[str, Any]) -> str:
    """Return exact match, mean and range over the seeds, nats a token by language, and on text."""
    lines = [
        "| | updates | trained | seeds | " + " | ".join(LANGUAGES) + " | other text |",
        "|---|---|---|---|" + "---|" * (len(LANGUAGES) + 1),
    ]
    for name in NAMES:
        cells = [cell for cell in figures["cells"] if cell["cell"] == name]
        if cells:
            lines.append(_row(name, cells))
    base = f"{figures['base_text_nll']:.3f}"
    lines.append("| base model | " + "| " * (2 + len(LANGUAGES)) + f"| {base} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """Return the page with the table of the committed figures between its two markers."""
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{table(figures)}\n{END}{after}"


def main() -> None:
    """Write the table."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--page", type=Path, default=PAGE)
    given = options.parse_args()
    given.page.write_text(page(given.page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
