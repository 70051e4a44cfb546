"""Learning rates when a run goes on: its own schedule and rates, not those of the checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def forward_schedule(schedule: Any, updates: int) -> None:
    """Bring a fresh learning-rate schedule to an update (--weights-only).

    Args:
        schedule: as made from this run's settings; one that follows the loss stays at its start.
        updates: updates made so far.
    """
    if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it wants the optimizer to step first
        for _ in range(updates):
            schedule.step()


@contextmanager
def keep_rates(optimizer: Any, schedule: Any) -> Iterator[None]:
    """Load optimizer and schedule inside the block; the rates stay those of this run.

    The loaded states bring the rates of the checkpoint's run, which would prevail over a change
    that was allowed, and over a schedule of another length until the next update. The rate of the
    next update is base rate x factor(updates made), as in torch's LambdaLR. Schedules whose state
    holds the rates keep them.

    Args:
        optimizer, schedule: as made from this run's settings.
    """
    names = ("initial_lr", "weight_decay", "betas", "eps")
    groups = [{n: group[n] for n in names if n in group} for group in optimizer.param_groups]
    bases = list(getattr(schedule, "base_lrs", ()))
    yield
    for group, rates in zip(optimizer.param_groups, groups, strict=True):
        group.update(rates)
    if isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
        schedule.base_lrs = bases
        schedule._last_lr = [
            base * factor(schedule.last_epoch)
            for base, factor in zip(bases, schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(optimizer.param_groups, schedule._last_lr, strict=True):
            group["lr"] = rate
