"""``rotmole demo``: RotMoLE and its twin without rotation on a real model, in minutes."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from rotmole.cli.demo.processes import run_jobs
from rotmole.cli.demo.report import BEFORE, OURS, SHOWN, TWIN, show, write
from rotmole.cli.demo.worker import Job
from rotmole.config.load import load_run
from rotmole.data import data_problems
from rotmole.errors import InputError, RotMoleError
from rotmole.evaluation import compare
from rotmole.files import make_folder
from rotmole.models.load import load_tokenizer
from rotmole.training.folder.layout import MANIFEST
from rotmole.training.folder.lock import run_lock

START = "start.safetensors"


def demo(
    output: Path, steps: int | None = None, seed: int = 0, overrides: Sequence[str] = ()
) -> int:
    """Train both adapters from one start on the same rows, and show one table.

    Args:
        output: folder of the two run folders and demo.json.
        steps: updates of each adapter; None means the number in demo.yaml.
        seed: of data, initial weights and order.
        overrides: key=value settings over demo.yaml.

    Returns:
        0, or 128 + the signal that stopped it.
    """
    started = time.perf_counter()
    jobs = make_jobs(output, steps, seed, overrides)
    clear_output(output, jobs)
    load_tokenizer(jobs[0].run.model)  # downloads the built-in model here, not in both processes
    outcomes = run_jobs(jobs)
    interrupted = [outcome.interrupted for outcome in outcomes.values() if outcome.interrupted]
    if interrupted:
        print("stopped; the next `rotmole demo` starts from the beginning.")
        return 128 + interrupted[0]
    if outcomes[TWIN].digest != outcomes[OURS].digest:
        raise RotMoleError(
            "the two adapters did not have the same start and order of rows, so they cannot be "
            "compared; please report this."
        )
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
    """Return one job for each adapter, made from demo.yaml; each has half of the cores."""
    text = files("rotmole.cli.demo").joinpath("demo.yaml").read_text(encoding="utf-8")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = max((cores or 1) // 2, 1)
    jobs = []
    # Each process also answers once without adapter, so that both work equally long.
    sides = ((OURS, [], {BEFORE: 0}), (TWIN, ["none"], {SHOWN: 3}))
    for name, rotation, before in sides:
        settings = [
            f"output_dir={json.dumps(str(output / name.lower()))}",
            *([] if steps is None else [f"training.max_steps={steps}"]),
            f"seed={seed}",
            *overrides,
            *(f"adapter.rotation={other}" for other in rotation),
        ]
        run = load_run("demo.yaml", settings, text=text, data_problems=data_problems)
        jobs.append(Job(name, run, output / START, name == OURS, before, threads))
    return jobs


def clear_output(output: Path, jobs: Sequence[Job]) -> None:
    """Create the demo's folder, or remove the run folders and the start of an earlier demo.

    Raises:
        InputError: a run folder was not made by a demo, or is in use.
    """
    make_folder(output)
    mark = output / ".demo"
    is_demo = mark.exists() or (output / "demo.json").exists()
    for job in jobs:
        folder = Path(job.run.output_dir)
        with run_lock(folder):  # another demo may be using it
            if (folder / MANIFEST).is_file():
                if not is_demo:
                    raise InputError(
                        f"{str(folder)!r} contains a run that no demo made; choose another "
                        "--output."
                    )
                shutil.rmtree(folder)
    (output / START).unlink(missing_ok=True)
    mark.touch()
