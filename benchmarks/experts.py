"""What do more experts cost? One layer with base, E = 4 to 1024 at R = 4, K = 2.

    python benchmarks/experts.py [--quick] [--csv FILE]

Every number of experts is measured in the same rounds; the ratio is to E = 4.
"""

from __future__ import annotations

from common import Row, alternate, finish, parser, ratio, run, saved_mib, show, start
from layer import Case

COUNTS = (4, 16, 64, 256, 1024)
MODES = ("none", "tangent")


def main() -> int:
    """Measure every number of experts in both modes."""
    given = parser(__doc__).parse_args()
    start(given)
    widths = (64, 32, 48) if given.quick else (1024, 1024, 1024)
    rows = []
    for mode in MODES:
        cases = {count: Case(widths, (count, 4, 2), "float32") for count in COUNTS}
        models = {count: case.ours(mode) for count, case in cases.items()}
        steps = {str(count): cases[count].step(models[count]) for count in COUNTS}
        times = alternate(steps, given.rounds)
        for count in COUNTS:
            case, model = cases[count], models[count]
            found = ratio(times, str(count), "4")
            row = ("experts", str(case), mode)
            rows.append(show(Row(*row, "step with base", "E=4", **found)))
            mib = saved_mib(lambda c=case, m=model: m(c.x), exclude=(model, case.x))
            rows.append(show(Row(*row, "saved for backward", "", mib, mib, mib, "MiB")))
    return finish(rows, given)


if __name__ == "__main__":
    run(main)
