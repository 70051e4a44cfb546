"""The grid from which each method of a study gets its own best settings."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from rotmole.comparison.equal import Counter, field_of, size_in, with_size
from rotmole.comparison.study_file import MethodSection
from rotmole.config.adapter import check_adapter
from rotmole.config.peft_types import OURS

SCALE = "scale"
GATES = ("optimizer.scaling_gate_lr", "optimizer.rotation_gate_lr")
"""Rates that have no effect on a method without such gates; it is trained once for all of them."""
Trial = Mapping[str, float]
"""Full name of a setting, or SCALE -> one of its values."""


def grid_problems(
    grid: Mapping[str, Sequence[float]], methods: Mapping[str, MethodSection]
) -> list[str]:
    """Return one sentence for each mistake in a grid, and for each method that overrules it."""
    problems = []
    for key, values in grid.items():
        if key != SCALE and key.partition(".")[0] not in ("training", "optimizer", "adapter"):
            problems.append(
                f"tune.grid: {key!r} is no setting that is tuned; give training.learning_rate, "
                "optimizer.rotation_gate_lr, adapter.NAME or scale."
            )
        if len(set(values)) < len(values):
            problems.append(f"tune.grid.{key}: values appear twice.")
        for method, section in methods.items():
            place, _, name = key.partition(".")
            if key == SCALE:
                size = field_of(section.adapter)
                place, name = "adapter", (size and size.alpha) or ""
            own = getattr(section, place, {})
            if name in own:
                problems.append(
                    f"methods.{method}.{place}.{name} is {own[name]}, and tune.grid tries its own "
                    f"values of {key}; leave one of them out."
                )
    return problems


def trials(
    adapter: Mapping[str, Any], grid: Mapping[str, Sequence[float]]
) -> list[dict[str, float]]:
    """Return the combinations of a grid; what has no effect on a method's adapter is left out."""
    combinations: list[dict[str, float]] = [{}]
    for key, values in grid.items():
        if key in GATES and has_no_gates(adapter, key):
            continue
        if key == SCALE and ((size := field_of(adapter)) is None or not size.alpha):
            continue
        combinations = [trial | {key: value} for trial in combinations for value in values]
    return combinations


def has_no_gates(adapter: Mapping[str, Any], key: str) -> bool:
    """Tell whether a rate of gates has no effect on a method."""
    if adapter.get("peft_type", OURS) != OURS:
        return True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = check_adapter(adapter)[1]
    if config is None:
        return False
    name = "rotation" if key.endswith("rotation_gate_lr") else "num_experts"
    return bool(getattr(config, name) == ("none" if name == "rotation" else 1))


def in_trial(adapter: dict[str, Any], trial: Trial) -> dict[str, Any]:
    """Return a method's adapter with the settings of a trial that are the adapter's."""
    for key, value in trial.items():
        place, _, name = key.partition(".")
        if key == SCALE:
            adapter = _scaled(adapter, value)
        elif place == "adapter":
            adapter = adapter | {name: value}
    return adapter


def _scaled(adapter: dict[str, Any], scale: float) -> dict[str, Any]:
    """Return a method's settings with another alpha / rank; without an alpha they stay."""
    size, config = field_of(adapter), check_adapter(adapter)[1]
    if size is None or size.alpha is None or config is None:
        return adapter
    scaled = with_size(adapter, size, getattr(config, size.name), scale)
    if "rank_pattern" in adapter:
        scaled["alpha_pattern"] = {k: scale * rank for k, rank in adapter["rank_pattern"].items()}
    return scaled


def resized(adapter: dict[str, Any], trial: Trial, equal: str, counter: Counter) -> list[str]:
    """Say what a trial changes of the size that was made equal.

    Args:
        adapter: of the method, its size decided.
        trial: of the grid.
        equal: what is made equal, as in the study file.
        counter: of the base model.
    """
    changes = {key: value for key, value in trial.items() if key.startswith("adapter.")}
    if equal == "none" or not changes:
        return []
    size, before = (size_in(equal, each, counter) for each in (in_trial(adapter, changes), adapter))
    if size == before:
        return []
    what, changed = equal.replace("_", " "), ", ".join(f"{k} {v:g}" for k, v in changes.items())
    return [
        f"{changed} makes its {what} {size:,} in place of {before:,}, and equal: {equal} is asked "
        "for; make it a method of its own, or write equal: none."
    ]


def name_of(trial: Trial) -> str:
    """Return a trial's folder name.

    >>> name_of({"training.learning_rate": 0.002, "scale": 4.0})
    'learning_rate=0.002,scale=4'
    """
    parts = [f"{key.rpartition('.')[2]}={value:g}" for key, value in trial.items()]
    return ",".join(parts) or "as_written"


def grown(values: Sequence[float], best: float) -> float | None:
    """Return the value that a grid lacks on the side of its best; None if the best lies inside.

    The new value is as far from the edge, as a ratio, as the edge from its neighbour.

    >>> grown([0.001, 0.002, 0.004], 0.004), grown([0.001, 0.002, 0.004], 0.002)
    (0.008, None)
    """
    ordered = sorted(values)
    if len(ordered) < 2 or best not in (ordered[0], ordered[-1]):
        return None
    edge, neighbour = (ordered[0], ordered[1]) if best == ordered[0] else ordered[-1:-3:-1]
    if edge <= 0 or neighbour <= 0:
        return None
    value = edge * edge / neighbour
    return float(f"{value:.6g}") if math.isfinite(value) else None
