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
COMBINED = {"`rotmole combine`": "all parameters", "gates alone": "gates"}
FITTED = {
    "token": "a fitted router in each layer, reads the token",
    "prefix": "a fitted router in each layer, reads the text so far",
    "shared": "one fitted router for all layers, reads the text so far",
}
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
        **{
            f"{name}, {rows} rows a part": f"gates-test/{group}/{rows}/{cell}"
            for name, cell in COMBINED.items()
            for rows in (60, 360)
        },
        "experts alone, weights about equal, 360 rows a part": f"gates-test/{group}/360/experts",
        "one LoRA, part after part": f"scores/test/{group}/{chain}",
        "one LoRA, all parts together": f"scores/test/{group}/joint-{group}",
    }
    rows = [_row("**the right adapter for each part**", right, right, parts)]
    rows += [_row(name, _scores(results, cell), right, parts) for name, cell in cells.items()]
    head = ["answers' loss, nats a token", *parts, "worst part, to the right adapter", "seeds"]
    return _lines(head, rows)


def search_table(results: Mapping[str, Any]) -> str:
    """Return the table of the settings that were tried, on validation rows of one seed."""
    place = "seed0/gates-validation/A+B/360/"
    cells = results["cells"]
    alone = {part: cells[f"seed0/scores/validation/A+B/{part}"]["nll"][part] for part in "AB"}
    rows = []

    def row(name: str, nll: Mapping[str, float], *more: str) -> None:
        worst = max(nll[part] - alone[part] for part in "AB")
        figures = [f"{nll[part]:.3f}" for part in "AB"]
        rows.append([name, *figures, f"{worst:+.3f}", *more, *[""] * (3 - len(more))])

    row("the right adapter for each part, as an oracle router has it", alone)
    row("equal weights", cells["seed0/scores/validation/A+B/mean"]["nll"])
    for way, figures in cells.get("seed0/routing/A+B", {"ways": {}})["ways"].items():
        row(FITTED[way], figures["nll"])
    for name, figures in cells.items():
        if name.startswith(place):
            own = [f"{figures['shares'][part][part]:.2f}" for part in "AB"]
            count = f"{figures['trainable_parameters']:,}"
            row(name.removeprefix(place), figures["nll"], *own, count)
    head = ["what weighs or what is trained", "A", "B", "worst part, to the right adapter",
            "weight of A on A", "weight of B on B", "trained parameters"]  # fmt: skip
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
