"""One side of the demo: train one adapter, then answer the test rows; runs in its own process."""

from __future__ import annotations

import hashlib
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback

from rotmole.config.schema import EvaluationSection, RunFile
from rotmole.data import Example
from rotmole.errors import RotMoleError
from rotmole.evaluation import measure
from rotmole.evaluation.report import System
from rotmole.training.build import Built
from rotmole.training.callbacks import usage
from rotmole.training.callbacks.metrics import read_metrics
from rotmole.training.folder.layout import METRICS
from rotmole.training.run import TrainResult, train
from rotmole.training.start import load_start, save_start, start_digest
from rotmole.tuner.experts.experts import Experts

PROBE_ANSWERS = 2  # of each task
PROBE_UPDATES = 2  # the first also pays for what is done once


@dataclass(frozen=True)
class Job:
    """What one process has to do.

    Attributes:
        name: what the table calls the adapter.
        run: its run file.
        start: file with the initial A, B and router that both adapters share.
        leads: writes that file (the other one waits for it).
        before: what it also answers without adapter: name -> examples in the prompt.
        threads: of torch.
    """

    name: str
    run: RunFile
    start: Path
    leads: bool
    before: dict[str, int]
    threads: int


@dataclass(frozen=True)
class Outcome:
    """What one process found.

    Attributes:
        systems: name -> answers and figures.
        trainable_parameters: gates included.
        seconds: wall time of training alone.
        digest: of the initial A, B and router, and of the order of rows.
        unused: experts that no token of the last logged update chose, and all experts there are.
        interrupted: the signal that stopped it, or None.
    """

    systems: dict[str, System]
    trainable_parameters: int
    seconds: float
    digest: str
    unused: tuple[int, int]
    interrupted: int | None = None


class Tell(TrainerCallback):
    """Send each update to the parent process."""

    def __init__(self, job: Job, messages: Any) -> None:
        self.job, self.messages = job, messages

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say how far it is."""
        done = (self.job.name, "training", state.global_step, state.max_steps)
        self.messages.put(("progress", *done))


def work(job: Job, messages: Any, go: Any) -> None:
    """Do the job; send ("progress" | "estimate" | "done" | "failed", name, ...) to the parent.

    Args:
        go: event by which the parent lets training begin.
    """
    try:
        _quiet()
        torch.set_num_threads(job.threads)
        messages.put(("done", job.name, _work(job, messages, go)))
    except RotMoleError as error:
        messages.put(("failed", job.name, str(error), error.exit_code))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:
        messages.put(("failed", job.name, traceback.format_exc(), 1))


def _quiet() -> None:
    """Leave the screen to the parent, which tells of unused experts at the end.

    This process is the demo's own, so nobody else's warnings are lost.
    """
    warnings.simplefilter("ignore")
    logging.getLogger(usage.__name__).setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _work(job: Job, messages: Any, go: Any) -> Outcome:
    digests: list[str] = []

    def prepare(built: Built) -> None:
        if job.leads:
            save_start(built.model, job.start)
        else:
            while not job.start.exists():
                time.sleep(0.1)
            load_start(built.model, job.start)
        digests.append(start_digest(built.model) + _order_digest(built))
        messages.put(("estimate", job.name, _probe(built, job), built.base.note))
        go.wait()

    result = train(job.run, progress=False, callbacks=[Tell(job, messages)], prepare=prepare)
    found = (result.trainable_parameters, result.seconds, digests[0], _unused(result))
    if result.interrupted is not None:
        return Outcome({}, *found, result.interrupted)
    systems = _answers(job, result.built, messages)
    return Outcome(systems, *found)


def _unused(result: TrainResult) -> tuple[int, int]:
    experts = [m for m in result.built.model.modules() if isinstance(m, Experts)]
    logged = [row for row in read_metrics(result.run_dir / METRICS) if "experts_unused" in row]
    return (
        int(logged[-1]["experts_unused"]) if logged else 0,
        sum(m.spec.num_experts for m in experts),
    )


def _order_digest(built: Built) -> str:
    digest = hashlib.sha256()
    for batch in built.trainer.get_train_dataloader():
        digest.update(batch["input_ids"].cpu().numpy().tobytes())
    return digest.hexdigest()


def _answers(job: Job, built: Built, messages: Any) -> dict[str, System]:
    section = job.run.evaluation
    rows = built.examples[section.split]
    systems = {job.name: _measure(built, section, rows, _teller(job.name, messages))}
    with built.model.disable_adapter():
        for name, count in job.before.items():
            shown = section.model_copy(update={"examples_in_prompt": count})
            systems[name] = _measure(built, shown, rows, _teller(name, messages))
    return systems


def _teller(name: str, messages: Any) -> Callable[[str, int, int], None]:
    return lambda what, done, total: messages.put(("progress", name, what, done, total))


def _measure(
    built: Built,
    section: EvaluationSection,
    rows: dict[str, list[Example]],
    progress: Callable[[str, int, int], None] | None = None,
) -> System:
    return measure(
        built.model,
        built.base.tokenizer,
        rows,
        section,
        metrics_by_task={name: task.metrics for name, task in built.run.data.tasks.items()},
        demonstrations=built.examples["train"],
        progress=progress,
        seed=built.run.seed,
    )


def _probe(built: Built, job: Job) -> float:
    """Estimate the job's seconds from a few updates and a few answers; changes nothing."""
    model, trainer = built.model, built.trainer
    model.train()
    times = []
    for batch in islice(trainer.get_train_dataloader(), PROBE_UPDATES):
        started = time.perf_counter()
        trainer.compute_loss(model, batch).backward()
        times.append(time.perf_counter() - started)
    model.zero_grad()
    model.eval()
    section, rows = job.run.evaluation, built.examples[job.run.evaluation.split]
    some = {task: found[:PROBE_ANSWERS] for task, found in rows.items()}
    seconds = _measure(built, section, some).seconds
    rounds = sum(map(len, rows.values())) / sum(map(len, some.values())) * (1 + len(job.before))
    return trainer.args.max_steps * min(times) + rounds * seconds
