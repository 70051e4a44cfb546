"""What does recording cost? Time and memory of a forward pass with `rotmole.record_routing`.

    python benchmarks/recording.py [--quick] [--full] [--csv FILE]

20,000 tokens through SmolLM2-135M's architecture with a mixture on it, 2,000 a batch: with all
statistics, with those of the routing alone, and without. Each batch is timed in all three ways, one
after the other, in seconds of the processor, which other programs disturb less. The memory is how
much higher the peak of the process is than before, when the same tokens went through without
recording.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from common import SHAPES, Row, adapter_config, alternate, finish, parser, ratio, run, show, start
from step import TARGETS, peak_mib, smollm2

BATCH = (4, 500)
BATCHES = 10
CASES = (("tangent", "q,k,v,o"), ("plane", "q,k,v,o"), ("tangent", "all-linear"))
MORE_CASES = (("givens", "q,k,v,o"), ("bivector", "q,k,v,o"), ("cayley", "q,k,v,o"))


def steps_of(model: Any, ids: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Return a forward pass of a batch in three ways."""
    from rotmole import record_routing

    def plain() -> None:
        with torch.inference_mode():
            model(input_ids=ids)

    def routing() -> None:
        with record_routing(model, rotation=False):
            plain()

    def everything() -> None:
        with record_routing(model):
            plain()

    return {"plain": plain, "routing": routing, "all statistics": everything}


def measure(mode: str, targets: str, given: Any) -> list[Row]:
    """Return the ratios of times, and what the memory grew by."""
    from peft import get_peft_model

    config = adapter_config(mode, SHAPES[0], TARGETS[targets])
    model = get_peft_model(smollm2(given.quick), config).eval()
    ids = torch.randint(3, model.get_base_model().config.vocab_size, BATCH)
    steps = steps_of(model, ids)
    for _ in range(3):
        steps["plain"]()
    before = peak_mib()
    for _ in range(2):
        steps["all statistics"]()
    more = peak_mib() - before
    times = alternate(steps, given.rounds, warm_up=0, clock=time.process_time)
    case = f"E=4 R=6 K=2 on {targets}, {given.rounds} x {BATCH[0]} x {BATCH[1]} tokens"
    rows = [
        show(Row("recording", case, mode, f"forward pass with {way}", "without recording",
                 **ratio(times, way, "plain")))
        for way in ("routing", "all statistics")
    ]  # fmt: skip
    memory = Row(
        "recording", case, mode, "memory beyond a forward pass", "", more, more, more, "MiB"
    )
    return [*rows, show(memory)]


def main() -> int:
    """Measure the usual modes, with --full more of them."""
    given = parser(__doc__, rounds=BATCHES).parse_args()
    start(given)
    cases = CASES[:1] if given.quick else CASES + (MORE_CASES if given.full else ())
    rows = [row for mode, targets in cases for row in measure(mode, targets, given)]
    return finish(rows, given)


if __name__ == "__main__":
    run(main)
