"""rotmole demo: RotMoLE beside its scalar-gated twin on a real model, in minutes."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import shutil
import sys
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from rotmole.cli.demo.worker import Job, Outcome, work
from rotmole.config.load import load_run
from rotmole.data import data_problems
from rotmole.errors import InputError, RotMoleError
from rotmole.evaluation import Report, compare, to_json
from rotmole.evaluation.render import plain_text, rich_table, rows
from rotmole.files import atomic_write_text, make_folder
from rotmole.models.load import load_tokenizer
from rotmole.training.folder.layout import MANIFEST
from rotmole.training.folder.lock import run_lock

TWIN, OURS = "MoE-LoRA", "RotMoLE"
BEFORE, SHOWN = "before", "before, 3 examples"


def demo(
    output: Path, steps: int | None = None, seed: int = 0, overrides: Sequence[str] = ()
) -> int:
    """Train both adapters from one start on the same rows, and show one table.

    Args:
        output: folder of the two run folders and demo.json.
        steps: updates of each adapter; None takes demo.yaml's.
        seed: of data, initial weights and order.

    Returns:
        0, or 128 + the signal that stopped it.
    """
    started = time.perf_counter()
    jobs = make_jobs(output, steps, seed, overrides)
    load_tokenizer(jobs[0].run.model)  # the built-in model is fetched once, not by both processes
    outcomes = run_jobs(jobs)
    interrupted = [outcome.interrupted for outcome in outcomes.values() if outcome.interrupted]
    if interrupted:
        print("stopped; a demo starts anew each time.")
        return 128 + interrupted[0]
    if outcomes[TWIN].digest != outcomes[OURS].digest:
        raise RotMoleError("the two adapters did not have the same start and order of rows.")
    systems = {n: s for outcome in outcomes.values() for n, s in outcome.systems.items()}
    report = compare(
        {name: systems[name] for name in (BEFORE, SHOWN, TWIN, OURS)},
        {"steps": jobs[0].run.training["max_steps"], "seed": seed},
    )
    show(report, outcomes, time.perf_counter() - started)
    write(output / "demo.json", report, outcomes, time.perf_counter() - started)
    return 0


def make_jobs(
    output: Path, steps: int | None, seed: int, overrides: Sequence[str] = ()
) -> list[Job]:
    """Read the demo's run file and derive the two jobs from it.

    Args:
        output: the demo's folder; run folders of an earlier demo in it give way.
        steps: updates of each adapter; None takes demo.yaml's.

    Returns:
        One job an adapter, each with half of the cores.
    """
    text = files("rotmole.cli.demo").joinpath("demo.yaml").read_text(encoding="utf-8")
    make_folder(output)
    start = output / "start.safetensors"
    mark = output / ".demo"
    made = mark.exists() or (output / "demo.json").exists()
    threads = max(_cores() // 2, 1)
    jobs = []
    # Each side answers once without adapter too, so that both are busy equally long.
    sides = ((OURS, [], {BEFORE: 0}), (TWIN, ["none"], {SHOWN: 3}))
    for name, rotation, before in sides:
        folder = output / name.lower()
        with run_lock(folder):  # not under a demo that runs
            if (folder / MANIFEST).is_file():
                if not made:
                    raise InputError(
                        f"{str(folder)!r} holds a run that no demo made; choose another --output."
                    )
                shutil.rmtree(folder)
        settings = [
            f"output_dir={json.dumps(str(folder))}",
            *([] if steps is None else [f"training.max_steps={steps}"]),
            f"seed={seed}",
            *overrides,
            *(f"adapter.rotation={other}" for other in rotation),
        ]
        run = load_run("demo.yaml", settings, text=text, data_problems=data_problems)
        jobs.append(Job(name, run, start, name == OURS, before, threads))
    start.unlink(missing_ok=True)
    mark.touch()
    return jobs


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_jobs(jobs: list[Job]) -> dict[str, Outcome]:
    """Run the jobs side by side, each in its own process, and show how far they are.

    Returns:
        Outcomes by job name.

    Raises:
        RotMoleError: a job failed; the other one is stopped.
    """
    context = multiprocessing.get_context("forkserver")  # whose imports began with the command's
    messages, go = context.Queue(), context.Event()
    workers = [context.Process(target=work, args=(job, messages, go)) for job in jobs]
    for worker in workers:
        worker.start()
    try:
        estimates: dict[str, float] = {}
        outcomes: dict[str, Outcome] = {}
        with Screen() as screen:
            while len(outcomes) < len(jobs):
                message = _next(messages, workers)
                if message[0] == "progress":
                    screen.update(*message[1:])
                elif message[0] == "estimate":
                    estimates[message[1]] = message[2]
                    if len(estimates) == len(jobs):
                        _announce(jobs, estimates, message[3])
                        go.set()
                elif message[0] == "done":
                    outcomes[message[1]] = message[2]
                else:
                    raise _Failed(f"{message[1]}: {message[2]}", message[3])
    finally:
        for worker in workers:
            if len(outcomes) < len(jobs):
                worker.terminate()
            worker.join()
    return outcomes


class _Failed(RotMoleError):
    """A job's own error, with its exit code."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


def _next(messages: Any, workers: list[Any]) -> tuple[Any, ...]:
    while True:
        try:
            return messages.get(timeout=1.0)
        except queue.Empty:
            if dead := [w.exitcode for w in workers if w.exitcode not in (None, 0)]:
                raise _Failed(f"a process of the demo ended with code {dead[0]}.", 1) from None


def _announce(jobs: list[Job], estimates: dict[str, float], note: str | None) -> None:
    run = jobs[0].run
    tasks = run.data.tasks
    languages = next(iter(tasks.values())).languages or []
    print(f"model       {run.model.name}" + (f" ({note})" if note else ""))
    print(f"tasks       {', '.join(tasks)} in {', '.join(languages)}")
    print(
        f"training    {run.training['max_steps']} updates of "
        f"{run.training['per_device_train_batch_size']} rows for each of {TWIN} and {OURS}, "
        "side by side, from the same A, B and router, on the same rows in the same order"
    )
    print(f"estimate    {max(estimates.values()) / 60:.1f} minutes, from a probe of a few updates")
    sys.stdout.flush()


class Screen:
    """Bars on a terminal, plain lines elsewhere, on standard error."""

    def __init__(self) -> None:
        self.bars: Any = None
        self.jobs: dict[tuple[str, str], Any] = {}
        self.said: dict[tuple[str, str], int] = {}

    def __enter__(self) -> Screen:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self.bars = Progress(console=Console(stderr=True))
            self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bars is not None:
            self.bars.stop()

    def update(self, name: str, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` are done."""
        key = (name, what)
        if self.bars is not None:
            if key not in self.jobs:
                self.jobs[key] = self.bars.add_task(f"{name}: {what}", total=total)
            self.bars.update(self.jobs[key], completed=done)
            return
        quarter = 4 * done // max(total, 1)
        if quarter > self.said.get(key, 0):
            self.said[key] = quarter
            print(f"{name}: {what} {done}/{total}", file=sys.stderr, flush=True)


def show(report: Report, outcomes: dict[str, Outcome], seconds: float) -> None:
    """Print the table, the cost, and a few generations."""
    lines = rows(report, metrics=["exact_match"])
    lines = [[line[0], line[1], line[3], *line[4:]] for line in lines]  # one metric needs no name
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(rich_table(lines, title="exact match [95 % interval]"))
    else:
        print("\nexact match [95 % interval]")
        print(plain_text(lines))
    print()
    for name in (TWIN, OURS):
        outcome = outcomes[name]
        print(
            f"{name:<9} {outcome.trainable_parameters:>9,} trainable parameters, trained in "
            f"{outcome.seconds:.0f} s, answered in {outcome.systems[name].seconds:.0f} s"
        )
    print(f"all in {seconds:.0f} s")
    unused = [f"{name} {' of '.join(map(str, outcomes[name].unused))}" for name in (TWIN, OURS)]
    print(
        f"experts that no token of the last logged update chose: {', '.join(unused)} (their rows "
        "are few, and no balance loss is on: adapter.router_aux_loss_coef)"
    )
    print(
        "RotMoLE has rotation gates in addition, so the two have different numbers of parameters.\n"
    )
    show_generations(report)
    print("\nOne seed decides nothing: with another seed the two adapters may change places.")


def show_generations(report: Report) -> None:
    """Print one test row of each task with the answers before and after."""
    for task, examples in report.systems[BEFORE].examples.items():
        index = len(examples) // 2
        print(f"{task}: {examples[index].prompt.strip()}")
        print(f"  {'right':<20} {examples[index].completion.strip()}")
        for name, system in report.systems.items():
            print(f"  {name:<20} {(system.answers[task][index].text or '')[:100]}")


def write(path: Path, report: Report, outcomes: dict[str, Outcome], seconds: float) -> None:
    """Write demo.json: overall exact match, its rise, cost, and the whole report."""
    overall = {n: system.overall["exact_match"].value for n, system in report.systems.items()}
    content = {
        "exact_match": overall,
        "rise": {name: overall[name] - overall[BEFORE] for name in (TWIN, OURS)},
        "trainable_parameters": {n: o.trainable_parameters for n, o in outcomes.items()},
        "training_seconds": {n: round(o.seconds, 1) for n, o in outcomes.items()},
        "seconds": round(seconds, 1),
        "report": to_json(report, predictions=True),
    }
    atomic_write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
