"""The report that training leaves when it ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rotmole.inspection.inspect import inspect_adapter
from rotmole.inspection.inspection import Inspection
from rotmole.inspection.pages.curves import curves_of
from rotmole.inspection.pages.report import write_report
from rotmole.inspection.sample import sample_of
from rotmole.training.run import TrainResult
from rotmole.tuner.config import RotMoleConfig


def report_of_run(
    result: TrainResult, *, progress: Callable[[str, int, int], None] | None = None
) -> Inspection | None:
    """Inspect the adapter of a finished run, and write inspect.json and report.html beside it.

    Args:
        result: of a run that was not interrupted.
        progress: called with (what, done, total).

    Returns:
        The inspection; None if the run asks for none (evaluation.report_tokens 0), is of another
        method, or has its weights spread over processes (FSDP).
    """
    built, folder = result.built, Path(result.run_dir)
    tokens = built.run.evaluation.report_tokens
    model: Any = built.model
    if not (tokens and isinstance(model.active_peft_config, RotMoleConfig)):
        return None
    if built.trainer.is_fsdp_enabled:
        return None
    tokenizer = built.base.tokenizer
    inspection = inspect_adapter(
        model,
        tokenizer,
        sample_of(built.run, built.examples, tokenizer, tokens),
        target=str(folder),
        curves=curves_of(folder),
        progress=progress,
    )
    inspection.write(folder)
    write_report(inspection, folder)
    return inspection
