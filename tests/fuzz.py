"""Fuzz every target for a while: `python tests/fuzz.py [seconds] [target...]`, as `make fuzz` does.

Every round draws new random examples; a failure is shrunk, printed and ends with exit code 1.
"""

from __future__ import annotations

import sys
import time
import traceback

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz_targets import TARGETS, Place, new_place


def fuzz(place: Place, target: str, seconds: float) -> int:
    """Run one target until the time is up; return the number of examples."""
    cases, check = TARGETS[target](place)
    end, done = time.monotonic() + seconds, 0

    @settings(
        max_examples=50, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.data())
    def explore(data: st.DataObject) -> None:
        nonlocal done
        check(data.draw(cases))
        done += 1

    while time.monotonic() < end:
        explore()
    return done


def main(words: list[str]) -> int:
    """Fuzz the targets named, or all."""
    seconds = float(words[0]) if words else 60.0
    failed = 0
    with new_place() as place:
        for target in words[1:] or TARGETS:
            try:
                print(f"{target}: {fuzz(place, target, seconds)} examples, none broke anything")
            except AssertionError:
                failed += 1
                traceback.print_exc()
                print(f"{target}: FAILED", flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
