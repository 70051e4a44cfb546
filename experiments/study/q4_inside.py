"""Q4, part two: what rotation and routing add in finished adapters, and what is static.

    OMP_NUM_THREADS=1 python experiments/study/q4_inside.py runs/study/q4_inside
        [--methods NAME ...] [--seeds N ...] [--results FILE]

The folder is that of q4_inside.yaml, or of q1.yaml, which has the same cells. Each final cell is
inspected as `rotmole inspect` does, on test rows; a cell that is in the results already is left
alone. docs/scripts/results.py makes the table of docs/results.md from the results.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rotmole.comparison.results import CELL
from rotmole.data import load_splits
from rotmole.evaluation.target import find_target, load_target
from rotmole.files import atomic_write_text
from rotmole.inspection.inspect import inspect_adapter
from rotmole.inspection.inspection import Inspection
from rotmole.inspection.pages.summary import mean_angle
from rotmole.inspection.sample import sample_of

RESULTS = Path(__file__).parent / "results" / "q4_inside.json"
METHODS = ("moe_lora", "dense_mean_one", "tangent", "cayley_h4")


def inspected(cell: Path, tokens: int) -> Inspection:
    """Inspect the adapter of a cell on its test rows.

    Args:
        cell: a run folder.
        tokens: to look at, and as many to fit a static map on.
    """
    place = find_target(cell)
    assert place.run is not None
    loaded = load_target(place)
    splits = load_splits(
        place.run.data, seed=place.run.seed, tokenizer=loaded.tokenizer, date=place.date
    )
    sample = sample_of(place.run, splits | {"validation": {}}, loaded.tokenizer, tokens)
    return inspect_adapter(loaded.model, loaded.tokenizer, sample, target=str(cell))


def figures(inspection: Inspection) -> dict[str, Any]:
    """Return what the table shows: losses of answers, static shares, mean angles by task."""
    answers, static = inspection.answers["all"], inspection.static
    tasks = dict.fromkeys(task for layer in inspection.layers for task in layer.usage)
    return {
        "tokens": sum(inspection.source.tokens.values()),
        "answers": {
            name: getattr(answers, name) for name in ("trained", "rotation_off", "uniform", "base")
        },
        "static": None
        if static is None
        else dict(zip(map(str, static.ranks), static.held_out, strict=True)),
        "linear": None if static is None else static.linear[1],
        "angles": {
            task: mean_angle(
                layer.usage[task] for layer in inspection.layers if task in layer.usage
            )
            for task in tasks
        },
    }


def main() -> None:
    """Inspect the cells that are missing, and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("study", type=Path, help="the folder of the study")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    results: Path = options.results
    known = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    for seed in options.seeds:
        for method in options.methods:
            name = f"{method}/seed-{seed}"
            if name not in known:
                cell = options.study / "cells" / "final" / name
                made = json.loads((cell / CELL).read_text(encoding="utf-8"))["facts"]
                known[name] = figures(inspected(cell, options.tokens)) | {
                    "made": {what: made[what] for what in ("processor", "dtype", "commit")}
                }
                atomic_write_text(results, json.dumps(known, indent=1, sort_keys=True) + "\n")
                print(name, known[name]["answers"])


if __name__ == "__main__":
    main()
