"""What do more experts cost, and when is it faster to compute only the selected ones?

    python benchmarks/experts.py [--quick] [--csv FILE]

One layer with its base, R = 4, K = 2. The first table has E = 4 to 1024 as `dispatch: auto`
computes them; its ratios are relative to E = 4. The second has some E with K = 2 and 8, the grouped
way relative to the fused one. The rule in ops/mixture/grouped.py comes from the second table.
"""

from __future__ import annotations

import argparse

from common import Row, alternate, finish, parser, ratio, run, saved_mib, show, start
from layer import Case

COUNTS = (4, 16, 64, 256, 1024)
BOTH = ((16, 2), (24, 2), (32, 2), (96, 8))  # experts, chosen
MODES = ("none", "tangent")


def more_experts(widths: tuple[int, int, int], mode: str, given: argparse.Namespace) -> list[Row]:
    """Measure every number of experts in the same rounds."""
    cases = {count: Case(widths, (count, 4, 2), "float32") for count in COUNTS}
    models = {count: case.ours(mode) for count, case in cases.items()}
    steps = {str(count): cases[count].step(models[count]) for count in COUNTS}
    times = alternate(steps, given.rounds)
    rows = []
    for count in COUNTS:
        case, model = cases[count], models[count]
        row = ("experts", str(case), mode)
        rows.append(Row(*row, "step with base", "E=4", **ratio(times, str(count), "4")))
        mib = saved_mib(lambda c=case, m=model: m(c.x), exclude=(model, case.x))
        rows.append(Row(*row, "saved for backward", "", mib, mib, mib, "MiB"))
    return [show(row) for row in rows]


def both_ways(widths: tuple[int, int, int], mode: str, given: argparse.Namespace) -> list[Row]:
    """Measure grouped against fused."""
    rows = []
    for count, top_k in BOTH[:1] if given.quick else BOTH:
        case = Case(widths, (count, 4, top_k), "float32")
        steps = {way: case.step(case.ours(mode, dispatch=way)) for way in ("grouped", "fused")}
        times = alternate(steps, given.rounds)
        found = ratio(times, "grouped", "fused")
        rows.append(
            show(Row("experts", str(case), mode, "grouped, step with base", "fused", **found))
        )
    return rows


def main() -> int:
    """Measure the first question, and with --full the second, in both modes."""
    given = parser(__doc__).parse_args()
    start(given)
    widths = (64, 32, 48) if given.quick else (1024, 1024, 1024)
    rows = []
    for mode in MODES:
        rows += more_experts(widths, mode, given)
        if given.full or given.quick:
            rows += both_ways(widths, mode, given)
    return finish(rows, given)


if __name__ == "__main__":
    run(main)
