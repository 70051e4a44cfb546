"""What an evaluation leaves: eval.json with the figures, predictions.jsonl with every answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rotmole.config.schema import RunFile
from rotmole.config.training import chooses_by_validation
from rotmole.evaluation.report import Report, prediction_rows, to_json
from rotmole.files import atomic_write_text, check_writable

RESULT, PREDICTIONS = "eval.json", "predictions.jsonl"


def origin(
    run: RunFile | None, adapter: Path | None, name: str, note: str | None
) -> dict[str, Any]:
    """Say what was evaluated.

    Args:
        run: its run file, None if there is only an adapter.
        adapter: folder of the adapter; None is the base model alone.
        name: of the base model.
        note: that belongs beside every figure of the base model.
    """
    packages = ("rotmole", "torch", "transformers", "peft")
    return {
        "model": name,
        "note": note,
        "adapter": str(adapter) if adapter else None,
        "chosen_on_these_rows": is_chosen_here(run, adapter),
        "versions": {package: version(package) for package in packages},
    }


def is_chosen_here(run: RunFile | None, adapter: Path | None) -> bool:
    """Tell whether the split that is scored has chosen the checkpoint that is scored."""
    if run is None or adapter is None or run.evaluation.split != "validation":
        return False
    return chooses_by_validation(run)


def as_text(report: Report, facts: Mapping[str, Any]) -> str:
    """Return the content of eval.json.

    Args:
        report: the figures.
        facts: from `origin`.
    """
    content = {**facts, **to_json(report)}
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_files(report: Report, facts: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write both files, eval.json last.

    Args:
        report: the figures.
        facts: from `origin`.
        folder: is made if it is missing.

    Raises:
        StorageError: they cannot be written.
    """
    check_writable(folder, RESULT, PREDICTIONS)
    lines = (
        json.dumps(row, ensure_ascii=False, allow_nan=False) for row in prediction_rows(report)
    )
    return [
        atomic_write_text(folder / PREDICTIONS, "".join(f"{line}\n" for line in lines)),
        atomic_write_text(folder / RESULT, as_text(report, facts)),
    ]
