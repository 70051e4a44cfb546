"""Figures in words: times, speeds, and the losses of tasks in a log line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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


def count_word(number: int) -> str:
    """Say a small number in letters, as a sentence does: "two", "ten", "12".

    >>> count_word(2), count_word(12)
    ('two', '12')
    """
    words = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    return words[number] if number < len(words) else str(number)
