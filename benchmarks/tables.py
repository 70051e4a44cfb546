"""Tables of docs/performance.md that are no targets: operations, small layers, memory, GPUs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import Row


def operations(rows: Sequence[Row]) -> str:
    """Return where the time of a step goes, ours beside the baseline's."""
    mine = [row for row in rows if row.question == "operations"]
    lines = ["| case | operation | ours, ms | baseline, ms |", "|---|---|---|---|"]
    seen = set()
    for row in mine:
        case = f"{row.case}, {row.mode} / {row.against}"
        lines.append(
            f"| {case if case not in seen else ''} | {row.measure} | {1e3 * (row.ours or 0):.2f} | "
            f"{1e3 * (row.baseline or 0):.2f} |"
        )
        seen.add(case)
    return "\n".join(lines) if mine else "Not measured."


def launches(rows: Sequence[Row]) -> str:
    """Return counts and fixed costs of a small layer: ours, others, and LoRA in the same rounds."""
    mine = [row for row in rows if row.question == "launches"]
    sides = {(row.mode, row.measure.partition(",")[0], row.measure.rpartition(", ")[2]): row
             for row in mine}  # fmt: skip
    columns = [(what, when) for when in ("forward and backward", "one token")
               for what in ("operations", "compiled kernels", "fixed cost")]  # fmt: skip
    columns.remove(("compiled kernels", "one token"))
    lines = ["| layer | operations | compiled kernels | microseconds | operations, one token | "
             "microseconds, one token |", "|---|---|---|---|---|---|"]  # fmt: skip
    for mode in dict.fromkeys(row.mode for row in mine):
        cells = []
        for what, when in columns:
            row = sides.get((mode, what, when)) or sides.get((mode, f"{what} and kernels", when))
            factor = 1e6 if what == "fixed cost" else 1
            cells.append("" if row is None else
                         f"{factor * row.ours:.0f} / {factor * row.baseline:.0f}")  # fmt: skip
        lines.append(f"| {mode} | {' | '.join(cells)} |")
    whole = [row for row in mine if row.measure == "operations, one decoded token"]
    if whole:
        counts = ", ".join(f"{row.mode} {row.ours:.0f} / {row.baseline:.0f}" for row in whole)
        lines += ["", f"One decoded token of the whole model, adapters on q,k,v,o: {counts}."]
    return "\n".join(lines) if mine else "Not measured."


def memory(rows: Sequence[Row]) -> str:
    """Return the peak of each training process beside the formula."""
    mine = [row for row in rows if row.question == "memory"]
    lines = ["| case | peak, MiB | formula, MiB | peak / formula |", "|---|---|---|---|"]
    for row in mine:
        lines.append(
            f"| {row.case} | {row.ours or 0:.0f} | {row.baseline or 0:.0f} | {row.value:.2f} |"
        )
    return "\n".join(lines) if mine else "Not measured."


def cards(folder: Path) -> str:
    """Return what `make gpu` kept of every card, or that it kept nothing."""
    files = sorted(folder.glob("gpu-*.json"))
    parts = [_card(json.loads(file.read_text(encoding="utf-8"))) for file in files]
    return "\n\n".join(parts) if parts else "Nothing here was measured on a GPU."


def _card(kept: dict[str, Any]) -> str:
    """Return one card's checks in a sentence and its figures in a table."""
    checks = kept.get("checks", {}) | kept.get("ranks", {})
    failed = sum(bool(wrong) for wrong in checks.values())
    made = kept["made"]
    rows = [Row(**cells) for cells in kept.get("bench", [])]
    kernels = {
        (row.case, row.mode, row.measure.replace("kernels of a ", "")): row.value
        for row in rows if "kernels of a " in row.measure
    }  # fmt: skip
    lines = [
        f"{len(kept['cards'])} x {kept['cards'][0]}, torch {made['torch']}, CUDA {made['cuda']}, "
        f"commit {made['commit']}: {len(checks)} checks, {failed} failed.",
        "",
        "| case | layer | figure | times LoRA's | 10-90 % | ours | LoRA's | kernels, times |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "kernels of a " in row.measure:
            continue
        spread = f"{row.low_10:.2f} .. {row.high_90:.2f}"
        sides = " | ".join("" if s is None else f"{s:.4g}" for s in (row.ours, row.baseline))
        launched = kernels.get((row.case, row.mode, row.measure))
        lines.append(
            f"| {row.case} | {row.mode} | {row.measure} | {row.value:.2f} | {spread} | {sides} | "
            f"{'' if launched is None else f'{launched:.2f}'} |"
        )
    return "\n".join(lines)
