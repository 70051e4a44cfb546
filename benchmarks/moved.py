"""What moved since the committed results, beyond the spread of both? One screen.

    python benchmarks/moved.py [--new benchmarks/results] [--old FOLDER] [--all]

A figure moved if each median lies outside the other's 10-90 % range and they are more than 1 %
apart. `make bench` ends with this; without --old, the committed results are those of git's last
commit. Figures of another machine, or of another number of threads, are counted under its name and
not compared. Seconds without a spread are the profiler's, and are not compared either.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from check import HIGHER
from common import RESULTS, Row, read

LEAST = 0.01  # two figures nearer than this are the same
Results = dict[tuple[str, ...], tuple[Row, dict[str, str]]]
SCREEN = {"worse": 4, "better": 3, "new": 2, "gone": 2}  # lines of each on one screen


@dataclass
class Moves:
    """What became of every committed figure, and of every new one.

    Attributes:
        worse, better: (committed, fresh), the largest change first.
        new, gone: figures that only one side has.
        within: how many are as they were.
        again: how many were not measured again, or cannot be compared because they have no spread.
        elsewhere: machine of the committed figure -> how many were measured on another one now.
    """

    worse: list[tuple[Row, Row]] = field(default_factory=list)
    better: list[tuple[Row, Row]] = field(default_factory=list)
    new: list[Row] = field(default_factory=list)
    gone: list[Row] = field(default_factory=list)
    within: int = 0
    again: int = 0
    elsewhere: Counter[str] = field(default_factory=Counter)


def machine(made: dict[str, str]) -> str:
    """Name what decides whether times can be compared."""
    return f"{made.get('machine', 'unknown')}, threads {made.get('threads', '?')}"


def change(old: Row, new: Row) -> float:
    """Return how many times larger the new figure is; not a number and zero have no ratio."""
    if old.value == new.value or (math.isnan(old.value) and math.isnan(new.value)):
        return 1.0
    return new.value / old.value if old.value > 0 and new.value > 0 else math.inf


def outside(value: float, row: Row) -> bool:
    """Say whether a figure lies outside the range of another; a figure that is no number does."""
    return not row.low_10 <= value <= row.high_90


def moved(old: Row, new: Row) -> bool:
    """Say whether two figures differ by more than the spread of both."""
    apart = change(old, new)
    if not 1 / (1 + LEAST) <= apart <= 1 + LEAST:
        return outside(new.value, old) and outside(old.value, new)
    return False


def is_worse(old: Row, new: Row) -> bool:
    """Say which way a figure moved; one that is no number any more is worse."""
    if math.isnan(new.value) or math.isnan(old.value):
        return math.isnan(new.value)
    return (new.value < old.value) == new.measure.startswith(HIGHER)


def compare(old: Results, new: Results) -> Moves:
    """Sort every figure into what became of it."""
    moves = Moves(
        new=[row for key, (row, _) in new.items() if key not in old],
        gone=[row for key, (row, _) in old.items() if key not in new],
    )
    for key in old.keys() & new.keys():
        (before, made), (after, made_now) = old[key], new[key]
        if (before, made) == (after, made_now):
            moves.again += 1
        elif machine(made) != machine(made_now):
            moves.elsewhere[machine(made)] += 1
        elif before.unit == "s" and before.low_10 == before.high_90:
            moves.again += 1
        elif not moved(before, after):
            moves.within += 1
        else:
            (moves.worse if is_worse(before, after) else moves.better).append((before, after))
    for pairs in (moves.worse, moves.better):
        pairs.sort(key=lambda pair: (-abs(math.log(change(*pair))), pair[0].key))
    return moves


def name(row: Row) -> str:
    """Name a figure."""
    against = f" / {row.against}" if row.against else ""
    return ", ".join(part for part in (row.question, row.mode + against, row.case) if part)


def lines(moves: Moves, everything: bool = False) -> list[str]:
    """Return the screen: counts first, then the figures that moved most."""
    counts = {kind: len(getattr(moves, kind)) for kind in SCREEN}
    said = ["Since the committed results: " + ", ".join(f"{n} {k}" for k, n in counts.items())
            + f", {moves.within} within the spread, {moves.again} not compared."]  # fmt: skip
    for other, count in moves.elsewhere.most_common():
        said.append(f"Not compared: {count} figures that were committed on {other}.")
    for kind, most in SCREEN.items():
        entries = getattr(moves, kind)
        for entry in entries if everything else entries[:most]:
            before, after = entry if isinstance(entry, tuple) else (None, entry)
            was = ""
            if before is not None:
                span = f"[{before.low_10:.3g} .. {before.high_90:.3g}]"
                was = f"{before.value:.3g} {span} -> "
            said.append(f"{kind:<6} {was}{after.value:.3g} {after.unit}  {after.measure}")
            said.append(f"       {name(after)}")
        if len(entries) > most and not everything:
            said.append(f"       and {len(entries) - most} more {kind}: see --all")
    return said


def committed(into: Path) -> Path | None:
    """Write the results of git's last commit into a folder; None where there is no such commit."""
    git = ["git", "-C", str(RESULTS)]
    try:
        listed = subprocess.run(
            [*git, "ls-tree", "--name-only", "HEAD", "./"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    for file in listed.stdout.split():
        if file.endswith(".csv"):
            text = subprocess.run([*git, "show", f"HEAD:./{file}"], capture_output=True, check=True)
            (into / file).write_bytes(text.stdout)
    return into


def main() -> int:
    """Print what moved; the status is 0, because bench-check is the one that judges."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--new", type=Path, default=RESULTS, help="folder of the fresh CSV files")
    options.add_argument("--old", type=Path, help="folder of the committed ones")
    options.add_argument("--all", action="store_true", help="every figure, not one screen")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        old = committed(Path(folder)) if given.old is None else given.old
        if old is None or not read(old):
            print("No committed results are at hand: nothing is compared.")
            return 0
        said = lines(compare(read(old), read(given.new)), given.all)
    print("\n".join(said))
    return 0


if __name__ == "__main__":
    sys.exit(main())
