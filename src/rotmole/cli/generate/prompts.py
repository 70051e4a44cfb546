"""The prompts of `rotmole generate`: an argument, a text file, standard input, rows of jsonl."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rotmole.data.chat import chat_prompt
from rotmole.data.messages import check_tools, normalised, tools
from rotmole.data.paths import contents, file_type
from rotmole.data.readers import rows_of
from rotmole.data.sources import Row, row_error, together
from rotmole.errors import DataError, InputError


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        place: where it comes from, for messages.
        text: None if `row` holds a chat.
        row: the line of a jsonl file; without one {"prompt": text}.
        source: the row with its file and number; None without one.
    """

    place: str
    text: str | None
    row: dict[str, Any] = field(repr=False)
    source: Row | None = field(default=None, repr=False)


def read_prompts(prompt: str | None, file: Path | None, *, lines: bool = False) -> list[Prompt]:
    """Return the prompt, else those of the file, else those of standard input.

    A file whose name ends in .jsonl (or .jsonl.gz) has one row a prompt: {"prompt": ...} or
    {"messages": [...]}. Any other file, and standard input, is one prompt without its last line
    break.

    Args:
        lines: each line of a text that is not blank is a prompt.

    Raises:
        InputError: both or none are given, the file cannot be read, or holds no prompt.
    """
    if prompt is not None and file is not None:
        raise InputError(f"give a prompt or --file {file}, not both.")
    if prompt is not None:
        if lines:
            raise InputError("--lines is for --file and standard input; leave it out.")
        return [_text("the prompt", prompt)]
    if file is not None and file_type(file) == "jsonl":
        if lines:
            raise InputError(f"{file} has one prompt a row; leave --lines out.")
        return _rows(file.expanduser())
    if file is None and sys.stdin.isatty():
        raise InputError("there is no prompt; give one, or --file PATH, or pipe text in.")
    name = "standard input" if file is None else str(file)
    text = _read(file, name)
    if lines:
        # not splitlines, which also splits at form feeds and U+2028
        numbered = enumerate(text.split("\n"), start=1)
        prompts = [_text(f"{name}: line {n}", line) for n, line in numbered if line.strip()]
    else:
        prompts = [_text(name, text.removesuffix("\n"))] if text.strip() else []
    if not prompts:
        raise InputError(f"{name} contains no prompt; write one.")
    return prompts


def _text(place: str, text: str) -> Prompt:
    return Prompt(place, text, {"prompt": text})


def _read(file: Path | None, name: str) -> str:
    try:
        if file is None:
            return sys.stdin.read()
        return file.expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is not UTF-8 text (byte {error.start}); save it as UTF-8."
        ) from None
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}.") from error


def _rows(file: Path) -> list[Prompt]:
    rows = [row for part in contents(file, "jsonl") for row in rows_of(part[1], part[0], part[2])]
    prompts: list[Prompt] = []
    faults = []
    for row in rows:
        try:
            if isinstance(row, DataError):
                raise row
            prompts.append(_of_row(row))
        except DataError as error:
            faults.append(error)
    if faults:
        raise together(faults)
    return prompts


def _of_row(row: Row) -> Prompt:
    has = [key for key in ("prompt", "messages") if row.columns.get(key) is not None]
    if len(has) != 1:
        problem = "has both 'prompt' and 'messages'" if has else "has no 'prompt' or 'messages'"
        raise row_error(row, f"the row {problem}; it needs one of them")
    text = row.columns["prompt"] if has == ["prompt"] else None
    if text is not None and (not isinstance(text, str) or not text.strip()):
        raise row_error(row, f"'prompt' is {text!r}, it must be text")
    return Prompt(row.origin, text, row.columns, row)


def in_template(
    prompt: Prompt, tokenizer: Any, *, system: str | None = None, date: str | None = None
) -> str:
    """Return a prompt as the chat template writes it, up to where the model's answer begins.

    Args:
        system: text of a system message before it.
        date: ISO date that the template sees as today's.

    Raises:
        InputError: there is no chat template, or it refuses the chat.
    """
    row = prompt.source
    if prompt.text is not None or row is None:
        chat: Sequence[Any] = [{"role": "user", "content": prompt.text}]
        return chat_prompt(tokenizer, chat, system=system, date=date)
    chat, functions = normalised(row, "messages"), tools(row)
    if chat[-1]["role"] == "assistant":
        raise row_error(
            row, "the last message is the assistant's, so it is answered already; remove it"
        )

    def render(messages: Sequence[Any], listed: list[Any] | None) -> str | None:
        return chat_prompt(tokenizer, messages, system=system, date=date, tools=listed)

    try:
        text = chat_prompt(tokenizer, chat, system=system, date=date, tools=functions)
        check_tools(row, chat, functions, render)
    except DataError as error:
        raise error if error.source else row_error(row, str(error)) from error
    return text
