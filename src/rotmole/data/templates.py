"""Templates: {column} in a prompt or answer is replaced by the row's value."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rotmole.data.sources import Row, row_error

# A field is a word in braces; any other brace is text, so JSON examples can stand in a prompt.
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

    Values are inserted as they are and never read as templates. Numbers are written as Python
    writes them. A list becomes "a, b, c"; the choices of a multiple-choice row come through
    `extra`, lettered.

    Args:
        template: text with {column} fields.
        row: the row; its columns have been checked.
        extra: fields that are not columns, such as the lettered choices.
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
        raise row_error(row, f"column '{name}' is an object and cannot stand in a template")
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value)
    return str(value)


def lettered(choices: Sequence[str]) -> str:
    """Return one choice a line, lettered.

    >>> print(lettered(["bank", "library"]))
    A. bank
    B. library
    """
    return "\n".join(f"{letter_of(i)}. {choice}" for i, choice in enumerate(choices))


def letter_of(index: int) -> str:
    """Return A, B, ..., Z for 0, 1, ..., 25, then the number itself counted from 1."""
    return LETTERS[index] if index < len(LETTERS) else str(index + 1)


def move_spaces(prompt: str, completion: str) -> tuple[str, str]:
    """Move spaces at the end of the prompt to the start of the completion.

    Byte-pair tokenizers join a space with the word after it; a prompt that ends in a space would
    end in a token that never stands there in the whole text.

    >>> move_spaces("Answer: ", "yes")
    ('Answer:', ' yes')
    """
    kept = prompt.rstrip(" ")
    return kept, prompt[len(kept) :] + completion


def join_choice(prompt: str, choice: str) -> tuple[str, str]:
    """Put one space between a prompt and a label word where the prompt ends without one.

    >>> join_choice("Sentiment:", "good")
    ('Sentiment:', ' good')
    """
    if prompt and not prompt[-1].isspace() and not choice[:1].isspace():
        choice = " " + choice
    return move_spaces(prompt, choice)
