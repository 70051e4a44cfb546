"""Ctrl-C and SIGTERM: finish the update, save a checkpoint, stop."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rotmole.processes import highest
from rotmole.training.validation import ValidationCut

AGAIN_AFTER = 1.0  # seconds; a launcher repeats a Ctrl-C at once, a person takes longer


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
