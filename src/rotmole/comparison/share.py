"""Processes that share a study: each takes the next cell that nobody has, until none is left."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import TrainerCallback

from rotmole.comparison.cells import (
    Stopped,
    cell_lock,
    changes,
    failure,
    is_done,
    note_failure,
    run_cell,
)
from rotmole.comparison.plan import Cell, Plan, make_plan, write_plan
from rotmole.comparison.shared import SharedSources
from rotmole.comparison.study import Study
from rotmole.config.yaml_text import write_yaml
from rotmole.errors import ConfigError, StorageError
from rotmole.files import atomic_write_text, make_folder
from rotmole.models.precision import choose_device, choose_dtype

MACHINE = "machine.json"
WAIT = 0.5
"""Seconds between two looks for a cell, while other processes have all that are left."""


def fix_machine(study: Study, jobs: int = 1) -> dict[str, Any]:
    """Decide dtype, device and threads of all cells, once a study.

    Args:
        study: the study; its folder is made.
        jobs: processes that share the cores.

    Returns:
        dtype, device, threads, processor; those of machine.json if an earlier call decided.

    Raises:
        ConfigError: the study asks for others than it began with.
    """
    path = make_folder(study.folder) / MACHINE
    with FileLock(study.folder / ".machine.lock"):
        if not path.is_file():
            device = choose_device(study.model)
            dtype = choose_dtype(study.model, device)
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
            content = {
                "dtype": str(dtype).removeprefix("torch."),
                "device": device.type,
                "threads": study.file.threads or max((cores or os.cpu_count() or 1) // jobs, 1),
            }
            atomic_write_text(path, json.dumps(content, indent=1) + "\n")
            atomic_write_text(study.folder / "study.yaml", write_yaml(study.file.model_dump()))
        fixed: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    asked = {
        "dtype": study.model.dtype, "device": study.model.device, "threads": study.file.threads,
    }  # fmt: skip
    problems = [
        f"{name} is {value}, and the study in {str(study.folder)!r} began with {fixed[name]}, "
        "which stays fixed; choose another --output"
        for name, value in asked.items()
        if value not in ("auto", None, fixed[name])
    ]
    if problems:
        raise ConfigError(problems, study.where)
    return fixed | {"processor": processor()}


def processor() -> str:
    """Return the name of the device that computes: the GPU's, else the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@dataclass(frozen=True)
class Left:
    """What is left of a study when this process has nothing more to do.

    Attributes:
        failed: cells that failed, with their messages.
        blocked: whether cells cannot be planned, because others failed.
    """

    failed: dict[Cell, str]
    blocked: bool


def work(
    study: Study,
    machine: Mapping[str, Any],
    *,
    only: str | None = None,
    since: float | None = None,
    sources: SharedSources | None = None,
    callbacks: Callable[[Cell], Sequence[TrainerCallback]] = lambda cell: (),
) -> Left:
    """Do cells until none is left; other processes may do the same with the same folder.

    A failed cell does not stop the rest. One that failed before this call is tried once more.

    Args:
        study: the study.
        machine: from `fix_machine`.
        only: name of the one cell to do, such as "final/lora/seed-0".
        since: seconds since the epoch; cells that failed later are left alone. None is now.
        sources: of the process.
        callbacks: cell -> callbacks of its trainer.

    Raises:
        Stopped: by a signal.
        ConfigError: a folder of a cell was made with other settings, or there is no such cell.
        StorageError: the disk refuses.
    """
    since = time.time() if since is None else since
    sources = sources or SharedSources(trust_remote_code=study.trust_remote_code)
    seen: set[Cell] = set()
    while True:
        plan = make_plan(study)
        write_plan(study, plan, machine)
        check_cells(study, [cell for cell in plan.cells if cell not in seen], machine)
        seen |= set(plan.cells)
        left = todo(study, plan, since, only)
        if not left:
            return Left(failures(study, plan), plan.open and only is None)
        if not any(_take(study, cell, machine, sources, callbacks) for cell in left):
            time.sleep(WAIT)


def todo(study: Study, plan: Plan, since: float, only: str | None = None) -> list[Cell]:
    """Return the cells of a plan that are not finished and have not failed since a time.

    Raises:
        ConfigError: `only` is no cell of the plan.
    """
    cells = [c for c in plan.cells if only is None or short(c) == only.removeprefix("cells/")]
    if only is not None and not cells:
        later = "; final cells are known when tuning is finished" if plan.open else ""
        raise ConfigError(f"there is no cell {only!r}{later}; --print-cells lists them")
    return [
        cell
        for cell in cells
        if not is_done(study, cell)
        and ((failed := failure(study, cell)) is None or failed["time"] < since)
    ]


def failures(study: Study, plan: Plan) -> dict[Cell, str]:
    """Return the cells that failed, with their messages."""
    failed = {cell: failure(study, cell) for cell in plan.cells if not is_done(study, cell)}
    return {cell: content["message"] for cell, content in failed.items() if content is not None}


def short(cell: Cell) -> str:
    """Return a cell's name for the command line."""
    return cell.name.removeprefix("cells/")


def check_cells(study: Study, cells: Sequence[Cell], machine: Mapping[str, Any]) -> None:
    """Refuse a study whose folder has cells with other settings.

    Raises:
        ConfigError: naming up to three settings.
    """
    differing = [problem for cell in cells for problem in changes(study, cell, machine)]
    if differing:
        more = f"and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ConfigError(
            [
                *differing[:3],
                *([more] if more else []),
                "cells of one study have the same settings: choose another --output, or delete "
                "those folders",
            ],
            study.where,
        )


def _take(
    study: Study,
    cell: Cell,
    machine: Mapping[str, Any],
    sources: SharedSources,
    callbacks: Callable[[Cell], Sequence[TrainerCallback]],
) -> bool:
    """Do a cell if nobody else has it, and tell whether it was free."""
    with cell_lock(study, cell) as mine:
        if not mine or is_done(study, cell):
            return mine
        try:
            run_cell(study, cell, machine, sources, callbacks(cell))
        except (Stopped, StorageError):
            raise
        except Exception as error:
            note_failure(study, cell, error)
        return True
