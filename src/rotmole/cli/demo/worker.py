"""One process of the demo: it trains one adapter and then answers the test rows."""

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
from rotmole.inspection.of_run import report_of_run
from rotmole.inspection.pages.report import PAGE, headline
from rotmole.training.build import Built
from rotmole.training.callbacks import usage
from rotmole.training.callbacks.metrics import read_metrics
from rotmole.training.folder.layout import METRICS
from rotmole.training.run import TrainResult, train
from rotmole.tuner.experts.experts import Experts

PROBE_ANSWERS = 2  # of each task
PROBE_UPDATES = 2  # the first one is slower, because some work is done once


@dataclass(frozen=True)
class Job:
    """What one process does.

    Attributes:
        name: of the adapter in the table.
        run: the adapter's run file.
        before: what it also answers without adapter: name -> examples in the prompt.
        threads: number of threads of torch.
    """

    name: str
    run: RunFile
    before: dict[str, int]
    threads: int


@dataclass(frozen=True)
class Outcome:
    """The result of one process.

    Attributes:
        systems: name -> answers and figures.
        trainable_parameters: their number, gates included.
        seconds: wall time of training alone.
        digest: of the order of rows.
        unused: number of experts that no token of the last logged update chose, and of all.
        interrupted: the signal that stopped it, or None.
        report: the page about the adapter, and its verdict; no page, and why, if there is none.
    """

    systems: dict[str, System]
    trainable_parameters: int
    seconds: float
    digest: str
    unused: tuple[int, int]
    interrupted: int | None = None
    report: tuple[Path | None, str] = (None, "")


class SendProgress(TrainerCallback):
    """Sends the number of each update to the parent process."""

    def __init__(self, job: Job, messages: Any) -> None:
        self.job, self.messages = job, messages

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Send the number of the update."""
        update = (self.job.name, "training", state.global_step, state.max_steps)
        self.messages.put(("progress", *update))


def work(job: Job, messages: Any, may_train: Any) -> None:
    """Do the job; send ("progress" | "estimate" | "done" | "failed", name, ...) to the parent.

    Args:
        messages: queue to the parent.
        may_train: event that the parent sets when training may begin.
    """
    try:
        _silence()
        torch.set_num_threads(job.threads)
        messages.put(("done", job.name, _outcome(job, messages, may_train)))
    except RotMoleError as error:
        messages.put(("failed", job.name, str(error), error.exit_code))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:
        messages.put(("failed", job.name, traceback.format_exc(), 1))


def _silence() -> None:
    """Turn off warnings and progress bars; the parent shows progress and unused experts."""
    warnings.simplefilter("ignore")
    logging.getLogger(usage.__name__).setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _outcome(job: Job, messages: Any, may_train: Any) -> Outcome:
    digests: list[str] = []

    def prepare(built: Built) -> None:
        digests.append(_order_digest(built))
        messages.put(("estimate", job.name, _estimate(built, job), built.base.note))
        may_train.wait()

    send = SendProgress(job, messages)
    result = train(job.run, progress=False, callbacks=[send], prepare=prepare)
    trained = (result.trainable_parameters, result.seconds, digests[0], _unused(result))
    if result.interrupted is not None:
        return Outcome({}, *trained, result.interrupted)
    systems = _systems(job, result.built, messages)
    return Outcome(systems, *trained, report=_report(job, result, messages))


def _report(job: Job, result: TrainResult, messages: Any) -> tuple[Path | None, str]:
    """Write the report about the adapter; a demo without one is still a demo."""

    def send(what: str, done: int, total: int) -> None:
        messages.put(("progress", job.name, f"report: {what}", done, total))

    try:
        inspection = report_of_run(result, progress=send)
    except Exception as error:
        return None, f"there is no report, because {error} ({type(error).__name__})"
    if inspection is None:
        return None, "there is no report: evaluation.report_tokens is 0"
    return result.run_dir / PAGE, headline(inspection)


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


def _systems(job: Job, built: Built, messages: Any) -> dict[str, System]:
    """Answer the test rows with the adapter, and without it as `job.before` says."""
    section = job.run.evaluation
    rows = built.examples[section.split]

    def sender(name: str) -> Callable[[str, int, int], None]:
        return lambda what, done, total: messages.put(("progress", name, what, done, total))

    systems = {job.name: _measure(built, section, rows, sender(job.name))}
    with built.model.disable_adapter():
        for name, count in job.before.items():
            shown = section.model_copy(update={"examples_in_prompt": count})
            systems[name] = _measure(built, shown, rows, sender(name))
    return systems


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


def _estimate(built: Built, job: Job) -> float:
    """Return the job's estimated seconds, from a few updates and a few answers."""
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
    some = {task: examples[:PROBE_ANSWERS] for task, examples in rows.items()}
    seconds = _measure(built, section, some).seconds
    rounds = sum(map(len, rows.values())) / sum(map(len, some.values())) * (1 + len(job.before))
    return trainer.args.max_steps * min(times) + rounds * seconds
