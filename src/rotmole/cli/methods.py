"""``rotmole methods``: a table of the presets with their parameters and cost in a model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig

from rotmole.config.load import load_run
from rotmole.config.schema import ModelSection
from rotmole.errors import ConfigError
from rotmole.evaluation.render import print_table
from rotmole.models.preview import flops_per_token, matched, preview, trainable_by_role
from rotmole.tuner.config import RotMoleConfig
from rotmole.tuner.settings.presets import PRESETS, preset_fields

SHARED = ("r", "rank_pattern", "target_modules", "exclude_modules", "layers_to_transform",
          "layers_pattern")  # fmt: skip
"""Settings that all methods take from the run file, unless the preset sets them."""

HEADER = ["method", "trained", "experts", "gates", "MFLOPs/token", "modules", "arXiv", "what it is"]


def methods(path: Path | None, overrides: Sequence[str], name: str | None, as_json: bool) -> int:
    """Print one line for each preset: trained parameters and what it adds to a forward pass.

    Args:
        path: a run file, whose model, modules and rank are used; its adapter is the first line.
        name: a model as in model.name of a run file, if there is no run file.

    Raises:
        ConfigError: wrong settings.
        ModelError: the model's configuration cannot be read.
    """
    if path is not None and name is not None:
        raise ConfigError(
            "give a run file or --model, not both; to change the file's model add model.name=NAME"
        )
    entries = []
    if path is not None:
        run = load_run(path, overrides)
        section, adapter = run.model, run.adapter
        entries.append(_entry("this run", section, lambda: run.adapter_config))
        entries[0]["about"] = str(path)
    else:
        section, adapter = ModelSection(**({"name": name} if name else {})), {}
    shared = {"target_modules": "all-linear"} | {k: adapter[k] for k in SHARED if k in adapter}
    for method, preset in PRESETS.items():
        fields = {"task_type": "CAUSAL_LM"} | shared | preset_fields(method, {})
        entry = _entry(method, section, partial(RotMoleConfig, **fields))
        entries.append(entry | {"arxiv": preset.paper, "about": preset.about})
    if as_json:
        print(json.dumps({"model": section.name, "methods": entries}, indent=2))
    else:
        _print_methods(section.name, entries)
    return 0


def _entry(name: str, section: ModelSection, make: Callable[[], PeftConfig]) -> dict[str, Any]:
    """Return the figures of one method, or the reason why it does not fit the model."""
    try:
        with warnings.catch_warnings():
            # load_run has shown the run file's warnings; those of a preset help nobody here
            warnings.simplefilter("ignore")
            config = make()
        model = preview(section, config, torch.float32).eval()
    except ValueError as error:  # of PEFT, or one of rotmole's InputErrors
        return {"method": name, "problem": " ".join(str(error).split())}
    roles = trainable_by_role(model)
    return {
        "method": name,
        "trainable": sum(roles.values()),
        "experts": roles["expert"] + roles["other"],
        "gates": roles["scaling_gate"] + roles["rotation_gate"],
        "flops_per_token": flops_per_token(model),
        "modules": sum(matched(model).values()),
        "rank": getattr(model.peft_config["default"], "r", None),
    }


def _print_methods(model: str, entries: Sequence[Mapping[str, Any]]) -> None:
    lines = [list(HEADER)]
    for entry in entries:
        figures = ["-"] * 5
        if "problem" not in entry:
            millions = f"{entry['flops_per_token'] / 1e6:.2f}"
            counts = [f"{entry[key]:,}" for key in ("trainable", "experts", "gates")]
            figures = [*counts, millions, str(entry["modules"])]
        lines.append([entry["method"], *figures, entry.get("arxiv", ""), entry["about"]])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numbers = range(1, 6)
    for line in lines:
        line[1:6] = [line[column].rjust(widths[column]) for column in numbers]
    print(f"model       {model}")
    print_table(lines)
    for entry in entries:
        if "problem" in entry:
            print(f"{entry['method']} does not fit this model: {entry['problem']}")
    print(
        "trained: parameters, gates included; MFLOPs/token: what a forward pass costs in addition"
    )
    print("to use one: adapter: {preset: NAME} in a run file, or RotMoleConfig.preset(NAME)")
