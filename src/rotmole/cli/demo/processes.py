"""The demo's processes as their parent sees them: start, messages, progress, end."""

from __future__ import annotations

import multiprocessing
import queue
import sys
from typing import Any

from rotmole.cli.demo.report import ADAPTERS
from rotmole.cli.demo.worker import Job, Outcome, work
from rotmole.cli.screen import progress
from rotmole.errors import RotMoleError


class JobFailed(RotMoleError):
    """A job's error message, with its exit code."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


def run_jobs(jobs: list[Job]) -> dict[str, Outcome]:
    """Run the jobs at the same time, each in its own process, and show their progress.

    Returns:
        Outcomes by job name.

    Raises:
        RotMoleError: a job failed; the others are stopped.
    """
    # commands.py has already told the fork server what to import
    context = multiprocessing.get_context("forkserver")
    messages, may_train = context.Queue(), context.Event()
    workers = [context.Process(target=work, args=(job, messages, may_train)) for job in jobs]
    for worker in workers:
        worker.start()
    outcomes: dict[str, Outcome] = {}
    try:
        estimates: dict[str, float] = {}
        with progress() as show:
            while len(outcomes) < len(jobs):
                kind, name, *content = _next(messages, workers)
                if kind == "progress":
                    what, done, total = content
                    show(f"{name}: {what}", done, total)
                elif kind == "estimate":
                    estimates[name], model_note = content
                    if len(estimates) == len(jobs):
                        _announce(jobs, estimates, model_note)
                        may_train.set()
                elif kind == "done":
                    outcomes[name] = content[0]
                else:
                    text, exit_code = content
                    raise JobFailed(f"{name}: {text}", exit_code)
    finally:
        for worker in workers:
            if len(outcomes) < len(jobs):
                worker.terminate()
            worker.join()
    return outcomes


def _next(messages: Any, workers: list[Any]) -> tuple[Any, ...]:
    """Wait for a message; a process that was killed sends none, so look after them as well."""
    while True:
        try:
            return messages.get(timeout=1.0)
        except queue.Empty:
            if codes := [w.exitcode for w in workers if w.exitcode not in (None, 0)]:
                raise JobFailed(
                    f"a process of the demo ended with exit code {codes[0]}; run it again.", 1
                ) from None


def _announce(jobs: list[Job], estimates: dict[str, float], model_note: str | None) -> None:
    run = jobs[0].run
    tasks = run.data.tasks
    languages = next(iter(tasks.values())).languages or []
    print(f"model       {run.model.name}" + (f" ({model_note})" if model_note else ""))
    print(f"tasks       {', '.join(tasks)} in {', '.join(languages)}")
    print(
        f"training    {run.training['max_steps']} updates of "
        f"{run.training['per_device_train_batch_size']} rows for each of {', '.join(ADAPTERS)}, at "
        "the same time, on the same rows in the same order"
    )
    print(f"estimate    {max(estimates.values()) / 60:.1f} minutes, measured on a few updates")
    sys.stdout.flush()
