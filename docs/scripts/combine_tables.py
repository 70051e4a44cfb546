"""Write the tables of docs/combine.md from experiments/combine/results.json.

python docs/scripts/combine_tables.py [--page FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "combine.md"
FIGURES = Path(__file__).parents[2] / "experiments" / "combine" / "results.json"
Scores = Mapping[str, Mapping[str, float]]  # seed -> part -> nats a token


def _scores(results: Mapping[str, Any], cell: str) -> dict[str, dict[str, float]]:
    """Return the scores of a cell by seed."""
    found = {}
    for name, figures in results["cells"].items():
        seed, _, rest = name.partition("/")
        if rest == cell:
            found[seed] = figures["nll"]
    return found


def _right(results: Mapping[str, Any], group: str) -> dict[str, dict[str, float]]:
    """Return what the right adapter alone has on each part, by seed."""
    parts = results["groups"][group]
    alone = {part: _scores(results, f"scores/test/{group}/{part}") for part in parts}
    seeds = set.intersection(*(set(scores) for scores in alone.values()))
    return {seed: {part: alone[part][seed][part] for part in parts} for seed in sorted(seeds)}


def _row(name: str, scores: Scores, right: Scores, parts: list[str]) -> list[str]:
    """Write the means over seeds, and the distance to the right adapter alone."""
    seeds = sorted(scores.keys() & right.keys())
    if not seeds:
        return []
    cells = []
    for part in parts:
        values = [scores[seed][part] for seed in seeds]
        spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.3f}{spread}")
    worst = max(
        statistics.mean(scores[seed][part] - right[seed][part] for seed in seeds) for part in parts
    )
    return [name, *cells, f"{worst:+.3f}", str(len(seeds))]


def _lines(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *(row for row in rows if row)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def group_table(results: Mapping[str, Any], group: str) -> str:
    """Return the table of one group: every way on every part."""
    parts, right = results["groups"][group], _right(results, group)
    chain = parts[0] + "".join(f"-then-{part}" for part in parts[1:])
    cells = {
        **{f"adapter of {part} alone": f"scores/test/{group}/{part}" for part in parts},
        "mean of the adapters (`add_weighted_adapter`)": f"scores/test/{group}/mean",
        "gates, 60 rows a part": f"gates-test/{group}/60/final",
        "gates, 360 rows a part": f"gates-test/{group}/360/final",
        "one LoRA, part after part": f"scores/test/{group}/{chain}",
        "one LoRA, all parts together": f"scores/test/{group}/joint-{group}",
    }
    rows = [_row("**the right adapter for each part**", right, right, parts)]
    rows += [_row(name, _scores(results, cell), right, parts) for name, cell in cells.items()]
    head = ["answers' loss, nats a token", *parts, "worst part, to the right adapter", "seeds"]
    return _lines(head, rows)


def search_table(results: Mapping[str, Any]) -> str:
    """Return the table of the settings that were tried, on validation rows of one seed."""
    prefix = "seed0/gates-validation/A+B/360/"
    rows = []
    bounds = {"the right adapter (an oracle router)": "oracle", "equal weights": "uniform"}
    for name, cell in bounds.items():
        figures = results["cells"].get(f"seed0/routing/A+B/{cell}")
        if figures:
            nll = figures["nll"]
            rows.append([name, "", f"{nll['A']:.3f}", f"{nll['B']:.3f}", "", ""])
    for name, figures in results["cells"].items():
        if name.startswith(prefix):
            nll, shares = figures["nll"], figures["shares"]
            rows.append(
                [
                    name.removeprefix(prefix), f"{figures['trainable_parameters']:,}",
                    f"{nll['A']:.3f}", f"{nll['B']:.3f}",
                    f"{shares['A']['A']:.2f}", f"{shares['B']['B']:.2f}",
                ]
            )  # fmt: skip
    head = ["gates", "trained parameters", "A", "B", "weight of A on A", "weight of B on B"]
    return _lines(head, rows)


def tables(results: Mapping[str, Any]) -> dict[str, str]:
    """Return every table of the page by the name of its place."""
    made = {f"combine {group}": group_table(results, group) for group in results["groups"]}
    return made | {"combine search": search_table(results)}


def _places(text: str, made: Mapping[str, str]) -> Iterator[str]:
    for name, table in made.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(start)
        _, _, text = rest.partition(end)
        yield f"{before}{start}\n\n{table}\n\n{end}"
    yield text


def page(text: str) -> str:
    """Return the page with the tables in their places, which stand in the order of `tables`."""
    results = json.loads(FIGURES.read_text(encoding="utf-8"))
    return "".join(_places(text, tables(results)))


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", type=Path, default=PAGE)
    file = parser.parse_args().page
    file.write_text(page(file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
