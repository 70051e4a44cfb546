"""How far training is: a bar below the newest figures on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import textwrap
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rotmole.recording.usage import in_words
from rotmole.units import duration, speed, task_losses

INTERVAL = 10.0
"""Seconds between two lines of a validation's progress in a file or pipe."""
_MARGIN = 18
_TOGETHER = "\N{NO-BREAK SPACE}"
"""Between the words of one figure, so that lines break between figures."""


@dataclass
class Clock:
    """What updates, validations and checkpoints take, told apart by the event that ends each.

    Attributes:
        rows_an_update, validation_rows: to estimate a validation before there was one.
    """

    rows_an_update: int = 0
    validation_rows: int = 0
    last: float = field(default_factory=time.monotonic)
    updates: deque[float] = field(default_factory=lambda: deque(maxlen=50))
    validations: deque[float] = field(default_factory=lambda: deque(maxlen=5))
    saves: deque[float] = field(default_factory=lambda: deque(maxlen=5))

    def lap(self) -> float:
        """Return the seconds since the lap before."""
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        return seconds

    def left(self, args: TrainingArguments, state: TrainerState) -> tuple[float, float] | None:
        """Estimate the seconds of training and of validation that are left; None: not yet."""
        if not self.updates:
            return None
        update = _mean(self.updates)
        training = (state.max_steps - state.global_step) * update
        training += _times(args.save_strategy, state.save_steps, state) * _mean(self.saves)
        validation = _mean(self.validations)
        if not self.validations and self.rows_an_update:  # forward alone is a third of a step
            validation = update / 3 * self.validation_rows / self.rows_an_update
        return training, _times(args.eval_strategy, state.eval_steps, state) * validation


class ProgressCallback(TrainerCallback):
    """Show progress on standard error: a bar on a terminal, plain lines elsewhere.

    A line stays for every log line and every validation. The time left has the validations in it
    that are still to come.

    Args:
        label: what the bar is called, such as the adapter's name.
    """

    def __init__(self, label: str = "training") -> None:
        self.label = label
        self.bar: Any = None
        self.jobs: dict[str, Any] = {}
        self.clock = Clock()
        self.batches = 0
        self.validation_batches = 0
        self.said = 0.0

    def plan(self, args: TrainingArguments, validation: Mapping[str, Sized], update: int) -> None:
        """Learn how large an update and a validation are.

        Args:
            args: of the trainer.
            validation: task -> its validation rows.
            update: rows of an update.
        """
        each = args.eval_batch_size * args.world_size
        self.validation_batches = sum(-(-len(rows) // each) for rows in validation.values())
        self.clock.validation_rows = sum(map(len, validation.values()))
        self.clock.rows_an_update = update

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar if somebody watches."""
        self.close()  # auto_find_batch_size begins more than once
        self.clock.lap()
        self.batches = 0
        if not state.is_world_process_zero or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress

        columns = ("{task.description}", BarColumn(None), MofNCompleteColumn())
        console = Console(stderr=True)
        if console.is_dumb_terminal:
            return
        self.bar = Progress(
            *columns, "{task.fields[note]}", console=console, transient=True, expand=True
        )
        done = {"completed": state.global_step, "note": ""}
        self.jobs["updates"] = self.bar.add_task(self.label, total=state.max_steps, **done)
        self.bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar."""
        self.clock.updates.append(self.clock.lap())
        if self.bar is not None:
            left = time_left(self.clock.left(args, state))
            self.bar.update(self.jobs["updates"], completed=state.global_step, note=left)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note what a checkpoint took."""
        self.clock.saves.append(self.clock.lap())

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show how far a validation is."""
        self.batches += 1
        if not state.is_world_process_zero:
            return
        if self.bar is not None:
            if "validation" not in self.jobs:
                total = self.validation_batches or None
                self.jobs["validation"] = self.bar.add_task("validation", total=total, note="")
            self.bar.update(self.jobs["validation"], completed=self.batches)
        elif time.monotonic() - max(self.said, self.clock.last) > INTERVAL:
            self.said = time.monotonic()
            total = f" of {self.validation_batches}" if self.validation_batches else ""
            _print(f"validation: batch {self.batches}{total}")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note what a validation took."""
        self.clock.validations.append(self.clock.lap())
        self._end_validation()

    def _end_validation(self) -> None:
        self.batches = 0
        if self.bar is not None and "validation" in self.jobs:
            self.bar.remove_task(self.jobs.pop("validation"))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print the newest figures."""
        figures = describe(logs or {})
        if not figures or not state.is_world_process_zero:
            return
        figures = [figure.replace(" ", _TOGETHER) for figure in figures]
        update = f"{state.global_step:,}/{state.max_steps:,}"
        label = f"{'validation' if 'eval_loss' in (logs or {}) else 'update':<11}{update:>6}"
        if self.bar is None:
            left = time_left(self.clock.left(args, state))
            more = [left] if left and "loss" in (logs or {}) else []
            _print("  ".join([label, *figures, *more]).replace(_TOGETHER, " "))
            return
        line = f"{label:<{_MARGIN}} " + "  ".join(figures)
        shown = textwrap.fill(
            line, max(self.bar.console.width, 40), subsequent_indent=" " * (_MARGIN + 1),
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
        self.bar.console.print(
            shown.replace(_TOGETHER, " "), markup=False, highlight=False, soft_wrap=True
        )

    def close(self) -> None:
        """Leave the terminal as it was; safe to call at any time."""
        if self.bar is not None:
            self.bar.stop()
            self.bar, self.jobs = None, {}


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def describe(logs: dict[str, Any]) -> list[str]:
    """Say a log in a few words, a figure each.

    Args:
        logs: what the trainer logged.

    Returns:
        Such as ["loss 1.2345", "774 tokens/s"]; none if nothing is worth a line.
    """
    if "eval_loss" in logs:
        words = [f"loss {logs['eval_loss']:.4f}"]
        tasks = task_losses(logs)
        if len(tasks) > 1:
            words += [f"{task} {loss:.4f}" for task, loss in tasks.items()]
        if "eval_runtime" in logs:
            words.append(f"in {duration(logs['eval_runtime'])}")
        return words
    if "loss" not in logs:
        return []
    words = [f"loss {logs['loss']:.4f}"]
    for name, text in (
        ("learning_rate", "rate {:.2e}"),
        ("grad_norm", "gradient {:.3g}"),
        ("router_aux_loss", "balance {:.3f}"),
    ):
        if logs.get(name) is not None:
            words.append(text.format(logs[name]))
    if "train_tokens_per_second" in logs:
        words.append(speed(logs["train_tokens_per_second"]))
    words += in_words({name: value for name, value in logs.items() if value is not None})
    return words


def time_left(seconds: tuple[float, float] | None) -> str:
    """Say the time left, and how much of it is validation.

    >>> time_left((600.0, 0.0)), time_left((600.0, 130.0)), time_left(None)
    ('10 min left', '12 min left (2 min 10 s validation)', '')
    """
    if seconds is None or not sum(seconds):
        return ""
    part = f" ({duration(seconds[1])} validation)" if seconds[1] >= 1 else ""
    return f"{duration(sum(seconds))} left{part}"


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def _times(strategy: Any, every: float | None, state: TrainerState) -> int:
    """Count how often something with a strategy is still to happen."""
    kind = str(getattr(strategy, "value", strategy))
    if kind == "epoch":
        return max(round(state.num_train_epochs - float(state.epoch or 0)), 0)
    if kind != "steps" or not every:
        return 0
    every, last = max(int(every), 1), state.max_steps
    if state.global_step >= last:
        return 0
    return last // every - state.global_step // every + bool(last % every)  # one at the end, too
