"""Compare fresh results with the committed ones: ratios, not seconds.

    python benchmarks/check.py --new FOLDER [--old benchmarks/results] [--allow 0.10]

A ratio is worse if its median left the committed 10-90 % range on the bad side and moved by more
than --allow. Memory and other exact figures are worse if they moved by more than --allow. If
anything is worse, the exit status is 1. If the baseline's own seconds moved by more than 30 %, the
machine is another one or not quiet: a line says so, and the exit status does not change.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from common import RESULTS, Row, read

BASELINE_MOVED = 0.30
# more is better; everywhere else less is
HIGHER = ("tokens per second", "their ", "share of the GEMM ceiling")


def worse(old: Row, new: Row, allow: float) -> bool:
    """Say whether a ratio left the committed range on the bad side by more than `allow`."""
    if math.isnan(new.value):
        return not math.isnan(old.value)
    if new.measure.startswith(HIGHER):
        return new.value < min(old.low_10, old.value * (1 - allow))
    return new.value > max(old.high_90, old.value * (1 + allow))


def moved(old: Row, new: Row) -> float:
    """Return by which share the baseline's own figure moved; 0 where there is none."""
    if not old.baseline or not new.baseline:
        return 0.0
    return abs(new.baseline / old.baseline - 1)


def compare(
    old: dict[tuple[str, ...], Row], new: dict[tuple[str, ...], Row], allow: float
) -> tuple[list[str], list[str]]:
    """Return (what is worse, what else should be known), one line each."""
    failures, notes = [], []
    for key in old.keys() & new.keys():
        before, after = old[key], new[key]
        name = ", ".join(part for part in key if part)
        if before.unit != "s" and worse(before, after, allow):
            failures.append(
                f"worse: {name}: {after.value:.3f} {after.unit}, committed {before.value:.3f} "
                f"[{before.low_10:.3f} .. {before.high_90:.3f}]"
            )
        change = moved(before, after)
        if change > BASELINE_MOVED:
            notes.append(
                f"baseline moved by {change:.0%}: {name}: {after.baseline:.4g}, "
                f"committed {before.baseline:.4g}"
            )
    missing = sorted(old.keys() - new.keys())
    if missing:
        notes.append(f"not measured this time: {len(missing)} of {len(old)} committed figures")
    added = len(new.keys() - old.keys())
    if added:
        notes.append(f"not among the committed: {added} figures")
    return sorted(failures), sorted(notes)


def main() -> int:
    """Print the comparison; 1 where something is worse, 2 where there is nothing to compare."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--new", type=Path, required=True, help="folder of the fresh CSV files")
    options.add_argument("--old", type=Path, default=RESULTS, help="folder of the committed ones")
    options.add_argument("--allow", type=float, default=0.10, help="share a ratio may move by")
    given = options.parse_args()
    old, new = ({key: row for key, (row, _) in read(f).items()} for f in (given.old, given.new))
    for folder, rows in ((given.old, old), (given.new, new)):
        if not rows:
            print(f"no results in {folder}: run make bench first")
            return 2
    if not old.keys() & new.keys():
        print(f"no figure of {given.new} is among those of {given.old}")
        return 2
    failures, notes = compare(old, new, given.allow)
    print("\n".join([*notes, *failures]))
    print(f"{len(old.keys() & new.keys())} figures compared, {len(failures)} worse")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
