"""The figures of a finished run: picked from its log, and in words with their units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.filesize import decimal

from rotmole.recording.usage import FIGURES as USAGE
from rotmole.recording.usage import SHARE, shares_in_words
from rotmole.units import speed, task_losses

_FIGURES = (
    "train_loss", "train_tokens_per_second", "num_input_tokens_seen", "peak_memory_bytes",
)  # fmt: skip


def final_metrics(rows: Sequence[dict[str, Any]], step: int) -> dict[str, Any]:
    """Pick a run's figures from its log: those of the weights that are its result.

    Args:
        rows: the lines of metrics.jsonl.
        step: the update that the result's weights are of.

    Returns:
        train_loss, train_tokens_per_second, peak_memory_bytes, num_input_tokens_seen, how the
        experts were used in the last log line, and, if there was a validation by then, every eval
        loss of the last one and the step it was made at. Of two validations at one update the later
        one counts: a resume had other rows.
    """
    figures: dict[str, Any] = {}
    for row in rows:
        figures |= {name: row[name] for name in row if name in USAGE or name.startswith(SHARE)}
        if "train_loss" in row:
            figures |= {name: row[name] for name in _FIGURES if name in row}
    validated = [r for r in rows if r.get("eval_loss") is not None and r["step"] <= step]
    if validated:
        row = max(reversed(validated), key=lambda row: row["step"])
        figures |= {name: value for name, value in row.items() if name.endswith("_loss")}
        figures["eval_step"] = row["step"]
    return figures


def readable(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Say the figures of final_metrics in words, with their units.

    >>> readable({"eval_loss": 1.25, "eval_step": 5, "peak_memory_bytes": 1868603392})
    {'validation loss': '1.2500 at update 5', 'memory': '1.9 GB at most'}
    """
    words = {}
    if "train_loss" in metrics:
        words["training loss"] = f"{metrics['train_loss']:.4f}, mean of all updates"
    if "eval_loss" in metrics:
        words["validation loss"] = f"{metrics['eval_loss']:.4f} at update {metrics['eval_step']:,}"
    for task, loss in task_losses(metrics).items():
        words[f"  {task}"] = f"{loss:.4f}"
    words |= _usage(metrics)
    if "num_input_tokens_seen" in metrics:
        words["tokens"] = f"{metrics['num_input_tokens_seen']:,} trained on"
    if "train_tokens_per_second" in metrics:
        words["speed"] = speed(metrics["train_tokens_per_second"]) + ", validation left out"
    if "peak_memory_bytes" in metrics:
        words["memory"] = f"{decimal(metrics['peak_memory_bytes'])} at most"
    return words


def _usage(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Say how the experts were used, with what these figures are measured by."""
    words = {}
    if "experts_total" in metrics:
        unused, total = metrics["experts_unused"], metrics["experts_total"]
        words["experts"] = f"{unused:,} of {total:,} unused in the last logged update"
    if "largest_expert_share" in metrics:
        most, mean, even, ceiling = (f"{100 * metrics[name]:.0f} %" for name in USAGE[2:6])
        words["busiest expert"] = (
            f"{mean} of a layer's choices on average, {most} in the worst layer "
            f"(even is {even}, {ceiling} is the most there can be)"
        )
    if "rotation_angle" in metrics:
        words["rotation"] = (
            f"{metrics['rotation_angle']:.2g} rad, the mean of layers and tokens in the last "
            "logged update (a half turn, 3.14, is the most there can be)"
        )
    if shares := shares_in_words(metrics):
        words["weights"] = f"{shares} in the last logged update, the mean of layers and tokens"
    return words
