"""From a row to an Example: one function per format of the run file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rotmole.config.schema import TaskSection
from rotmole.data.examples import Example
from rotmole.data.sources import Row, check_columns, row_error
from rotmole.data.templates import (
    LETTERS,
    fields,
    fill,
    join_choice,
    letter_of,
    lettered,
    move_spaces,
)
from rotmole.errors import DataError, ModelError, did_you_mean

DEFAULT_COMPLETION = "{completion}"
CHOICE_FIELDS = ("choice", "letter")  # of the completion template, in formats with choices
SCORE_WORDS = ("0", "1", "2", "3", "4", "5")


def render(
    name: str, task: TaskSection, rows: Sequence[Row], tokenizer: Any = None
) -> list[Example]:
    """Return the examples of one task.

    Args:
        tokenizer: format messages needs it, because its chat template renders the text.

    Raises:
        DataError: a row does not fit the format; names file and row.
        ModelError: the format is messages and the tokenizer has no chat template.
    """
    check_columns(list(rows), used_columns(task))
    if task.format == "messages":
        _check_chat_template(name, tokenizer)
    examples = []
    for row in rows:
        if task.format == "messages":
            parts = _messages(task, row, tokenizer)
        elif task.format == "text":
            parts = {"prompt": "", "completion": _string(row, task.text_column)}
        elif task.format == "prompt_completion":
            prompt, completion = move_spaces(fill(task.prompt, row), fill(task.completion, row))
            parts = {"prompt": prompt, "completion": completion}
        else:
            parts = _with_choices(task, row)
        if not str(parts["completion"]).strip():
            raise row_error(row, "the answer is empty, so there is nothing to learn from")
        examples.append(
            Example(
                task=name,
                group=str(row.columns[task.group_column]) if task.group_column else "",
                id=str(row.columns.get("id", row.number)),
                loss_on=task.loss_on,
                long_rows=task.long_rows,
                origin=row.origin,
                **parts,
            )
        )
    return examples


def used_columns(task: TaskSection) -> list[str]:
    """Return the columns that the format reads, each once."""
    names: list[str] = []
    if task.format == "messages":
        names.append(task.messages_column)
    elif task.format == "text":
        names.append(task.text_column)
    elif task.format == "prompt_completion":
        names += fields(task.prompt) + fields(task.completion)
    else:
        names += fields(task.prompt)
        names += [f for f in fields(choice_template(task)) if f not in CHOICE_FIELDS]
        names += {
            "multiple_choice": [task.choices_column, task.answer_column],
            "classification": [task.label_column],
            "regression": [task.score_column],
        }[task.format]
    if task.group_column:
        names.append(task.group_column)
    return list(dict.fromkeys(names))


def choice_template(task: TaskSection) -> str:
    """Return the template of one candidate answer: {choice} unless the run file sets one."""
    return "{choice}" if task.completion == DEFAULT_COMPLETION else task.completion


def _with_choices(task: TaskSection, row: Row) -> dict[str, Any]:
    """Render multiple_choice, classification and regression, which have candidate answers."""
    score = None
    if task.format == "multiple_choice":
        words = _choices(row, task.choices_column)
        answer = index_of(row, task.answer_column, words, LETTERS)
    elif task.format == "classification":
        words = task.labels or []
        answer = index_of(row, task.label_column, words, words)
    else:
        words = task.labels or list(SCORE_WORDS)
        score = _score(row, task.score_column, len(words) - 1)
        answer = math.floor(score + 0.5)
    prompt = fill(task.prompt, row, {task.choices_column: lettered(words)})
    template = choice_template(task)
    pairs = [
        join_choice(prompt, fill(template, row, {"choice": word, "letter": letter_of(i)}))
        for i, word in enumerate(words)
    ]
    choices = tuple(completion for _, completion in pairs)
    return {
        "prompt": pairs[0][0],
        "completion": choices[answer],
        "choices": choices,
        "answer": answer,
        "score": score,
    }


def _choices(row: Row, column: str) -> list[str]:
    words = row.columns[column]
    if not isinstance(words, list) or len(words) < 2:
        raise row_error(row, f"column '{column}' must be a list of at least two choices")
    if not all(isinstance(word, str) and word.strip() for word in words):
        raise row_error(row, f"column '{column}' must be a list of texts that are not empty")
    return words


def index_of(row: Row, column: str, words: Sequence[str], names: Sequence[str]) -> int:
    """Return the index a row gives as a number, as digits, or as a name (letter or label word).

    Args:
        column: the column that gives the index, which counts from 0.
        words: the candidates.
        names: of index 0, 1, ...: letters for choices, words for labels.

    Raises:
        DataError: the value is none of these, or the index is out of range.
    """
    value = row.columns[column]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    index = -1
    if isinstance(value, int):
        index = int(value)
    elif isinstance(value, str):
        text = value.strip()
        if text in names:
            index = list(names).index(text)
        elif text.isdecimal():
            index = int(text)
    if not 0 <= index < len(words):
        hint = did_you_mean(value, names) if isinstance(value, str) and len(value) > 1 else ""
        allowed = f"0..{len(words) - 1} or one of {', '.join(list(names)[: len(words)])}"
        raise row_error(row, f"column '{column}' is {value!r}, it must be {allowed}{hint}")
    return index


def _score(row: Row, column: str, top: int) -> float:
    value = row.columns[column]
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not 0 <= score <= top:
        raise row_error(row, f"column '{column}' is {value!r}, it must be a number in 0..{top}")
    return score


def _string(row: Row, column: str) -> str:
    value = row.columns[column]
    if not isinstance(value, str):
        raise row_error(row, f"column '{column}' is {value!r}, it must be text")
    return value


def _check_chat_template(name: str, tokenizer: Any) -> None:
    if tokenizer is None:
        raise DataError(
            f"task '{name}': format messages needs the model's tokenizer; pass tokenizer="
        )
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            f"task '{name}': format messages needs a chat template, but the model's tokenizer has "
            "none; use an instruct model, or format prompt_completion"
        )


def _messages(task: TaskSection, row: Row, tokenizer: Any) -> dict[str, Any]:
    """Render a conversation; the answer is the last assistant message.

    The template's end of turn is the end of the answer. If it contains the tokenizer's EOS, `end`
    is "" and encode adds the EOS; otherwise `end` is its text.
    """
    messages = _checked_messages(row, task.messages_column)
    full = tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = tokenizer.apply_chat_template(
        messages[:-1], tokenize=False, add_generation_prompt=True
    )
    answer = messages[-1]["content"].strip()
    start = full.find(answer, len(prompt)) if full.startswith(prompt) else -1
    if start < 0:
        raise row_error(
            row,
            "the chat template does not render the last answer after the conversation before it, "
            "so prompt and answer cannot be separated; use format prompt_completion",
        )
    stop = start + len(answer)
    tail = full[stop:]
    eos = tokenizer.eos_token
    end = "" if not tail.strip() or (eos and eos in tail) else tail.rstrip()
    return {"prompt": prompt, "completion": full[len(prompt) : stop], "end": end}


def _checked_messages(row: Row, column: str) -> list[dict[str, str]]:
    messages = row.columns[column]
    if not isinstance(messages, list) or not messages:
        raise row_error(row, f"column '{column}' must be a list of messages")
    for number, message in enumerate(messages, start=1):
        if not _is_message(message):
            raise row_error(
                row,
                f"message {number} of column '{column}' is {message!r}, it must be an object with "
                "the texts 'role' and 'content'",
            )
    if messages[-1]["role"] != "assistant":
        role = messages[-1]["role"]
        raise row_error(row, f"the role of the last message is '{role}', it must be 'assistant'")
    if not messages[-1]["content"].strip():
        raise row_error(row, "the answer is empty, so there is nothing to learn from")
    return messages


def _is_message(message: object) -> bool:
    if not isinstance(message, dict):
        return False
    return all(isinstance(message.get(key), str) for key in ("role", "content"))
