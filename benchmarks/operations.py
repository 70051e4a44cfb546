"""Where does the time go? Seconds of each kind of operation in one step, ours beside LoRA's.

    python benchmarks/operations.py [--quick] [--csv FILE]

torch's profiler measures, which slows every operation down: it shows which operations take the
time, not how much time they take. Cases: the adapter path of a layer around a free base, forward
and backward, with many and with few tokens; a compiled layer with its base; one decoded token of
SmolLM2-135M's architecture; and many experts, of which only the selected ones are computed, next to
four experts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from common import SHAPES, Row, finish, lora_name, parser, run, show, start
from decode import decoder
from layer import BALANCE, WIDTHS, Case
from step import TARGETS, pair, smollm2
from torch.profiler import ProfilerActivity, profile

TOP = 8  # operations of a case, the rest is summed up
OTHER = "all other"


def times(step: Callable[[], Any], rounds: int) -> dict[str, tuple[float, float]]:
    """Return (seconds, calls) in one step by kind of operation, largest first."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(rounds):
            step()
    events = sorted(found.key_averages(), key=lambda event: -event.self_cpu_time_total)
    return {e.key: (e.self_cpu_time_total / 1e6 / rounds, e.count / rounds) for e in events}


def compare(
    case: str, mode: str, against: str, ours: dict[str, tuple], theirs: dict[str, tuple]
) -> list[Row]:
    """Return a row for each of our dearest operations, and one for the rest of both sides."""
    names = list(ours)[:TOP]
    seconds = {name: (ours[name][0], theirs.get(name, (0.0, 0))[0]) for name in names}
    rest = [sum(s for n, (s, _) in side.items() if n not in names) for side in (ours, theirs)]
    seconds[OTHER] = (rest[0], rest[1])
    rows = []
    for name, (mine, other) in seconds.items():
        calls = ours[name][1] if name in ours else 0
        what = f"{name} ({calls:.0f} calls)" if calls else name
        figures = {"unit": "s", "ours": mine, "baseline": other}
        rows.append(show(Row("operations", case, mode, what, against, mine, mine, mine, **figures)))
    return rows


def layers(given: argparse.Namespace) -> list[Row]:
    """Profile the adapter path at many and at few tokens, and what is furthest from its limit."""
    rows = []
    wide, narrow = ((64, 32, 48),) * 2 if given.quick else WIDTHS
    balance = {"router_aux_loss_coef": BALANCE}
    for name, mode, widths, shape, more in (
        ("tangent", "tangent", wide, SHAPES[0], {}),
        ("tangent", "tangent", narrow, SHAPES[0], {}),
        ("plane", "plane", wide, SHAPES[1], {}),
        ("tangent, balance loss on", "tangent", wide, SHAPES[2], balance),
    ):
        case = Case(widths, shape, "float32")
        ours = case.ours(mode, free=True, **more)
        lora = case.lora(ours, free=True)
        found = [times(case.step(model), given.rounds) for model in (ours, lora)]
        rows += compare(f"adapter path, {case}", name, lora_name(lora), *found)
    return rows


def compiled(given: argparse.Namespace) -> list[Row]:
    """Profile a compiled layer, its generated kernels by name."""
    from torch._inductor import config  # only here: the others do without the compiler

    case = Case((64, 32, 48) if given.quick else WIDTHS[0], SHAPES[0], "float32")
    ours = case.ours("tangent")
    lora = case.lora(ours)
    torch._dynamo.reset()
    with config.patch({"cpp.enable_kernel_profile": True}):
        steps = [case.step(torch.compile(m, fullgraph=True, dynamic=False)) for m in (ours, lora)]
        found = [times(step, given.rounds) for step in steps]
    return compare(f"compiled step with base, {case}", "tangent", lora_name(lora), *found)


def decoding(given: argparse.Namespace) -> list[Row]:
    """Profile one decoded token."""
    models = pair(smollm2(given.quick), "tangent", SHAPES[0], TARGETS["q,k,v,o"])
    found = []
    for model in models:
        tokens = decoder(model.eval(), 1)
        found.append(times(lambda t=tokens: next(t), given.rounds))
    return compare("one decoded token, batch 1", "tangent", lora_name(models[1]), *found)


def many(given: argparse.Namespace) -> list[Row]:
    """Profile a layer with 1024 experts beside one with 4."""
    widths = (64, 32, 48) if given.quick else WIDTHS[0]
    cases = [Case(widths, (count, 4, 2), "float32") for count in (1024, 4)]
    found = [times(case.step(case.ours("tangent")), min(given.rounds, 5)) for case in cases]
    return compare(f"with base, {cases[0]}", "tangent", "E=4", *found)


def main() -> int:
    """Profile every case."""
    given = parser(__doc__, rounds=10).parse_args()
    start(given)
    rows = [*layers(given), *compiled(given), *decoding(given), *many(given)]
    return finish(rows, given, keep=False)  # one case has other operations after a change


if __name__ == "__main__":
    run(main)
