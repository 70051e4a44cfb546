"""TensorBoard under the names of metrics.jsonl."""

from __future__ import annotations

from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback


class SameNamesCallback(TensorBoardCallback):  # type: ignore[misc] # transformers ships no type
    """transformers' TensorBoardCallback without its names of its own (train/loss, eval/loss)."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one point of each figure."""
        if not state.is_world_process_zero:
            return
        if self.tb_writer is None:
            self._init_summary_writer(args)
        if self.tb_writer is not None:
            for name, value in (logs or {}).items():
                self.tb_writer.add_scalar(name, value, state.global_step)
            self.tb_writer.flush()
