"""metrics.jsonl: one JSON object a log line."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rotmole.files import atomic_write_text, storage_errors

TIMING_SUFFIXES = ("_runtime", "_per_second", "peak_memory_bytes", "train_seconds")


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
        earlier = [r for r in rows if r["step"] <= state.global_step and "train_loss" not in r]
        atomic_write_text(self.path, "".join(_line(row) for row in earlier))

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
