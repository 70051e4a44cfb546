"""``rotmole eval --harness``: tasks of lm_eval, with and without the adapter."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rotmole.cli.screen import note
from rotmole.config.schema import EvaluationSection
from rotmole.errors import InputError, StorageError
from rotmole.evaluation.harness import Figure, check_harness, run_harness
from rotmole.evaluation.render import print_table
from rotmole.evaluation.target import find_target, load_target
from rotmole.files import atomic_write_text, check_writable

RESULT = "harness.json"


def harness(
    target: Path,
    tasks: str,
    *,
    overrides: Sequence[str] = (),
    include: Path | None = None,
    limit: int | None = None,
    output: Path | None = None,
    as_json: bool = False,
    trust_remote_code: bool = False,
) -> int:
    """Run tasks of lm_eval on a target, print the table, and write harness.json.

    Args:
        tasks: names separated by commas.
        overrides: settings of the run file, such as evaluation.batch_size=8.
        include: folder with more task files.
        limit: rows of each task.
        output: folder of the file; None means the run folder.
        as_json: print JSON instead of the table.

    Raises:
        ConfigError: lm_eval is not installed.
        InputError: there is no such task.
        StorageError: the file cannot be written; the table was printed.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise InputError("--harness names no task; write --harness TASK,TASK.")
    place = find_target(target, overrides=overrides, needs_data=False)
    folder = (place.folder if output is None else output).expanduser()
    try:
        check_writable(folder, RESULT)
    except StorageError as error:
        note(f"{error} The figures will be printed only; --output DIR writes them elsewhere.")
    manager = check_harness(names, include)
    loaded = load_target(place, say=note, trust_remote_code=trust_remote_code)
    section = EvaluationSection() if place.run is None else place.run.evaluation
    figures, _ = run_harness(
        loaded.model, loaded.tokenizer, names, manager,
        batch_size=section.batch_size, limit=limit, seed=0 if place.run is None else place.run.seed,
    )  # fmt: skip
    result = {
        "model": loaded.name,
        "adapter": str(place.adapter) if place.adapter else None,
        "limit": limit,
        "versions": {name: version(name) for name in ("rotmole", "lm_eval", "torch")},
        "results": [vars(figure) for figure in figures],
    }
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    if as_json:
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        print_table(_rows(figures))
    check_writable(folder, RESULT)
    file = atomic_write_text(folder / RESULT, text)
    if not as_json:
        print(f"written: {file}")
    return 0


def _rows(figures: Sequence[Figure]) -> list[list[str]]:
    systems = list(figures[0].values) if figures else []
    lines = [["task", "metric", *systems]]
    for figure in figures:
        cells = [_cell(figure.values[name], figure.errors[name]) for name in systems]
        lines.append([figure.task, figure.metric, *cells])
    return lines


def _cell(value: float, error: Any) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"
