"""Templates: {column} in a prompt or answer is replaced by the row's value."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rotmole.data.sources import Row, row_error

# A field is a word in braces; any other brace is text, so a prompt may contain JSON.
FIELD = re.compile(r"\{\{|\}\}|\{([^\W\d][\w.-]*)\}")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def fields(template: str) -> list[str]:
    """Return the column names a template uses.

    >>> fields("Q: {question} {{literal}} A:")
    ['question']
    """
    return [match.group(1) for match in FIELD.finditer(template) if match.group(1)]


def fill(template: str, row: Row, extra: dict[str, str] | None = None) -> str:
    """Return the template with every {column} replaced; {{ and }} stand for single braces.

    Values are inserted as they are: braces in them are not fields. Numbers are written as Python
    writes them; a list becomes "a, b, c".

    Args:
        template: text with {column} fields.
        row: a row that passed `check_columns`.
        extra: text of fields that are not columns or are written differently, such as lettered
            choices.

    Raises:
        DataError: a column is an object.
    """

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if not name:
            return match.group(0)[0]
        if extra and name in extra:
            return extra[name]
        return _text(row, name)

    return FIELD.sub(value, template)


def _text(row: Row, name: str) -> str:
    value = row.columns[name]
    if isinstance(value, dict):
        raise row_error(
            row,
            f"column '{name}' is an object, which a template cannot contain; use another column",
        )
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value)
    return str(value)


def lettered(choices: Sequence[str]) -> str:
    """Return the choices one a line, each after its letter.

    >>> print(lettered(["bank", "library"]))
    A. bank
    B. library
    """
    return "\n".join(f"{letter_of(i)}. {choice}" for i, choice in enumerate(choices))


def letter_of(index: int) -> str:
    """Return A, B, ..., Z for 0, 1, ..., 25, and "27", "28", ... for 26, 27, ..."""
    return LETTERS[index] if index < len(LETTERS) else str(index + 1)


def move_spaces(prompt: str, completion: str) -> tuple[str, str]:
    """Move spaces at the end of the prompt to the start of the completion.

    Byte-pair tokenizers join a space with the word after it, so the tokens of a prompt that ends
    in a space are not the first tokens of the whole text.

    >>> move_spaces("Answer: ", "yes")
    ('Answer:', ' yes')
    """
    stripped = prompt.rstrip(" ")
    return stripped, prompt[len(stripped) :] + completion


def join_choice(prompt: str, choice: str) -> tuple[str, str]:
    """Put one space between a prompt and a choice unless there is white space already.

    >>> join_choice("Sentiment:", "good")
    ('Sentiment:', ' good')
    """
    if prompt and not prompt[-1].isspace() and not choice[:1].isspace():
        choice = " " + choice
    return move_spaces(prompt, choice)
