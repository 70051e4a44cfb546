"""The figures of a finished run: picked from its log, and in words with their units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.filesize import decimal

USAGE = (
    "experts_unused", "experts_total", "largest_expert_share", "largest_expert_share_mean",
    "expert_share_even", "expert_share_ceiling",
)  # fmt: skip
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
        figures |= {name: row[name] for name in USAGE if name in row}
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
        most, mean, even, ceiling = (f"{100 * metrics[name]:.0f} %" for name in USAGE[2:])
        words["busiest expert"] = (
            f"{mean} of a layer's choices on average, {most} in the worst layer "
            f"(even is {even}, {ceiling} is the most there can be)"
        )
    return words


def task_losses(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the validation loss of each task in a log line.

    >>> task_losses({"eval_loss": 2.0, "eval_sums_loss": 1.0, "train_loss": 3.0})
    {'sums': 1.0}
    """
    return {
        name.removeprefix("eval_").removesuffix("_loss"): value
        for name, value in row.items()
        if name.startswith("eval_") and name.endswith("_loss") and name != "eval_loss"
    }


def speed(tokens_per_second: float) -> str:
    """Say a speed: "0.42 tokens/s", "42 tokens/s", "12,345 tokens/s".

    >>> speed(0.421), speed(41.7), speed(12345.6)
    ('0.42 tokens/s', '42 tokens/s', '12,346 tokens/s')
    """
    digits = ".2g" if tokens_per_second < 10 else ",.0f"
    return f"{tokens_per_second:{digits}} tokens/s"


def duration(seconds: float) -> str:
    """Say a time: "8 s", "12 min", "3 h 20 min".

    >>> duration(8.2), duration(95), duration(725), duration(12000)
    ('8 s', '1 min 35 s', '12 min', '3 h 20 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 600:
        return f"{whole // 60} min" + (f" {whole % 60} s" if whole % 60 else "")
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h" + (f" {minutes % 60} min" if minutes % 60 else "")
