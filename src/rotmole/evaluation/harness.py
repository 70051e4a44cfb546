"""The language model evaluation harness (lm_eval) on a loaded model, with local task files."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rotmole.errors import ConfigError, InputError, did_you_mean

BASE, ADAPTER = "base", "adapter"
_NO_FIGURES = ("alias", "sample_len", "name")


@dataclass(frozen=True)
class Figure:
    """One figure of one task.

    Attributes:
        task: the task, or the group of tasks.
        metric: as lm_eval names it, with its filter if that is not "none".
        values: by system, "base" and "adapter".
        errors: standard errors by system; None where lm_eval has none.
    """

    task: str
    metric: str
    values: dict[str, float]
    errors: dict[str, float | None]


def check_harness(tasks: Sequence[str], include: Path | None) -> Any:
    """Return lm_eval's manager of tasks after checking that it knows the tasks.

    Args:
        tasks: names of tasks, groups or tags.
        include: folder with more task files, None for lm_eval's own tasks alone.

    Raises:
        ConfigError: lm_eval is not installed.
        InputError: there is no such task or folder.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError("--harness needs lm_eval: pip install 'rotmole[eval]'.")
    if include is not None and not include.is_dir():
        raise InputError(f"--harness-path {include} is no folder; give the one of the task files.")
    from lm_eval.tasks import TaskManager

    if include is not None:  # lm_eval's own tasks are thousands of files
        manager = TaskManager(include_path=str(include), include_defaults=False)
        if set(tasks) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=None if include is None else str(include))
    known = list(manager.all_tasks)
    for task in tasks:
        if task not in known:
            hint = did_you_mean(task, known) or "; `rotmole exec -- lm_eval ls tasks` lists them"
            raise InputError(f"--harness: lm_eval has no task {task!r}{hint}.")
    return manager


def run_harness(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    manager: Any,
    *,
    batch_size: int,
    limit: int | None = None,
    seed: int = 0,
) -> tuple[list[Figure], dict[str, Any]]:
    """Run tasks on a model, and on its base if it has an adapter.

    Args:
        model: a causal language model, or a PeftModel around one.
        tasks: names.
        manager: from `check_harness`.
        limit: rows of each task; None is all.
        seed: of everything random.

    Returns:
        The figures, and lm_eval's results by system.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    results: dict[str, Any] = {}
    systems = {BASE: nullcontext}
    if hasattr(model, "disable_adapter"):
        systems = {BASE: model.disable_adapter, ADAPTER: nullcontext}
    for system, chosen in systems.items():
        with chosen(), _undisturbed():
            harnessed = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            result = simple_evaluate(
                model=harnessed, tasks=list(tasks), task_manager=manager, limit=limit,
                bootstrap_iters=1000, random_seed=seed, numpy_random_seed=seed,
                torch_random_seed=seed, fewshot_random_seed=seed,
            )  # fmt: skip
        results[system] = result
    return _figures(results), results


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Put back what the harness changes in the process: random numbers, and its own loudness.

    It warns that it was given a model, which is on purpose.
    """
    logger = logging.getLogger("lm_eval")
    before = logger.level, random.getstate(), np.random.get_state()
    logger.setLevel(logging.ERROR)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        logger.setLevel(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])


def _figures(results: dict[str, Any]) -> list[Figure]:
    first = next(iter(results.values()))["results"]
    figures = []
    for task, values in first.items():
        for name in values:
            metric, _, kind = name.partition(",")
            if name in _NO_FIGURES or metric.endswith("_stderr"):
                continue
            of_task = {system: result["results"][task] for system, result in results.items()}
            figures.append(
                Figure(
                    task,
                    metric if kind in ("", "none") else f"{metric} ({kind})",
                    {system: float(value[name]) for system, value in of_task.items()},
                    {
                        system: _number(value.get(f"{metric}_stderr,{kind}"))
                        for system, value in of_task.items()
                    },
                )
            )
    return figures


def _number(value: Any) -> float | None:
    known = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if known else None
