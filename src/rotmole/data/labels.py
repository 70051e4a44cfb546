"""Which candidate a row means: label words, letters, indices and scores, alike in every file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence

from rotmole.data.sources import Row, row_error
from rotmole.data.templates import LETTERS
from rotmole.errors import DataError, did_you_mean

YES = ("yes", "true", "y", "t", "1")
NO = ("no", "false", "n", "f", "0")


def texts_of(value: object) -> list[str]:
    """Return how a value may be written as text: as it is, and as a whole number.

    >>> texts_of(1.0), texts_of("1.0"), texts_of(True), texts_of(" B")
    (['1.0', '1'], ['1.0', '1'], ['true'], ['B'])
    """
    if isinstance(value, bool):
        return [str(value).lower()]
    text = str(value).strip()
    if text.lower() in ("true", "false"):
        return list(dict.fromkeys([text, text.lower()]))
    whole = re.fullmatch(r"([+-]?\d+)\.0+", text)
    return [text, whole[1]] if whole else [text]


def _named(value: object, names: Sequence[str]) -> int | None:
    """Return the place of the name that a value is, None if it is none."""
    spelled = {name.strip(): i for i, name in reversed(list(enumerate(names)))}
    for text in texts_of(value):
        if text in spelled:
            return spelled[text]
        if text in ("true", "false"):
            alike = [i for i, name in enumerate(names) if name.strip().lower() == text]
            if alike:
                return alike[0]
    return None


def _index(value: object, count: int) -> int | None:
    """Return a value that counts from 0 below `count`, None if it is no such number."""
    text = texts_of(value)[-1]
    if text in ("true", "false"):
        return int(text == "true")
    return int(text) if re.fullmatch(r"\d{1,9}", text) and int(text) < count else None


def numbered(labels: Sequence[str]) -> str:
    """Return the first label that is the index of another label, else "".

    With such labels a number is always the word, and an index would mean something else.
    """
    for place, label in enumerate(labels):
        index = _index(label, len(labels)) if label.strip()[:1].isdigit() else None
        if index is not None and index != place:
            return label
    return ""


def label_index(row: Row, column: str, labels: Sequence[str]) -> int:
    """Return the index of the label that a row gives as its word or as an index from 0.

    The word counts first, whatever its type: 1, "1" and 1.0 are all the label "1". If the labels
    are numbers in another order than 0, 1, ..., only words count.

    Raises:
        DataError: the value is no label, or could be read in two ways.
    """
    value = row.columns[column]
    place = _named(value, labels)
    if place is not None:
        return place
    index = _index(value, len(labels))
    number = numbered(labels)
    if index is not None and number:
        raise row_error(
            row,
            f"column '{column}' is {value!r}, which is none of the labels {', '.join(labels)}; as "
            f"the label '{number}' is a number, values must be labels and not indices",
        )
    if index is not None and texts_of(value)[0].lower() in ("true", "false"):
        problem = _boolean_problem(labels)
        if problem:
            raise row_error(row, f"column '{column}' is {value!r}, {problem}")
    if index is None:
        raise _neither(row, column, labels, labels)
    return index


def _boolean_problem(labels: Sequence[str]) -> str:
    if len(labels) != 2:
        return f"which is none of the {len(labels)} labels; write the label"
    if labels[0].strip().lower() in YES or labels[1].strip().lower() in NO:
        return (
            f"which would be label 1, '{labels[1]}', if true and label 0, '{labels[0]}', if false; "
            f"write labels: [{labels[1]}, {labels[0]}]"
        )
    return ""


def _neither(row: Row, column: str, words: Sequence[str], names: Sequence[str]) -> DataError:
    value = row.columns[column]
    hint = did_you_mean(value, names) if isinstance(value, str) and len(value) > 1 else ""
    allowed = f"0..{len(words) - 1} or one of {', '.join(list(names)[: len(words)])}"
    return row_error(row, f"column '{column}' is {value!r}, it must be {allowed}{hint}")


def choices_of(row: Row, column: str) -> list[str]:
    """Return the choices of a row: a list of texts, or that list as JSON text, as in a csv file.

    Raises:
        DataError: it is no such list, or has fewer than two choices.
    """
    words = row.columns[column]
    if isinstance(words, str) and words.lstrip().startswith("["):
        try:
            words = json.loads(words)
        except ValueError:
            words = None
    if not isinstance(words, list) or len(words) < 2:
        raise row_error(row, f"column '{column}' must be a list of at least two choices")
    if not all(isinstance(word, str) and word.strip() for word in words):
        raise row_error(row, f"column '{column}' must be a list of texts that are not empty")
    return words


Reading = Callable[[object, Sequence[str]], int | None]
READINGS: dict[str, Reading] = {
    "index": lambda value, words: _index(value, len(words)),
    "letter": lambda value, words: _named(value, LETTERS[: len(words)]),
    "text": _named,
}


def answer_indices(
    rows: Sequence[Row], column: str, choices: Sequence[Sequence[str]]
) -> tuple[list[int], dict[int, DataError]]:
    """Return the index of each row's answer: an index from 0, a letter, or the text of a choice.

    All rows are read in the one way that fits them all. If none does, each row must mean one
    choice in whatever way it is read.

    Args:
        choices: of each row.

    Returns:
        One index for each row (0 where it is wrong), and place -> fault of the rows that are wrong.
    """
    pairs = [(row.columns[column], words) for row, words in zip(rows, choices, strict=True)]
    meant = {name: [read(*pair) for pair in pairs] for name, read in READINGS.items()}
    fitting = {name: readings for name, readings in meant.items() if None not in readings} or meant
    indices: list[int] = []
    faults: dict[int, DataError] = {}
    for number, row in enumerate(rows):
        readings = {name: places[number] for name, places in fitting.items()}
        places = {place for place in readings.values() if place is not None}
        indices.append(min(places, default=0))
        if not places:
            faults[number] = _neither(row, column, choices[number], LETTERS)
        elif len(places) > 1:
            ways = " and ".join(
                f"choice {place} as {name}" for name, place in readings.items() if place is not None
            )
            faults[number] = row_error(
                row,
                f"column '{column}' is {row.columns[column]!r}, which could be {ways}; write "
                "letters (A, B, ...)",
            )
    return indices, faults


def score_of(row: Row, column: str, labels: Sequence[str], top: int) -> float:
    """Return the number of a regression, also given as text or as its label.

    Raises:
        DataError: it is no number from 0 to `top`.
    """
    value = row.columns[column]
    place = _named(value, labels)
    if place is not None:
        return float(place)
    try:
        score = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not 0 <= score <= top:
        hint = did_you_mean(value, labels) if isinstance(value, str) else ""
        raise row_error(
            row, f"column '{column}' is {value!r}, it must be a number in 0..{top}{hint}"
        )
    return score
