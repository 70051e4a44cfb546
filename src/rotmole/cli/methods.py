"""``rotmole methods``: the presets side by side, with what each would train and cost in a model."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rotmole.config.load import load_run
from rotmole.config.schema import ModelSection
from rotmole.errors import ConfigError
from rotmole.evaluation.render import plain_text, rich_table
from rotmole.models.preview import flops_per_token, matched, preview, trainable_by_role
from rotmole.tuner.config import RotMoleConfig
from rotmole.tuner.settings.presets import PRESETS, preset_fields

SHARED = ("r", "rank_pattern", "target_modules", "exclude_modules", "layers_to_transform",
          "layers_pattern")  # fmt: skip
"""Settings of a run that every method is counted with; what a preset sets itself stays."""

HEADER = ["method", "trained", "experts", "gates", "MFLOPs/token", "modules", "arXiv", "what it is"]


def methods(path: Path | None, overrides: Sequence[str], name: str | None, as_json: bool) -> int:
    """Print one line for each preset: trained parameters and what it adds to a forward pass.

    Args:
        path: a run file; its model, modules and rank are used, and its own adapter comes first.
        name: a model as in the run file's model.name, where there is no run file.

    Raises:
        ConfigError: wrong settings.
        ModelError: the model's configuration cannot be read.
    """
    if path is not None and name is not None:
        raise ConfigError(
            "give a run file or --model, not both; model.name=NAME changes the file's"
        )
    found = []
    if path is not None:
        run = load_run(path, overrides)
        section, adapter = run.model, run.adapter
        found.append(_row("this run", section, lambda: run.adapter_config) | {"about": str(path)})
    else:
        section, adapter = ModelSection(**({"name": name} if name else {})), {}
    shared = {"target_modules": "all-linear"} | {k: adapter[k] for k in SHARED if k in adapter}
    for preset, entry in PRESETS.items():
        fields = {"task_type": "CAUSAL_LM"} | shared | preset_fields(preset, {})
        row = _row(preset, section, partial(RotMoleConfig, **fields))
        found.append(row | {"arxiv": entry.paper, "about": entry.about})
    if as_json:
        print(json.dumps({"model": section.name, "methods": found}, indent=2))
    else:
        _print_table(section.name, found)
    return 0


def _row(name: str, section: ModelSection, make: Callable[[], RotMoleConfig]) -> dict[str, Any]:
    """Count one method; one that does not fit the model says why in place of its figures."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the file's were shown; a preset's do not matter here
            config = make()
        model = preview(section, config, torch.float32).eval()
    except ValueError as error:  # PEFT's and ours
        return {"method": name, "problem": " ".join(str(error).split())}
    roles = trainable_by_role(model)
    return {
        "method": name,
        "trainable": sum(roles.values()),
        "experts": roles["expert"] + roles["other"],
        "gates": roles["scaling_gate"] + roles["rotation_gate"],
        "flops_per_token": flops_per_token(model),
        "modules": sum(matched(model).values()),
        "rank": model.peft_config["default"].r,
    }


def _print_table(model: str, found: Sequence[Mapping[str, Any]]) -> None:
    lines = [list(HEADER)]
    for row in found:
        figures = ["-"] * 5
        if "problem" not in row:
            millions = f"{row['flops_per_token'] / 1e6:.2f}"
            counts = [f"{row[key]:,}" for key in ("trainable", "experts", "gates")]
            figures = [*counts, millions, str(row["modules"])]
        lines.append([row["method"], *figures, row.get("arxiv", ""), row["about"]])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numbers = range(1, 6)
    for line in lines:
        line[1:6] = [line[column].rjust(widths[column]) for column in numbers]
    print(f"model       {model}")
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(rich_table(lines))
    else:
        print(plain_text(lines))
    for row in found:
        if "problem" in row:
            print(f"{row['method']} does not fit this model: {row['problem']}")
    print("gates included; MFLOPs are what the adapter adds to a token's forward pass")
    print("use one: adapter: {preset: NAME} in a run file, or RotMoleConfig.preset(NAME)")
