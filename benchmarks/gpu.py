"""What a layer costs on a GPU: time by CUDA events, kernels launched, and peak memory.

    python benchmarks/gpu.py [--device cuda] [--quick] [--json FILE]

The same comparisons as layer.py, launches.py and step.py, ours beside PEFT LoRA with as many
parameters: forward and backward of a layer with its base at many tokens and at 8, in bfloat16,
eager and compiled; the kernels that one such step launches; and the memory that a training step of
SmolLM2-135M's architecture allocates at its peak, with and without gradient checkpointing. With
--device cpu everything runs with a wall clock and torch's profiler of the CPU, which shows that it
runs and nothing else. `make gpu` (tests/gpu/lane.py) runs this and keeps the result.
"""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import SHAPES, Row, Times, alternate, lora_name, parser, ratio, run, show, start
from launches import counted, kernels
from layer import BALANCE, MODES, Case
from step import TARGETS, pair, peak_mib, smollm2, stepper
from torch import nn

WIDTHS = {False: ((8192, 4096, 4096), (8, 4096, 4096)), True: ((64, 32, 48), (8, 32, 48))}
KINDS = ("bfloat16 with float32 adapters", "bfloat16 with bfloat16 adapters")
LAUNCHED = "kernels of a step with base"
BATCH = {False: (8, 1024), True: (1, 16)}  # rows, tokens of a training step


def timed(steps: dict[str, Callable[[], Any]], rounds: int, device: str) -> Times:
    """Run every step once a round, in turns, and return its seconds between two CUDA events."""
    if device == "cpu":
        return alternate(steps, rounds)
    for name in list(steps) * 3:
        steps[name]()
    marks = []
    for index in range(rounds):
        for name in list(steps)[:: 1 if index % 2 == 0 else -1]:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            steps[name]()
            after.record()
            marks.append((name, before, after))
    torch.cuda.synchronize()
    times: Times = {name: [] for name in steps}
    for name, before, after in marks:
        times[name].append(before.elapsed_time(after) / 1e3)
    return times


def layers(given: Any) -> list[Row]:
    """Time a layer with its base, and count its kernels, eager."""
    rows = []
    for widths in WIDTHS[given.quick]:
        for shape in SHAPES[:1] if given.quick else SHAPES[::2]:
            for kind in KINDS:
                case = Case(widths, shape, kind, device=given.device)
                for mode in MODES[:2] if given.quick else MODES:
                    for more in ({}, {"router_aux_loss_coef": BALANCE}):
                        rows += beside_lora(case, mode, given, **more)
    return rows


def beside_lora(case: Case, mode: str, given: Any, **more: Any) -> list[Row]:
    """Return seconds and kernels of one step, ours beside LoRA's."""
    ours = case.ours(mode, **more)
    lora = case.lora(ours)
    name = mode + (", balance loss on" if "router_aux_loss_coef" in more else "")
    name += ", kernels compiled" if "kernels" in more else ""
    steps = {"ours": case.step(ours), "lora": case.step(lora)}
    row = ("gpu", str(case), name, "step with base", lora_name(lora))
    times = timed(steps, given.rounds, given.device)
    counts = [kernels(step) for step in steps.values()]
    return [
        show(Row(*row, **ratio(times, "ours", "lora"))),
        counted(str(case), name, LAUNCHED, lora_name(lora), *counts, question="gpu"),
    ]


def compiled(given: Any) -> list[Row]:
    """The same for compiled layers and for `kernels: compiled`.

    On the CPU each kernel gets a name, to be counted by.
    """
    from torch._inductor import config

    with config.patch({"cpp.enable_kernel_profile": True}):
        rows = []
        for widths in WIDTHS[given.quick]:
            case = Case(widths, SHAPES[0], KINDS[0], device=given.device)
            for mode in MODES[1:2] if given.quick else MODES:
                rows += compiled_beside_lora(case, mode, given)
                rows += beside_lora(case, mode, given, kernels="compiled")
        return rows


def compiled_beside_lora(case: Case, mode: str, given: Any) -> list[Row]:
    torch._dynamo.reset()
    ours = case.ours(mode)
    lora = case.lora(ours)
    steps = {
        name: case.step(torch.compile(model, fullgraph=True, dynamic=False))
        for name, model in (("ours", ours), ("lora", lora))
    }
    times = timed(steps, given.rounds, given.device)
    row = ("gpu", str(case), mode, "compiled step with base", lora_name(lora))
    counts = [kernels(step) for step in steps.values()]
    return [
        show(Row(*row, **ratio(times, "ours", "lora"))),
        counted(str(case), mode, f"compiled {LAUNCHED}", lora_name(lora), *counts, question="gpu"),
    ]


def peak(model: nn.Module, given: Any) -> float:
    """Return the MiB that a training step allocates at its peak, model included."""
    step = stepper(model, BATCH[given.quick])
    step()
    if given.device == "cpu":
        return peak_mib()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20


def memory(given: Any) -> list[Row]:
    """Compare the peak of a training step, each model alone on the device."""
    rows = []
    base = smollm2(given.quick).to(torch.bfloat16)
    tokens = " x ".join(map(str, BATCH[given.quick]))
    for mode in ("tangent",) if given.quick else ("none", "tangent"):
        for checkpointing in (False, True):
            models = pair(base, mode, SHAPES[0], TARGETS["q,k,v,o"])
            peaks = []
            for model in models:
                there = copy.deepcopy(model).to(given.device)
                if checkpointing:
                    there.enable_input_require_grads()
                    there.gradient_checkpointing_enable()
                peaks.append(peak(there, given))
                del there
            case = f"q,k,v,o {tokens} bfloat16" + (", checkpointing" if checkpointing else "")
            row = partial(Row, "gpu", case, mode, "peak memory of a step", lora_name(models[1]))
            value = peaks[0] / peaks[1]
            sides = {"ours": peaks[0], "baseline": peaks[1]}
            rows.append(show(row(value, value, value, **sides)))
    return rows


def main() -> int:
    """Measure everything; write the rows as JSON."""
    options = parser(__doc__, rounds=50)
    options.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options.add_argument("--json", type=Path, help="write the rows here")
    given = options.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing was measured on one")
        return 0
    start(given)
    rows: list[Row] = []
    for part in (layers, memory, compiled):  # the longest last: what is there is kept
        rows += part(given)
        if given.json is not None:
            given.json.write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    run(main)
