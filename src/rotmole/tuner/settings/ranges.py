"""Ranges: which values a setting may have, in words and as a check, kept beside the field."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from rotmole.errors import one_of


@dataclass(frozen=True)
class Range:
    """The values that a setting may have.

    Attributes:
        words: the rule, as it follows "it must be".
        allows: whether a value keeps the rule.
        choices: the allowed words, if the setting takes one of a few.
        entries: the rule for each value of a mapping or list.
    """

    words: str
    allows: Callable[[Any], bool]
    choices: tuple[str, ...] = ()
    entries: Range | None = None

    def problems(self, name: str, value: object) -> Iterator[str]:
        """Yield one sentence if a value breaks the rule, or one for each entry that does."""
        if not self.allows(value):
            if self.choices:
                yield one_of(name, value, self.choices)
            else:
                yield f"{name} is {value!r}; it must be {self.words}"
        elif self.entries is not None:
            for key, entry in entries_of(value):
                yield from self.entries.problems(f"{name}[{key!r}]", entry)


def entries_of(pattern: object) -> Iterator[tuple[Any, Any]]:
    """Iterate over a mapping, or over a list with its indices; anything else has no entries."""
    if isinstance(pattern, dict):
        yield from pattern.items()
    elif isinstance(pattern, list):
        yield from enumerate(pattern)


def is_whole(value: object) -> bool:
    """Tell whether a value is a whole number, which true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Tell whether a value is a finite number, which true and false are not."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)  # type: ignore[arg-type] # checked the line before


def whole(least: int) -> Range:
    """Allow whole numbers of at least `least`."""
    return Range(
        f"a whole number of at least {least}", lambda value: is_whole(value) and value >= least
    )


def at_least(least: float) -> Range:
    """Allow finite numbers of at least `least`."""
    return Range(f"a number of at least {least}", lambda value: is_number(value) and value >= least)


def above(bound: float) -> Range:
    """Allow finite numbers greater than `bound`."""
    return Range(f"a number above {bound}", lambda value: is_number(value) and value > bound)


def share(*, zero: bool = False, one: bool = False) -> Range:
    """Allow numbers between 0 and 1; `zero` and `one` include the ends."""
    low, high = "of at least" if zero else "above", "at most" if one else "below"

    def allows(value: Any) -> bool:
        inside = is_number(value) and 0 <= value <= 1
        return inside and (zero or value != 0) and (one or value != 1)

    return Range(f"a number {low} 0 and {high} 1", allows)


def flag() -> Range:
    """Allow true and false."""
    return Range("true or false", lambda value: isinstance(value, bool))


def choice(names: Iterable[str]) -> Range:
    """Allow one of a few words."""
    words = tuple(names)
    return Range(
        f"one of {', '.join(words)}",
        lambda value: isinstance(value, str) and value in words,
        choices=words,
    )


def or_null(inner: Range) -> Range:
    """Allow None as well."""
    return replace(
        inner,
        words=f"{inner.words}, or null",
        allows=lambda value: value is None or inner.allows(value),
    )


def by_module(entry: Range, *, or_by_depth: bool = False) -> Range:
    """Allow a mapping from module patterns to values; with `or_by_depth` a list of values too."""
    words = f"a mapping from module patterns to values, each {entry.words}"
    kinds: tuple[type, ...] = (dict, list) if or_by_depth else (dict,)
    if or_by_depth:
        words += "; or a list of such values, one for each equal part of the model's depth"
    return Range(words, lambda value: isinstance(value, kinds), entries=entry)


def modules() -> Range:
    """Allow a list of module names, or one string."""

    def allows(value: object) -> bool:
        if isinstance(value, (list, set)):
            return all(isinstance(entry, str) for entry in value)
        return value is None or isinstance(value, str)

    return Range("a list of module names, or one string", allows)


def names() -> Range:
    """Allow a list of different names of letters, digits, `-`, `_`, `.` and `+`, or None."""

    def allows(value: object) -> bool:
        if value is None:
            return True
        return (
            isinstance(value, list)
            and all(isinstance(name, str) and re.fullmatch(r"[\w.+-]+", name) for name in value)
            and len(set(value)) == len(value)
        )

    return Range("null, or a list of different names of letters, digits and - _ . +", allows)
