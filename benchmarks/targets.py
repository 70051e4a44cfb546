"""The tables of docs/performance.md: costs on paper, and targets beside what was measured.

    python benchmarks/targets.py [--results FOLDER] [--document FILE]

A target covers many rows of the CSV files, and its line shows the worst row. A target without a row
is "not measured". Each table replaces the text between its two marker comments.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cost
import tables
from common import RESULTS, SHAPES, Row, read

DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"


@dataclass(frozen=True)
class Target:
    """One line of the table.

    Attributes:
        what: in words.
        limit: at most this, or at least if `higher`.
        question, measure, mode, case, against: regular expressions that a row's fields must match
            from their beginning to their end.
    """

    what: str
    limit: float
    question: str
    measure: str
    mode: str = ".*"
    case: str = ".*"
    against: str = ".*"
    higher: bool = False

    def matches(self, row: Row) -> bool:
        """Say whether the row belongs to this target."""
        names = ("question", "measure", "mode", "case", "against")
        return all(re.fullmatch(getattr(self, name), getattr(row, name)) for name in names)

    def worst(self, rows: Sequence[Row]) -> Row | None:
        """Return the row that is worst for this target; a figure that is not a number is."""
        mine = [row for row in rows if self.matches(row)]
        sign = -1 if self.higher else 1
        bad = math.inf
        return max(mine, key=lambda r: bad if math.isnan(r.value) else sign * r.value, default=None)

    def met(self, row: Row) -> bool:
        """Say whether a row keeps the target."""
        return row.value >= self.limit if self.higher else row.value <= self.limit


FOUR = "(none|tangent|plane|givens)"
ON = f"{FOUR}(, balance loss on|, shared expert)?"
OFF, BALANCED = f"{FOUR}(, shared expert)?", f"{FOUR}, balance loss on"
KERNELS = ", kernels compiled"
HALF = ".*bfloat16.*"
SMALL, MIDDLE, LARGE = (f".* E={E} R={R} K={K}" for E, R, K in SHAPES)
OTHERS = "(AdaMoLE|GOAT|HydraLoRA|Riemannian MoE-LoRA)"
PATH = "their adapter path, base subtracted"


def _layer() -> list[Target]:
    step, path = "step with base", "adapter path, base subtracted"
    free, kept = "adapter path, free base", "saved for backward"
    found = [
        Target("layer with base, float32", 1.05, "layer", step, ON, ".* float32"),
        Target("layer with base, bfloat16", 1.10, "layer", step, ON, HALF),
        Target("adapter path (base subtracted), float32", 1.15, "layer", path, ON, ".* float32"),
        Target("adapter path (base subtracted), bfloat16", 1.25, "layer", path, ON, HALF),
        Target("adapter path (free base), float32", 1.15, "layer", free, OFF, ".* float32"),
        Target("adapter path (free base), bfloat16", 1.20, "layer", free, OFF, HALF),
        Target("adapter path (free base), balance loss on", 1.20, "layer", free, BALANCED),
        *(
            Target(f"{what}, kernels compiled", limit, "layer", measure, mode + KERNELS, case)
            for what, limit, measure, mode, case in (
                ("layer with base, float32", 1.05, step, ON, ".* float32"),
                ("layer with base, bfloat16", 1.10, step, ON, HALF),
                ("adapter path (free base), float32", 1.15, free, OFF, ".* float32"),
                ("adapter path (free base), bfloat16", 1.20, free, OFF, HALF),
                ("adapter path (free base), balance loss on", 1.20, free, BALANCED, ".*"),
            )
        ),
        Target("compiled against compiled LoRA", 1.05, "layer", "compiled " + step),
        Target("PEFT LoRA beside plain torch LoRA", 1.10, "layer", "PEFT LoRA, with base"),
    ]
    for limit, (E, R, K) in zip((0.2, 0.6, 0.9), SHAPES, strict=True):
        case = f"T=1024 .* E={E} R={R} K={K} float32"
        what = f"MiB kept for backward, E, R, K = {E}, {R}, {K}"
        found.append(Target(what, limit, "layer", kept, FOUR, case))
    return found


def _peers() -> list[Target]:
    none, tangent = "ours none", "ours tangent"
    rows = [
        ("memory kept by others", 20, "their saved for backward", ".*", ".*", ".*"),
        ("others at E=20, none", 4, PATH, OTHERS, LARGE, none),
        ("others at E=20, tangent", 3, PATH, OTHERS, LARGE, tangent),
        ("PEFT Arrow at E=20, none", 6, PATH, "PEFT Arrow", LARGE, none),
        ("PEFT Arrow at E=20, tangent", 4, PATH, "PEFT Arrow", LARGE, tangent),
        ("all at E=4, none", 2, PATH, ".*", SMALL, none),
        ("all at E=8, none", 1.5, PATH, ".*", MIDDLE, none),
        ("all, tangent", 1, PATH, ".*", ".*", tangent),
    ]
    return [
        Target(f"times ours: {what}", limit, "peers", measure, mode, case, against, higher=True)
        for what, limit, measure, mode, case, against in rows
    ]


def _launches() -> list[Target]:
    modes = {"none": (3, 2), "tangent": (4, 3), "(plane|givens)": (5, 4)}
    targets = []
    for mode, (both, token) in modes.items():
        name = mode.strip("()").replace("|", ", ")
        on = f"{mode}(, balance loss on)?"
        rows = {
            "operations, forward and backward": (both, on),
            "operations, one token": (token, mode),
        }
        for measure, (limit, which) in rows.items():
            targets.append(Target(f"{measure}, T <= 8, {name}", limit, "launches", measure, which))
    for mode, limits in modes.items():
        name = mode.strip("()").replace("|", ", ")
        which = f"{mode}(, balance loss on)?{KERNELS}"
        for what, limit in zip(("forward and backward", "one token"), limits, strict=True):
            measure = f"operations and kernels, {what}"
            targets.append(Target(f"{measure}, T <= 8, {name}", limit, "launches", measure, which))
    measure = "compiled kernels, forward and backward"
    return [*targets, Target(f"{measure}, T = 8", 2, "launches", measure, ON)]


def _rest() -> list[Target]:
    far = ".*E=1024 R=4 K=2.*"
    return [
        Target("whole training step", 1.08, "step", "training step", FOUR),
        Target("whole training step, kernels compiled", 1.08, "step", "training step",
               FOUR + KERNELS),
        Target("peak memory of training", 1.12, "step", "peak memory of a process"),
        Target("decoding, tokens per second", 0.90, "decode", "tokens per second", FOUR,
               higher=True),
        Target("decoding, tokens per second, kernels compiled", 0.90, "decode",
               "tokens per second", FOUR + KERNELS, higher=True),
        Target("compiled decoding beside compiled LoRA's", 1.0, "decode",
               "compiled tokens per second", higher=True),
        Target("peak of training beside `check`'s formula", 1.15, "memory", "peak of training"),
        Target("peak of training beside `check`'s formula", 0.85, "memory", "peak of training",
               higher=True),
        Target("1024 experts beside 4", 5, "experts", "step with base", case=far),
        Target("`rotmole --help`, seconds", 0.5, "startup", "rotmole --help"),
        Target("`import rotmole` beyond `import peft`, seconds", 0.3, "startup",
               "import rotmole after import peft"),
        Target("adapter of SmolLM2 beyond its base, seconds", 1, "startup",
               "load the adapter beyond the base"),
    ]  # fmt: skip


TARGETS = [*_layer(), *_launches(), *_peers(), *_rest()]


def line(target: Target, rows: Sequence[Row]) -> str:
    """Return one line of the table."""
    limit = f"{'at least' if target.higher else 'at most'} {target.limit:g}"
    row = target.worst(rows)
    if row is None:
        return f"| {target.what} | {limit} | not measured | | |"
    count = sum(target.matches(each) for each in rows)
    where = ", ".join(part for part in (row.mode, row.against, row.case) if part)
    spread = f"{row.low_10:.2f} .. {row.high_90:.2f}"
    verdict = "" if target.met(row) else " (missed)"
    return f"| {target.what} | {limit} | {row.value:.2f}{verdict} | {spread} | {where} ({count}) |"


def table(rows: Sequence[Row], made: dict[str, str]) -> str:
    """Return the whole table, and what it was made with."""
    head = ["| target | limit | measured, worst case | 10-90 % | worst case (of how many) |",
            "|---|---|---|---|---|"]  # fmt: skip
    lines = [*head, *(line(target, rows) for target in TARGETS)]
    if made:
        lines += ["", "Made with " + ", ".join(f"{k} {v}" for k, v in made.items() if k) + "."]
    return "\n".join(lines)


def between(text: str, name: str, body: str) -> str:
    """Put a table between the comments that name it and its end."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, opened, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not opened or not closed:
        sys.exit(f"the document has no {start} ... {end}")
    return f"{before}{start}\n{body}\n{end}{after}"


def main() -> int:
    """Write the tables into the document."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--results", type=Path, default=RESULTS)
    options.add_argument("--document", type=Path, default=DOCUMENT)
    given = options.parse_args()
    found = list(read(given.results).values())
    made: dict[str, str] = {}
    for name in found[-1][1] if found else ():
        made[name] = " and ".join(dict.fromkeys(about[name] for _, about in found))
    rows = [row for row, _ in found]
    bodies = {
        "cpu": cost.cpu_table(),
        "gpu": cost.gpu_table(),
        "measured on a gpu": tables.cards(given.results),
        "targets": table(rows, made),
        "operations": tables.operations(rows),
        "launches": tables.launches(rows),
        "memory": tables.memory(rows),
    }
    text = given.document.read_text(encoding="utf-8")
    for name, body in bodies.items():
        text = between(text, name, body)
    given.document.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
