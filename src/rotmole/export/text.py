"""Text that is not the user's task: a map that was fitted on the task alone goes astray on it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from rotmole.errors import DataError

HELD_OUT = 4
"""Every fourth passage is kept for judging."""
LENGTH = 128
"""Tokens of a text at most."""


def general_passages() -> list[str]:
    """Return the passages that come with the package: stories, letters, code, ten languages."""
    text = files("rotmole.export").joinpath("general.txt").read_text(encoding="utf-8")
    return _passages(text)


def read_passages(file: str | Path) -> list[str]:
    """Read a text file of passages with a blank line between them.

    Raises:
        DataError: the file cannot be read, is no UTF-8 text, or has fewer passages than can be
            divided into those to fit on and those to judge by.
    """
    try:
        passages = _passages(Path(file).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as UTF-8 text: {error}.") from error
    if len(passages) < HELD_OUT:
        raise DataError(
            f"{file} has {len(passages)} passages; at least {HELD_OUT} are needed, with a blank "
            "line between them, because every fourth one is kept for judging."
        )
    return passages


def _passages(text: str) -> list[str]:
    return [passage.strip("\n") for passage in text.split("\n\n") if passage.strip()]


def divided(passages: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the passages to fit a map on, and those to judge it by."""
    kept = list(passages[HELD_OUT - 1 :: HELD_OUT])
    return [p for i, p in enumerate(passages) if i % HELD_OUT != HELD_OUT - 1], kept


def tokenised(passages: Sequence[str], tokenizer: Any, *, longest: int = LENGTH) -> list[list[int]]:
    """Return the token ids of passages, each cut at `longest`; those of one token are left out."""
    rows = tokenizer(list(passages))["input_ids"]
    return [list(row[:longest]) for row in rows if len(row[:longest]) > 1]
