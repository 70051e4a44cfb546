"""What does `rotmole inspect` cost beside a plain forward pass of the same tokens?

    python benchmarks/inspection.py [--quick] [--csv FILE]

The architecture of SmolLM2-135M with a mixture (tangent, E=4, R=8, K=2) on q, k, v, o. Half of the
tokens are those that a static LoRA is fitted on, the others are looked at. Each part of an
inspection is timed against a plain forward pass of the tokens that it reads, both without logits,
in seconds of processor time, so that other work on the machine matters little. Memory is how far
the peak of the process rises while a whole inspection runs, after a plain pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from common import (
    Row,
    Times,
    adapter_config,
    finish,
    model_type,
    parser,
    ratio,
    run,
    show,
    start,
)
from step import TARGETS, smollm2

LENGTH = 64
SHAPE = (4, 8, 2)


def rows(count: int, vocabulary: int) -> dict[str, list[dict[str, list[int]]]]:
    """Return rows of random tokens of two tasks."""
    ids = torch.randint(3, vocabulary, (count // LENGTH, LENGTH)).tolist()
    each = [{"input_ids": row} for row in ids]
    return {"a": each[::2], "b": each[1::2]}


def parts(model: Any, tokens: int) -> dict[str, Callable[[], Any]]:
    """Return a plain pass and the parts of an inspection, each of the same number of tokens."""
    from rotmole.inspection.probe import Probes, adapted_layers
    from rotmole.inspection.sample import batches
    from rotmole.recording import record_routing

    sample = rows(tokens, model.config.vocab_size)
    layers = adapted_layers(model, "default")

    def passes(block: Callable[[str], Any] | None) -> Callable[[], Any]:
        def step() -> None:
            probes = Probes(layers, tokens=tokens)
            for task, each in sample.items():
                if block is None:
                    probes.run(model, batches(each, model))
                else:
                    with block(task):
                        probes.run(model, batches(each, model))

        return step

    def probing(*, fits: bool, effects: bool) -> Callable[[], Any]:
        def step() -> None:
            probes = Probes(layers, tokens=tokens)
            for task, each in sample.items():
                with probes.listening(task, "fitted" if fits else None, effects=effects):
                    probes.run(model, batches(each, model))

        return step

    return {
        "plain": passes(None),
        "routing and angles": passes(lambda task: record_routing(model)),
        "sums for the static share": probing(fits=True, effects=False),
        "rotation off and routing uniform": probing(fits=False, effects=True),
    }


def timed(step: Callable[[], Any]) -> float:
    """Return the processor time of a step."""
    before = time.process_time()
    step()
    return time.process_time() - before


class Numbers:
    """A tokenizer as far as an inspection needs one."""

    def decode(self, ids: list[int]) -> str:
        return str(ids)


def peak_mib() -> float:
    """Return the largest memory that the process has had."""
    from rotmole.models.memory import peak_rss_bytes

    return peak_rss_bytes() / 2**20


def main() -> int:
    """Measure the memory of an inspection first, before anything else raises the peak."""
    options = parser(__doc__, rounds=3)
    options.add_argument("--tokens", type=int, default=4096, help="to look at, and to fit on")
    given = options.parse_args()
    start(given)
    from peft import get_peft_model

    from rotmole.inspection.inspect import inspect_adapter
    from rotmole.inspection.sample import Sample

    tokens = 256 if given.quick else given.tokens
    config = adapter_config("tangent", SHAPE, TARGETS["q,k,v,o"], task_type="CAUSAL_LM")
    model = get_peft_model(smollm2(quick=given.quick), config).eval()
    steps = parts(model, tokens)
    steps["plain"]()
    before = peak_mib()
    size = model.config.vocab_size
    sample = Sample(rows(tokens, size), rows(tokens, size), "rows")
    seconds = timed(lambda: inspect_adapter(model, Numbers(), sample))
    more = peak_mib() - before
    E, R, K = SHAPE
    case = f"q,k,v,o {tokens} + {tokens} tokens {model_type()} E={E} R={R} K={K}"
    row = ("inspection", case, "tangent")
    out = [
        show(Row(*row, "memory of an inspection", "", more, more, more, "MiB")),
        show(Row(*row, "time of an inspection", "", seconds, seconds,
                 seconds, "s")),
    ]  # fmt: skip
    times: Times = {name: [] for name in steps}
    for index in range(given.rounds):
        for name in list(steps)[:: 1 if index % 2 == 0 else -1]:
            times[name].append(timed(steps[name]))
    for name in list(steps)[1:]:
        out.append(show(Row(*row, name, "a plain pass", **ratio(times, name, "plain"))))
    return finish(out, given)


if __name__ == "__main__":
    run(main)
