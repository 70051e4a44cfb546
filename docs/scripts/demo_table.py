"""Write the demo's table in README.md from experiments/results/demo.json.

    python docs/scripts/demo_table.py [--new runs/demo/demo.json] [--readme FILE]

--new first replaces the committed figures by those of a demo that has just run.
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "experiments" / "results" / "demo.json"
START, END = "<!-- demo -->", "<!-- end of demo -->"


def store(new: Path) -> None:
    """Keep the figures of a demo, and what it was made with."""
    demo = json.loads(new.read_text(encoding="utf-8"))
    demo["report"].pop("predictions", None)
    demo["made_with"] = {
        **{package: version(package) for package in ("rotmole", "torch", "transformers", "peft")},
        "machine": platform.machine(),
    }
    FIGURES.write_text(json.dumps(demo, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _value(figures: dict[str, Any]) -> str:
    return f"{figures['exact_match']['value']:.2f}"


def table(demo: dict[str, Any]) -> str:
    """Return the table: exact match by task for the four systems, and overall with intervals."""
    systems = demo["report"]["systems"]
    lines = [["exact match", *systems], ["---"] * (len(systems) + 1)]
    for task in next(iter(systems.values()))["tasks"]:
        lines.append([task, *(_value(s["tasks"][task]["metrics"]) for s in systems.values())])
    overall = [s["overall"]["exact_match"] for s in systems.values()]
    intervals = [f"{o['value']:.2f} [{o['low']:.2f}, {o['high']:.2f}]" for o in overall]
    lines.append([f"all {overall[0]['n']} rows", *intervals])
    counts = [demo["trainable_parameters"].get(name) for name in systems]
    lines.append(["trainable parameters", *(f"{count:,}" if count else "" for count in counts)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_table(readme: str) -> str:
    """Return README.md with the table of the committed figures between its two markers."""
    demo = json.loads(FIGURES.read_text(encoding="utf-8"))
    before, _, rest = readme.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{table(demo)}\n{END}{after}"


def main() -> None:
    """Store new figures if there are any, and write the table."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--new", type=Path)
    options.add_argument("--readme", type=Path, default=ROOT / "README.md")
    given = options.parse_args()
    if given.new:
        store(given.new)
    text = given.readme.read_text(encoding="utf-8")
    given.readme.write_text(with_table(text), encoding="utf-8")


if __name__ == "__main__":
    main()
