"""``rotmole demo``: LoRA, MoE-LoRA and RotMoLE of equal parameters on a real model, in minutes."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from rotmole.cli.demo.processes import run_jobs
from rotmole.cli.demo.report import ADAPTERS, BEFORE, LORA, MIXTURE, OURS, SHOWN, show, write
from rotmole.cli.demo.worker import Job
from rotmole.config.load import load_run
from rotmole.data import data_problems
from rotmole.errors import InputError, RotMoleError
from rotmole.evaluation import compare
from rotmole.files import make_folder
from rotmole.models.load import load_tokenizer
from rotmole.training.folder.layout import MANIFEST
from rotmole.training.folder.lock import run_lock

SIDES: dict[str, tuple[str, ...]] = {
    LORA: (
        "adapter={peft_type: LORA, r: 34, lora_alpha: 68, target_modules: [q_proj, k_proj, v_proj, "
        "o_proj]}",
        "training.learning_rate=2e-3",
        "evaluation.report_tokens=0",
    ),
    MIXTURE: ("adapter.rotation=none", "adapter.r=8", "adapter.lora_alpha=16"),
    OURS: (),
}
"""Name -> settings over demo.yaml.

Ranks give the built-in model equal numbers of parameters, within 2 %; s = lora_alpha / r is 2 for
all. Rates are the best of three in experiments/study/q1_screen.yaml.
"""
ALSO = {MIXTURE: {SHOWN: 3}, OURS: {BEFORE: 0}}
"""Name -> what that process answers without adapter: name -> examples in the prompt."""


def demo(
    output: Path, steps: int | None = None, seed: int = 0, overrides: Sequence[str] = ()
) -> int:
    """Train the adapters on the same rows in the same order, and show one table.

    Args:
        output: folder of the run folders and demo.json.
        steps: updates of each adapter; None means the number in demo.yaml.
        seed: of data, initial weights and order.
        overrides: key=value settings over demo.yaml.

    Returns:
        0, or 128 + the signal that stopped it.
    """
    started = time.perf_counter()
    jobs = make_jobs(output, steps, seed, overrides)
    clear_output(output, jobs)
    load_tokenizer(jobs[0].run.model)  # downloads the built-in model here, not in every process
    outcomes = run_jobs(jobs)
    interrupted = [outcome.interrupted for outcome in outcomes.values() if outcome.interrupted]
    if interrupted:
        print("stopped; the next `rotmole demo` starts from the beginning.")
        return 128 + interrupted[0]
    if len({outcome.digest for outcome in outcomes.values()}) > 1:
        raise RotMoleError(
            "the adapters did not have the same rows in the same order, so they cannot be "
            "compared; please report this."
        )
    systems = {n: s for outcome in outcomes.values() for n, s in outcome.systems.items()}
    report = compare(
        {name: systems[name] for name in (BEFORE, SHOWN, *ADAPTERS)},
        {"steps": jobs[0].run.training["max_steps"], "seed": seed},
    )
    show(report, outcomes, time.perf_counter() - started)
    write(output / "demo.json", report, outcomes, time.perf_counter() - started)
    return 0


def make_jobs(
    output: Path, steps: int | None, seed: int, overrides: Sequence[str] = ()
) -> list[Job]:
    """Return one job for each adapter, made from demo.yaml; they share the cores."""
    text = files("rotmole.cli.demo").joinpath("demo.yaml").read_text(encoding="utf-8")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = max((cores or 1) // len(SIDES), 1)
    jobs = []
    for name, own in SIDES.items():
        settings = [
            f"output_dir={json.dumps(str(output / name.lower()))}",
            *([] if steps is None else [f"training.max_steps={steps}"]),
            f"seed={seed}",
            *own,
            *overrides,
        ]
        run = load_run("demo.yaml", settings, text=text, data_problems=data_problems)
        jobs.append(Job(name, run, ALSO.get(name, {}), threads))
    return jobs


def clear_output(output: Path, jobs: Sequence[Job]) -> None:
    """Create the demo's folder, or remove the run folders of an earlier demo.

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
    mark.touch()
