"""How far training is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ProgressCallback(TrainerCallback):
    """Show progress on standard error: a bar on a terminal, plain lines elsewhere.

    Args:
        label: what the bar is called, such as the adapter's name.
    """

    def __init__(self, label: str = "training") -> None:
        self.label = label
        self.bar: Any = None
        self.job: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar if somebody watches."""
        if not state.is_world_process_zero or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, "{task.fields[note]}", console=Console(stderr=True))
        self.job = self.bar.add_task(
            self.label, total=state.max_steps, completed=state.global_step, note=""
        )
        self.bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(self.job, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the newest losses."""
        note = describe(logs or {})
        if not note or not state.is_world_process_zero:
            return
        if self.bar is not None:
            self.bar.update(self.job, note=note)
        else:
            line = f"{self.label}: step {state.global_step}/{state.max_steps}  {note}"
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was; safe to call at any time."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def describe(logs: dict[str, Any]) -> str:
    """Say a log in a few words.

    Args:
        logs: what the trainer logged.

    Returns:
        Such as "loss 1.2345  774 tokens/s", "" where nothing is worth a line.
    """
    parts = []
    for name, text in (
        ("loss", "loss {:.4f}"),
        ("eval_loss", "validation loss {:.4f}"),
        ("router_aux_loss", "balance {:.3f}"),
        ("train_tokens_per_second", "{:.0f} tokens/s"),
    ):
        if name in logs and ("loss" in logs or "eval_loss" in logs):
            parts.append(text.format(logs[name]))
    return "  ".join(parts)
