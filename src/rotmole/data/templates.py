"""Templates: {column} in a prompt or answer is replaced by the row's value."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache

from rotmole.data.sources import Row, kind_of, row_error
from rotmole.errors import did_you_mean

# A field in braces: a word, even if no column has that name, or the name of a column.
WORD = re.compile(r"[^\W\d][\w.-]*")
# What looks like a column's name and not like JSON, a formula or code.
NAME = re.compile(r"[^\W\d][^\n\"`:;,=<>|\\\[\]{}$*^]{0,80}(?<!\s)")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@lru_cache(maxsize=256)
def _pattern(names: tuple[str, ...], template: str) -> re.Pattern[str]:
    """Match doubled braces, else a column's name in braces, else anything else in braces."""
    used = [name for name in names if f"{{{name}}}" in template]
    longest_first = sorted(used, key=lambda name: (-len(name), name))
    columns = "|".join(re.escape(name) for name in longest_first) or r"(?!)"
    return re.compile(rf"\{{\{{|\}}\}}|\{{(?:({columns})|([^{{}}\n]*))\}}")


def _matches(template: str, columns: Iterable[str]) -> Iterable[re.Match[str]]:
    return _pattern(tuple(columns), template).finditer(template)


def fields(template: str, columns: Iterable[str] = ()) -> list[str]:
    """Return the names a template uses, as they occur: columns, and words that are none.

    >>> fields("Q: {question} {{literal}} {Customer's wish} A:", ["Customer's wish"])
    ['question', "Customer's wish"]
    """
    names = []
    for match in _matches(template, columns):
        name = match[1] or (match[2] if match[2] and WORD.fullmatch(match[2]) else None)
        if name:
            names.append(name)
    return names


def template_problem(template: str, columns: Collection[str]) -> str | None:
    """Return what is wrong with the braces of a template, None if nothing is.

    Braces around anything that could be a column's name, or is near to one, must be a column;
    other braces, such as JSON's, are text, and so are doubled ones. There must be a column.

    Args:
        columns: of the rows.
    """
    names = list(columns)
    listed = ", ".join(names)
    for match in _matches(template, names):
        other = match[2]
        if other is None or WORD.fullmatch(other):
            continue
        hint = did_you_mean(other.strip(), names, cutoff=0.75)
        if (hint and NAME.match(other.strip())) or NAME.fullmatch(other):
            return (
                f"{match[0]} is no column (the rows have: {listed}){hint}; if it is text, write "
                f"{{{match[0]}}}"
            )
    if not fields(template, names):
        mentioned = [name for name in names if name and name in template]
        example = max(mentioned, key=len) if mentioned else (names or ["column"])[0]
        return (
            "there is no column in it, so it would be the same for every row; write the column in "
            f"braces, such as {{{example}}} (the rows have: {listed})"
        )
    return None


def fill(template: str, row: Row, extra: dict[str, str] | None = None) -> str:
    """Return the template with every {column} replaced; {{text}} stands for text in single braces.

    Values are inserted as they are: braces in them are not fields. Numbers are written as Python
    writes them; a list becomes "a, b, c". Braces without a column are text.

    Args:
        template: text with {column} fields.
        row: a row without faults in these columns.
        extra: text of fields that are not columns or are written differently, such as lettered
            choices.

    Raises:
        DataError: a column is an object or another value without a text.
    """
    extra = extra or {}
    parts, place, doubled = [], 0, 0
    for match in _matches(template, [*row.columns, *extra]):
        parts.append(template[place : match.start()])
        place = match.end()
        name = match[1]
        if name is not None:
            parts.append(extra[name] if name in extra else _text(row, name))
        elif match[0] == "{{":
            doubled += 1
            parts.append("{")
        elif match[0] == "}}" and doubled:
            doubled -= 1
            parts.append("}")
        else:  # text; also }} without {{ before it, as JSON in JSON ends
            parts.append(match[0])
    return "".join(parts) + template[place:]


def _text(row: Row, name: str) -> str:
    value = row.columns[name]
    if type(value) is str:
        return value
    items = value if isinstance(value, list | tuple) else [value]
    for item in items:
        kind = kind_of(item)
        if kind not in ("string", "number", "boolean", "date", "list"):
            what = "is an object" if kind == "object" else f"is of type {kind}"
            inside = "" if items is not value else " in a list"
            raise row_error(
                row,
                f"column '{name}' {what}{inside}, which a template cannot contain; use another "
                "column",
            )
    return ", ".join(str(item) for item in items)


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
