"""What the timing scripts share: alternated measurements, ratios with their spread, and the CSV.

Machines are shared and drift, so two things are compared only within one round. A round runs each
of them once and gives one ratio; the order alternates from round to round. The result is the
median of the rounds' ratios and their 10-90 % range. Seconds are stored too, to show whether the
machine was the same.
"""

from __future__ import annotations

import argparse
import csv
import gc
import io
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
SHAPES = ((4, 6, 2), (8, 8, 2), (20, 4, 10))  # experts, rank, selected
Times = dict[str, list[float]]


@dataclass(frozen=True)
class Row:
    """One measured figure: a ratio ("x") or a quantity in `unit`.

    Attributes:
        question: the script.
        case: shapes and types, in words.
        mode: the rotation, or what else was measured.
        measure: what the figure is, such as "step with base".
        against: what a ratio is taken to; "" where the figure is no ratio.
        value: median.
        low_10, high_90: the range that holds 80 % of the rounds.
        unit: "x" or the unit of value.
        ours, baseline: median of both sides of the ratio, in seconds or MiB.
        rounds: how many there were.
    """

    question: str
    case: str
    mode: str
    measure: str
    against: str
    value: float
    low_10: float
    high_90: float
    unit: str = "x"
    ours: float | None = None
    baseline: float | None = None
    rounds: int = 1

    @property
    def key(self) -> tuple[str, ...]:
        """What the figure is about: the same in every run."""
        return self.question, self.case, self.mode, self.measure, self.against


def alternate(
    steps: dict[str, Callable[[], Any]],
    rounds: int,
    warm_up: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Run every step once a round, in turns forwards and backwards, and return its seconds."""
    times: Times = {name: [] for name in steps}
    for name in list(steps) * warm_up:
        steps[name]()
    for index in range(rounds):
        gc.collect()
        for name in list(steps)[:: 1 if index % 2 == 0 else -1]:
            started = clock()
            steps[name]()
            times[name].append(clock() - started)
    return times


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return median, 10th and 90th percentile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return statistics.median(values), tenths[0], tenths[-1]


def ratio(times: Times, ours: str, theirs: str, less: str | None = None) -> dict[str, Any]:
    """Compare two steps round by round; with `less`, a third is subtracted from both first.

    A difference of two times can be lost in noise. A round whose baseline is not positive says
    nothing and is left out, and `rounds` says how many are left.
    """
    off = times[less] if less else [0.0] * len(times[ours])
    pairs = [(a - c, b - c) for a, b, c in zip(times[ours], times[theirs], off, strict=True)]
    pairs = [(a, b) for a, b in pairs if b > 0]
    if not pairs:
        return {"value": float("nan"), "low_10": float("nan"), "high_90": float("nan"), "rounds": 0}
    value, low, high = spread([a / b for a, b in pairs])
    return {
        "value": value,
        "low_10": low,
        "high_90": high,
        "ours": statistics.median([a for a, _ in pairs]),
        "baseline": statistics.median([b for _, b in pairs]),
        "rounds": len(pairs),
    }


@cache
def multiplies_halves() -> bool:
    """Say whether this machine has products in bfloat16 worth the name.

    Without instructions for them torch falls back on loops that take tens of times as long as
    float32: a training step would take minutes, and compare nothing but those loops.
    """
    import torch

    left, right = torch.randn(64, 512), torch.randn(512, 512)
    halves = left.bfloat16(), right.bfloat16()
    times = alternate({"full": lambda: left @ right, "half": lambda: halves[0] @ halves[1]}, 5)
    return min(times["half"]) < 4 * min(times["full"])


def model_type() -> str:
    """Return the type of whole models: bfloat16, or float32 where that has no fast products."""
    return "bfloat16" if multiplies_halves() else "float32"


def saved_mib(step: Callable[[], Any], exclude: Sequence[Any] = ()) -> float:
    """Return MiB of tensors kept for the backward pass, excluding parameters and `exclude`.

    Args:
        step: runs one forward pass and returns its result.
        exclude: modules whose parameters and buffers, and tensors, do not count.
    """
    import torch

    known = set()
    for owner in exclude:
        held = (
            [*owner.parameters(), *owner.buffers()]
            if isinstance(owner, torch.nn.Module)
            else [owner]
        )
        known |= {tensor.untyped_storage().data_ptr() for tensor in held}
    kept: dict[int, int] = {}
    alive = []  # freed memory would be handed out again and counted once

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive.append(step())
    return sum(kept.values()) / 2**20


def parser(about: str | None, rounds: int = 20) -> argparse.ArgumentParser:
    """Return the options that every timing script has."""
    found = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--quick", action="store_true", help="small shapes: does it run?")
    found.add_argument("--full", action="store_true", help="every case, not only the usual ones")
    found.add_argument("--rounds", type=int, default=rounds, help="alternated rounds of a case")
    found.add_argument("--threads", type=int, default=2, help="threads of torch")
    found.add_argument("--csv", type=Path, help="write the rows here")
    return found


def start(given: argparse.Namespace) -> None:
    """Set threads and seed; with --quick two rounds are enough."""
    import torch

    given.began = time.perf_counter()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    if given.quick:
        given.rounds = 2


def show(row: Row) -> Row:
    """Print a row as soon as it is there."""
    span = f"{row.value:8.3f} {row.unit:<4} [{row.low_10:.3f} .. {row.high_90:.3f}]"
    against = f" / {row.against}" if row.against else ""
    print(f"{span}  {row.mode}{against}: {row.measure}; {row.case}", flush=True)
    return row


def finish(rows: Sequence[Row], given: argparse.Namespace, keep: bool = True) -> int:
    """Write the CSV if one was asked for, and say how long it took; return the exit status.

    What the file holds of cases not measured now stays, unless keep is false.
    """
    print(f"{len(rows)} figures in {time.perf_counter() - given.began:.0f} s")
    if given.quick:  # never to be taken for the real thing
        rows = [replace(row, question=f"quick {row.question}") for row in rows]
    if given.csv is not None:
        if not keep:
            given.csv.unlink(missing_ok=True)
        write(given.csv, rows, about(given.threads))
    return 0


def about(threads: int) -> dict[str, str]:
    """Say what the figures were made with: machine, threads, versions, commit."""
    made = {"machine": f"{_processor()}, {os.cpu_count()} CPUs", "threads": str(threads)}
    made["python"] = platform.python_version()
    for name in ("torch", "peft", "transformers", "rotmole"):
        try:
            made[name] = version(name)
        except PackageNotFoundError:
            made[name] = "not installed"
    return made | {"commit": _commit()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:
            return ""
        return done.stdout.strip()

    measured = (":(top)src", ":(top,glob)benchmarks/*.py", ":(top)constraints.txt")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *measured)
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+changes" if changed else "")


NUMBERS = ("value", "low_10", "high_90", "ours", "baseline")


def write(path: Path, rows: Sequence[Row], made: dict[str, str]) -> None:
    """Write rows as CSV, five significant digits, with what they were made with.

    Rows that the file holds already and that were not measured now stay, with what they were made
    with: those of --full outlive a shorter run.
    """
    old = read_file(path) if path.exists() else {}
    all_rows = [(row, made) for row in rows]
    all_rows += [old[key] for key in old.keys() - {row.key for row in rows}]
    order = {key: index for index, key in enumerate(old)}
    all_rows.sort(key=lambda each: order.get(each[0].key, len(order)))
    buffer = io.StringIO()
    writer = csv.DictWriter(
        buffer, [*(entry.name for entry in fields(Row)), *made], lineterminator="\n"
    )
    writer.writeheader()
    for row, made_with in all_rows:
        cells = asdict(row)
        for name in NUMBERS:
            cells[name] = "" if cells[name] is None else f"{cells[name]:.5g}"
        writer.writerow(cells | made_with)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(buffer.getvalue(), encoding="utf-8")


def read(folder: Path) -> dict[tuple[str, ...], tuple[Row, dict[str, str]]]:
    """Return every row of a folder's CSV files and what it was made with, by its key."""
    found = {}
    for path in sorted(folder.glob("*.csv")):
        found |= read_file(path)
    return found


def read_file(path: Path) -> dict[tuple[str, ...], tuple[Row, dict[str, str]]]:
    """Return every row of a CSV file; none of another table's, such as eval_parity.py's."""
    names = {entry.name for entry in fields(Row)}
    found = {}
    with path.open(newline="", encoding="utf-8") as file:
        for cells in csv.DictReader(file):
            if not names <= set(cells):
                break
            values: dict[str, Any] = {name: cells.pop(name) for name in names}
            for name in NUMBERS:
                values[name] = float(values[name]) if values[name] else None
            values["rounds"] = int(values["rounds"])
            row = Row(**values)
            found[row.key] = (row, cells)
    return found


def adapter_config(rotation: str, shape: tuple[int, int, int], targets: Any, **more: Any) -> Any:
    """Return a RotMoleConfig; B is not zero, as in the middle of training."""
    from rotmole import RotMoleConfig

    experts, rank, top_k = shape
    return RotMoleConfig(
        num_experts=experts, r=rank, top_k=top_k, rotation=rotation, target_modules=targets,
        init_weights=False, **more,
    )  # fmt: skip


def lora_like(ours: Any, targets: Any, base: Any, **more: Any) -> Any:
    """Return PEFT LoRA on `base` with the rank whose parameters come nearest to ours."""
    from peft import LoraConfig, get_peft_model

    from rotmole.tuner.layer import RotMoleLayer

    wanted = ours.get_nb_trainable_parameters()[0]
    layers = [module for module in ours.modules() if isinstance(module, RotMoleLayer)]
    one = sum(layer.in_features + layer.out_features for layer in layers)
    rank = max(1, round(wanted / one))
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False)
    return get_peft_model(base, config, **more)


def lora_name(model: Any) -> str:
    """Name a PEFT LoRA model with its rank."""
    return f"PEFT LoRA r={model.peft_config['default'].r}"


def run(main: Callable[[], int]) -> None:
    """Call main and end with its status; a missing package is one plain line."""
    try:
        sys.exit(main())
    except ModuleNotFoundError as error:
        sys.exit(f"missing: {error.name}; install rotmole with its train extra")
