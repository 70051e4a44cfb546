"""The batch size that training.auto_find_batch_size came to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class BatchSizeCallback(TrainerCallback):
    """Report a batch size that is not the one asked for, once an update with it succeeded.

    Args:
        report: called in the first process with the size asked for and the size that fits.
    """

    def __init__(self, report: Callable[[int, int], None]) -> None:
        self.report = report
        self.known: int | None = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report what has changed."""
        if not args.auto_find_batch_size or not state.is_world_process_zero:
            return
        asked, size = args.per_device_train_batch_size, state.train_batch_size
        if size not in (None, self.known or asked):
            self.report(asked, size)
            self.known = size
