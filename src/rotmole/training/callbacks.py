"""What happens beside a training step: balance scale, metric lines, progress, stops.

Each callback is an ordinary transformers TrainerCallback and works with any Trainer;
`BalanceCallback` is the one that plain Trainer users need when they accumulate gradients.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rotmole.models.files import atomic_write_text, storage_errors
from rotmole.training.ranks import highest
from rotmole.training.validation import ValidationCut
from rotmole.tuner.balance import balance_states
from rotmole.tuner.loss_free import update_router_bias

TIMING_SUFFIXES = ("_runtime", "_per_second", "peak_memory_bytes")
"""Ends of the metric names that differ between two runs of one command; all others are equal."""


AGAIN_AFTER = 1.0  # seconds; a launcher repeats a Ctrl-C at once, a person takes longer


def micro_batches(args: TrainingArguments, state: TrainerState, dataloader: Any) -> int:
    """Count the micro-batches of the update about to begin; an epoch's last one may be shorter.

    Args:
        args: the trainer's arguments (gradient_accumulation_steps).
        state: the trainer's state (global_step is the number of finished updates).
        dataloader: the training batches; one without a length counts as endless.

    Returns:
        Number of micro-batches, at least 1.

    Source: our choice.
    """
    accumulation = max(args.gradient_accumulation_steps, 1)
    try:
        batches = len(dataloader)
    except TypeError:
        return accumulation
    updates = max(math.ceil(batches / accumulation), 1)
    is_last = state.global_step % updates == updates - 1
    return (batches % accumulation or accumulation) if is_last else accumulation


def balance_logs(
    model: torch.nn.Module, total: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> dict[str, float]:
    """Take the mean balance losses since the last call out of a model.

    Args:
        model: a model with a RotMoLE adapter; any other has none.
        total: sums a tensor over processes; None tells of this process's tokens alone.

    Returns:
        router_aux_loss and router_z_loss, each a mean over layers and tokens, in so far as they
        were computed.

    Source: our choice.
    """
    sums: dict[str, list[float]] = {}
    for balance in balance_states(model):
        for name, value in (balance.pop(total) or {}).items():
            sums.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in sums.items()}


class BiasCallback(TrainerCallback):
    """Move the bias of loss-free balancing (router_bias_rate) after each optimiser step."""

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Move the bias, where there is one."""
        update_router_bias(kwargs["model"])


class BalanceCallback(BiasCallback):
    """Scale the balance loss to its update, loss_scale = AMP scale / micro-batches, and log it.

    For trainers of others. Micro-batches (of all processes) count alike, whatever their tokens;
    RotMoleTrainer, which sees a whole update's batches beforehand, weighs them by tokens.
    """

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Set the scale before the update's first micro-batch."""
        scale = 1.0 / micro_batches(args, state, kwargs.get("train_dataloader"))
        scaler = getattr(kwargs.get("optimizer"), "scaler", None)  # fp16 only
        if scaler is not None:
            scale *= scaler.get_scale()
        for balance in balance_states(kwargs["model"]):
            balance.managed = True
            balance.loss_scale = scale

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the balance losses to a training log; loss itself does not contain them."""
        if logs is not None and "loss" in logs:
            found = balance_logs(kwargs["model"])
            logs.update(found)
            if state.log_history:  # Trainer has put a copy of the log there already
                state.log_history[-1].update(found)


class JsonLinesCallback(TrainerCallback):
    """Append every log to a file, one JSON object a line, flushed at once.

    Args:
        path: the file (metrics.jsonl). Lines of updates that a resumed run repeats are dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the lines up to the step that training starts from."""
        if not state.is_world_process_zero:
            return
        rows = read_metrics(self.path) if state.global_step else []
        kept = [r for r in rows if r["step"] <= state.global_step and "train_loss" not in r]
        atomic_write_text(self.path, "".join(_line(row) for row in kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one line."""
        if logs is None or not state.is_world_process_zero:
            return
        line = _line({"step": state.global_step, **logs}).encode()
        with storage_errors(self.path), self.path.open("ab", buffering=0) as stream:
            start = stream.seek(0, os.SEEK_END)
            try:
                if (written := stream.write(line)) < len(line):  # the disk had room for a part
                    stream.write(line[written:])
            except OSError:
                stream.truncate(start)
                raise


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl; a line cut short by a crash is left out.

    Args:
        path: the file; a missing one has no rows.

    Returns:
        One dictionary a log, in order.

    Source: our choice.
    """
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _line(row: dict[str, Any]) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(finite) + "\n"


def _epoch_is_whole(state: TrainerState) -> bool:
    return state.epoch is not None and float(state.epoch).is_integer()


class StopOnSignal(TrainerCallback):
    """Turn Ctrl-C or SIGTERM into: finish this update, save a checkpoint, stop.

    Args:
        say: told when a signal arrives.
        cuts_validation: the trainer knows ValidationCut, so a validation ends after the batch at
            hand; other trainers' is waited for.

    Attributes:
        signum: the signal that this process got, None while it got none.
        agreed: the signal that all processes know one of them got; all go the same way by it.
    """

    def __init__(
        self, say: Callable[[str], None] | None = None, *, cuts_validation: bool = False
    ) -> None:
        self.cuts_validation = cuts_validation
        self.signum: int | None = None
        self.agreed: int | None = None
        self.asked: float | None = None
        self.say = say

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the two signals inside the block; a second Ctrl-C stops without saving."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers
            return
        previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in previous:
            signal.signal(number, self._ask)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked is not None:  # launchers and schedulers send their signal more than once
            if signum == signal.SIGINT and now - self.asked > AGAIN_AFTER:
                raise KeyboardInterrupt
            return
        self.signum, self.asked = signum, now
        if self.say is not None:
            again = "; Ctrl-C once more stops without saving" if signum == signal.SIGINT else ""
            self.say(f"saving a checkpoint after this update{again}")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Save and stop if somebody asked, in whichever process, and there is work left."""
        self._agree(args)
        if self._stops(state):
            control.should_save = not _epoch_is_whole(state)  # else at its end, below
            control.should_training_stop = True
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Keep a stop amid an epoch from being taken for its end, which may log, validate, save."""
        if self._stops(state):  # no process alone may decide here
            if _epoch_is_whole(state):
                control.should_save = True
            else:
                control.should_log = control.should_evaluate = control.should_save = False
        return control

    def _agree(self, args: TrainingArguments) -> None:
        self.agreed = highest(self.signum or 0, args.device) or None

    def _stops(self, state: TrainerState) -> bool:
        return self.agreed is not None and state.global_step < state.max_steps

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cut validation short if somebody asked, in whichever process."""
        if not self.cuts_validation:
            return
        self._agree(args)
        if self.agreed is not None:
            raise ValidationCut
