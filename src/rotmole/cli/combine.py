"""``rotmole combine``: trained adapters as the experts of one mixture, whose gates are trained."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rotmole.cli.train import train_run
from rotmole.config.load import load_run
from rotmole.config.paths import anchor_paths
from rotmole.config.yaml_text import parse_yaml, write_yaml
from rotmole.data import data_problems
from rotmole.errors import AdapterError, ConfigError
from rotmole.models.builtin import built_in_for
from rotmole.models.preview import adapter_problems
from rotmole.training.folder.layout import MANIFEST
from rotmole.tuner.loras import read_loras

TAKEN = ("model", "data", "evaluation", "seed")
"""Sections of the run file given as data; what it says of adapter and training is for another."""

DEFAULTS: dict[str, Any] = {
    "adapter": {"selection": "dense", "rotation": "none"},
    "experts_from": {"trainable": "all"},
    "training": {"max_steps": 90, "learning_rate": 5e-4, "warmup_steps": 10},
    "optimizer": {"scaling_gate_lr": 5e-3},
}
"""Settings of a combination; docs/combine.md has the comparison that they come from."""


def combine(
    words: Sequence[str],
    data: Path,
    output: Path,
    names: str | None = None,
    rows: int | None = None,
    *,
    trust_remote_code: bool = False,
) -> int:
    """Make a run whose experts are trained adapters, and train it.

    Args:
        words: the adapters, then key=value settings of the run file.
        data: run file or run folder whose sections `TAKEN` are used.
        output: the run folder.
        names: of the experts, separated by commas.
        rows: the most training rows of each task (and group, as data.tasks.NAME.limit).

    Returns:
        As of `rotmole train`.

    Raises:
        ConfigError: holding one sentence for each wrong setting and adapter.
    """
    paths = [word for word in words if "=" not in word or Path(word).exists()]
    overrides = [word for word in words if word not in paths]
    if len(paths) < 2:
        raise ConfigError(
            f"{len(paths)} adapter{' is' if len(paths) == 1 else 's are'} named; name at least "
            "two: folders, or ids on the hub"
        )
    content = {**copy.deepcopy(DEFAULTS), **_sections(data), "output_dir": str(output)}
    content["experts_from"]["paths"] = paths
    if names is not None:
        content["experts_from"]["names"] = [name.strip() for name in names.split(",")]
    if "model" not in content:
        content["model"] = {"name": _base_of(paths)}
    if rows is not None:
        _limit(content["data"], rows)
    fits = partial(adapter_problems, trust_remote_code=trust_remote_code)
    run = load_run(
        data, overrides, write_yaml(content),
        data_problems=data_problems, model_problems=fits, anchored=False,
    )  # fmt: skip
    return train_run(
        run, [str(Path(run.output_dir) / "run.yaml")], trust_remote_code=trust_remote_code
    )


def _sections(data: Path) -> dict[str, Any]:
    """Read the sections of a run file that say what a combination is trained on."""
    file = data / "run.yaml" if data.is_dir() else data
    try:
        content = parse_yaml(file.read_text(encoding="utf-8-sig"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--data {data}: cannot be read ({error}); give a run file") from None
    if not isinstance(content, dict) or not isinstance(content.get("data"), dict):
        raise ConfigError(f"--data {data}: it has no section data; give a run file with tasks")
    sections = {name: content[name] for name in TAKEN if name in content}
    if not (file.parent / MANIFEST).is_file():  # the run.yaml of a run folder is anchored
        anchor_paths(sections, file.parent)
    return sections


def _base_of(paths: Sequence[str]) -> str:
    """Return the base model that all adapters name."""
    bases = {lora.path: lora.config.get("base_model_name_or_path") for lora in read_loras(paths)}
    if len(set(bases.values())) > 1:
        named = ", ".join(f"{path}: {base}" for path, base in bases.items())
        raise AdapterError(
            f"the adapters name different base models ({named}); write model.name in the file of "
            "--data"
        )
    base = next(iter(bases.values()))
    if not base:
        raise AdapterError(
            "the adapters do not name their base model; write model.name in the file of --data"
        )
    return built_in_for(str(base))


def _limit(data: dict[str, Any], rows: int) -> None:
    """Set the most training rows of each task; a smaller limit stays."""
    tasks = data.get("tasks")
    for task in tasks.values() if isinstance(tasks, dict) else ():
        if isinstance(task, dict):
            limit = task.get("limit")
            limit = dict(limit) if isinstance(limit, dict) else {}
            given = limit.get("train")
            task["limit"] = limit | {"train": min(rows, given) if isinstance(given, int) else rows}
