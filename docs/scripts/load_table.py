"""Write the table of the load test in docs/serving.md from benchmarks/results/serve_load.csv.

python docs/scripts/load_table.py
"""

from __future__ import annotations

import csv
from pathlib import Path

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "benchmarks" / "results" / "serve_load.csv"
PAGE = ROOT / "docs" / "serving.md"
START, END = "<!-- load -->", "<!-- end of load -->"
ROWS = (
    ("requests, open at once", "{requests}, {at_once}"),
    ("clients that went away, requests lost", "{cancelled}, {lost}"),
    ("answers equal to the model's alone", "{equal} of {compared}"),
    ("seconds of the clock, of the processor", "{seconds}, {processor_seconds}"),
    ("tokens a second of the clock", "{tokens_per_second}"),
    ("tokens a second of the processor", "{tokens_per_processor_second}"),
    ("seconds to the first token: median, 95 %", "{first_token_median_s}, {first_token_95_s}"),
    ("memory before, peak, after (MB)",
     "{memory_before_mb}, {memory_peak_mb}, {memory_after_mb}"),
)  # fmt: skip


def table() -> str:
    """Return the table: a column for each server; and what it was measured with."""
    with FIGURES.open(encoding="utf-8") as stream:
        made_with = stream.readline().lstrip("# ").strip()
        servers = list(csv.DictReader(stream))
    lines = [["", *(server["server"] for server in servers)], ["---"] * (len(servers) + 1)]
    lines += [[name, *(text.format(**server) for server in servers)] for name, text in ROWS]
    rows = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{rows}\n\nMeasured with: {made_with}."


def page(text: str) -> str:
    """Return docs/serving.md with the table of the committed figures between its two markers."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
