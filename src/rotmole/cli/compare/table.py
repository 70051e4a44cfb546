"""What a study shows while it runs and before: methods, cells, time left, at most 80 columns."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from rotmole.comparison.cells import cell_lock, failure, is_done
from rotmole.comparison.plan import Cell, Plan, make_plan
from rotmole.comparison.results import CELL, FINAL, TUNING
from rotmole.comparison.share import short
from rotmole.comparison.study import Study
from rotmole.training.callbacks.metrics import read_metrics
from rotmole.training.folder.layout import METRICS
from rotmole.units import duration

WIDTH = 80


def method_lines(study: Study) -> list[list[str]]:
    """Return the table of methods: parameters, gates apart, and how far from the target."""
    lines = [["method", "setting", "s", "parameters", "gates", "difference", ""]]
    for name, sized in study.sized.items():
        solved = f"{sized.field} = {sized.value}" if sized.field else "as written"
        if sized.raised:
            solved += f" or {(sized.value or 0) + 1}"
        scale = "" if sized.scale is None else f"{sized.scale:g}"
        difference = "" if sized.difference is None else f"{100 * sized.difference:+.1f} %"
        remark = "" if sized.equal or study.file.equal == "none" else "not equal"
        remark = "baseline" if name == study.file.baseline else remark
        counts = [f"{sized.parameters:,}", f"{sized.gates:,}"]
        lines.append([name, solved, scale, *counts, difference, remark])
    return lines


def rounding_lines(study: Study) -> list[str]:
    """Say what the two roundings of each solved setting would train."""
    lines = []
    for name, sized in study.sized.items():
        if len(sized.rounded) > 1:
            sides = " or ".join(f"{value}: {count:,}" for value, count in sized.rounded)
            more = f"; {sized.raised} layers have one more" if sized.raised else ""
            lines.append(f"  {name}: {sized.field} {sides} parameters{more}")
    return lines


def stage_lines(study: Study, plan: Plan) -> list[str]:
    """Say how many cells there are, stage by stage."""
    tuning = sum(cell.stage == TUNING for cell in plan.cells)
    final = len(study.file.seeds) * len(study.file.methods)
    lines = []
    if tuning and study.file.tune is not None:
        values = "; ".join(
            f"{key} {', '.join(f'{value:g}' for value in values)}"
            for key, values in plan.grid.items()
        )
        seeds = ", ".join(map(str, study.file.tune.seeds))
        lines.append(f"tuning      {tuning} cells: {values}; seeds {seeds}")
        if study.file.tune.growth:
            lines.append(
                f"            up to {study.file.tune.growth} values more, for all methods, while "
                "a best lies on the edge"
            )
    if not final:
        return [*lines, "final       none: a screen, judged by validation loss"]
    seeds = ", ".join(map(str, study.file.seeds))
    lines.append(f"final       {final} cells: seeds {seeds}, scored on {study.file.split} rows")
    return lines


@dataclass(frozen=True)
class Progress:
    """The state of all cells at one moment.

    Attributes:
        plan: as of now.
        states: cell -> done, running, failed or waiting.
        shares: running cell -> the share of its updates that is made.
        left: seconds that are left, None if nothing is known yet.
    """

    plan: Plan
    states: Mapping[Cell, str]
    shares: Mapping[Cell, float]
    left: float | None


def look(study: Study, jobs: int, since: float) -> Progress:
    """Read the state of a study from its folder.

    Args:
        study: the study.
        jobs: processes at work.
        since: when this command began, in seconds since the epoch.
    """
    plan = make_plan(study)
    states = {cell: _state(study, cell, since) for cell in plan.cells}
    running = [cell for cell, state in states.items() if state == "running"]
    shares = {cell: _share(study, cell) for cell in running}
    return Progress(plan, states, shares, _time_left(study, states, shares, jobs))


def _state(study: Study, cell: Cell, since: float) -> str:
    if is_done(study, cell):
        return "done"
    with cell_lock(study, cell) as free:
        if not free:
            return "running"
    failed = failure(study, cell)
    return "waiting" if failed is None or failed["time"] < since else "failed"


def _share(study: Study, cell: Cell) -> float:
    folder = study.folder / cell.name
    rows = read_metrics(folder / METRICS)
    steps = study.file.base.get("training", {}).get("max_steps")
    if not rows:
        return 0.0
    if isinstance(steps, int) and steps > 0:
        return min(rows[-1]["step"] / steps, 1.0)
    epochs = study.file.base.get("training", {}).get("num_train_epochs", 1.0)
    return min(rows[-1].get("epoch", 0.0) / epochs, 1.0)


def _time_left(
    study: Study, states: Mapping[Cell, str], shares: Mapping[Cell, float], jobs: int
) -> float | None:
    """Estimate by what finished cells took, a method's own if there are some."""
    taken: dict[str, list[float]] = {}
    for cell, state in states.items():
        if state == "done":
            content = _content(study.folder / cell.name / CELL)
            taken.setdefault(cell.method, []).append(content.get("seconds", 0.0))
    every = [seconds for values in taken.values() for seconds in values]
    if not every:
        return None
    mean = sum(every) / len(every)
    left = 0.0
    for cell, state in states.items():
        if state in ("waiting", "running"):
            own = taken.get(cell.method, [mean])
            left += sum(own) / len(own) * (1 - shares.get(cell, 0.0))
    if not any(cell.stage == FINAL for cell in states):
        left += mean * len(study.file.methods) * len(study.file.seeds)
    return left / max(jobs, 1)


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def progress_table(study: Study, progress: Progress, started: float) -> Group:
    """Return the live table: a line for each method, and one for what runs."""
    table = Table(box=None, padding=(0, 2, 0, 0), width=WIDTH)
    for name in ("method", "tuning", "best", "final", "state"):
        table.add_column(name, no_wrap=True, justify="left", overflow="ellipsis")
    for method in study.file.methods:
        cells = [cell for cell in progress.plan.cells if cell.method == method]
        chosen = progress.plan.chosen.get(method, {})
        best = ", ".join(f"{value:g}" for value in chosen.values())
        table.add_row(
            method,
            _counted([cell for cell in cells if cell.stage == TUNING], progress),
            best or "-",
            _counted([cell for cell in cells if cell.stage == FINAL], progress),
            _running(cells, progress),
        )
    return Group(table, Text(summary(progress, started)))


def _counted(cells: Sequence[Cell], progress: Progress) -> str:
    if not cells:
        return "-"
    done = sum(progress.states[cell] == "done" for cell in cells)
    failed = sum(progress.states[cell] == "failed" for cell in cells)
    return f"{done}/{len(cells)}" + (f" ({failed} failed)" if failed else "")


def _running(cells: Sequence[Cell], progress: Progress) -> str:
    words = [
        f"{'/'.join(cell.name.split('/')[3:])} {100 * progress.shares[cell]:.0f} %"
        for cell in cells
        if cell in progress.shares
    ]
    return "; ".join(words)


def summary(progress: Progress, started: float) -> str:
    """Return one line: cells done, running, left, failed; time spent and left."""
    count = {
        name: sum(state == name for state in progress.states.values())
        for name in ("done", "running", "waiting", "failed")
    }
    words = [f"{count['done']} done", f"{count['running']} running", f"{count['waiting']} left"]
    if count["failed"]:
        words.append(f"{count['failed']} failed")
    if progress.plan.open:
        words.append("more cells may follow")
    words.append(f"{duration(time.monotonic() - started)} so far")
    if progress.left is not None:
        words.append(f"about {duration(progress.left)} left")
    return ", ".join(words)


def console() -> Console:
    """Return rich's console on standard error, at most 80 columns wide."""
    known = Console(stderr=True)
    return Console(stderr=True, width=min(known.width, WIDTH))


def finished_line(study: Study, cell: Cell) -> str:
    """Return one line about a finished cell, for a log without a terminal."""
    content = _content(study.folder / cell.name / CELL)
    nll = content.get("nll")
    text = "diverged" if nll is None and "diverged" in content else f"validation loss {nll:.4f}"
    return f"{short(cell)}: {text}, {duration(content.get('seconds', 0.0))}"
