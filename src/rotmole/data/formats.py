"""From a row to an Example: one function per format of the run file."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

from rotmole.config.schema import TaskSection
from rotmole.data.chat import Answer, ChatTemplate
from rotmole.data.examples import Example
from rotmole.data.messages import Message, check_tools, normalised, tools
from rotmole.data.sources import Row, check_columns, row_error, snippet
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
_REASONING = ("reasoning_content", "thinking", "reasoning")  # fields that templates write too
SCORE_WORDS = ("0", "1", "2", "3", "4", "5")


def render(
    name: str,
    task: TaskSection,
    rows: Sequence[Row],
    tokenizer: Any = None,
    *,
    date: str | None = None,
) -> list[Example]:
    """Return the examples of one task.

    Args:
        tokenizer: format messages needs it, because its chat template renders the text.
        date: ISO date that a chat template sees as today's; None is today's.

    Raises:
        DataError: a row does not fit the format; names file and row.
        ModelError: the format is messages and the tokenizer has no chat template.
    """
    check_columns(list(rows), used_columns(task))
    chats = None
    if task.format == "messages":
        chats = _Chats(task, _chat_template(name, tokenizer, date))
    examples = []
    for row in rows:
        if chats is not None:
            parts = chats.parts(row)
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
                loss_on="all" if task.loss_on == "all" else "completion",
                long_rows=task.long_rows,
                origin=row.origin,
                **parts,
            )
        )
    if chats is not None:
        chats.say(name)
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


def _chat_template(name: str, tokenizer: Any, date: str | None) -> ChatTemplate:
    if tokenizer is None:
        raise DataError(
            f"task '{name}': format messages needs the model's tokenizer; pass tokenizer="
        )
    try:
        return ChatTemplate(tokenizer, date)
    except ModelError:
        raise ModelError(
            f"task '{name}': format messages needs a chat template, but the model's tokenizer has "
            "none; use an instruct model, or format prompt_completion"
        ) from None


class _Chats:
    """Renders the chats of one task, and collects what the template changes in their answers."""

    def __init__(self, task: TaskSection, template: ChatTemplate) -> None:
        self.task, self.template = task, template
        self.written: set[str] = set()  # roles whose texts the template writes
        self.changed: list[str] = []

    def parts(self, row: Row) -> dict[str, Any]:
        """Return prompt and completion, which is the last answer, and the ranges to learn."""
        messages = _checked_messages(row, self.task.messages_column)
        functions = tools(row)
        try:
            text = self.template.render(messages, functions)
            self._check_roles(row, messages, functions)
            answers = {i: self._answer(row, messages, i, functions) for i in self._learnt(messages)}
        except DataError as error:
            known = str(error).startswith(row.origin)
            raise (error if known else row_error(row, str(error))) from None
        last = answers[len(messages) - 1]
        ending = self.template.ending(text[last.stop :])
        ranges = []
        for index, answer in answers.items():
            ended = text.startswith(ending, answer.stop) and answer is not last
            ranges.append((answer.start, answer.stop + len(ending) * ended))
            self._compare(row, messages[index], text, answer)
        whole = ((last.content, last.stop),)
        by_default = self.task.loss_on == "all" or tuple(ranges) == whole
        return {
            "prompt": text[: last.content],
            "completion": text[last.content : last.stop],
            "end": self.template.own_end(ending),
            "learnt": () if by_default else tuple(ranges),
        }

    def _learnt(self, messages: list[Message]) -> list[int]:
        """Return the indices of the messages to learn; the last one is always among them."""
        last = len(messages) - 1
        if self.task.loss_on != "completion":
            return [last]
        return [i for i, m in enumerate(messages) if i == last or _is_learnt(m)]

    def _answer(
        self, row: Row, messages: list[Message], index: int, functions: list[Any] | None
    ) -> Answer:
        answer = self.template.answer(messages, index, functions)
        if answer is None:
            prompt = self.template.render(messages[:index] or messages, functions, prompt=True)
            other = (
                ""
                if self.task.loss_on == "last" or index == len(messages) - 1
                else ("loss_on: last (earlier answers are not learnt), ")
            )
            raise row_error(
                row,
                f"the chat template does not render the answer of message {index + 1} in one "
                f"piece after its generation prompt, which ends with {prompt[-40:]!r}, so what "
                f"the model has to write is not known; use {other}another chat template or "
                "format prompt_completion",
            )
        if answer.start == answer.stop:
            raise row_error(
                row,
                f"the chat template does not write the answer of message {index + 1}; use "
                "another chat template, or remove the row",
            )
        return answer

    def _check_roles(self, row: Row, messages: list[Message], functions: list[Any] | None) -> None:
        """Check once for each role, and for each row with tools, that nothing is left out."""
        if functions or any(m.get("tool_calls") for m in messages):
            check_tools(row, messages, functions, self.template.render_or_none)
        for index, message in enumerate(messages):
            role = message["role"]
            if role in ("assistant", "tool", *self.written) or not message["content"].strip():
                continue
            if self.template.drops(messages, index, functions):
                raise row_error(
                    row,
                    f"the model's chat template does not write messages of the role '{role}', so "
                    "they would be lost; remove them, or use a model whose template knows them",
                )
            self.written.add(role)

    def _compare(self, row: Row, message: Message, text: str, answer: Answer) -> None:
        if message.get("tool_calls") or any(message.get(key) for key in _REASONING):
            return
        said, written = message["content"], text[answer.content : answer.stop]
        if said not in (written, written.removeprefix(" "), text[answer.start : answer.stop]):
            self.changed.append(
                f"{snippet(repr(said))} becomes {snippet(repr(written))} ({row.origin})"
            )

    def say(self, name: str) -> None:
        """Warn once if the template changed answers."""
        if self.changed:
            warnings.warn(
                f"task '{name}': the model's chat template changes the text of "
                f"{len(self.changed)} answers, such as {self.changed[0]}; what the template "
                "writes is learnt",
                stacklevel=3,
            )


def _is_learnt(message: Message) -> bool:
    """Tell whether an earlier message is an answer with text or tool calls and without weight 0."""
    written = message["content"].strip() or message.get("tool_calls")
    return message["role"] == "assistant" and bool(written) and message.get("weight", 1) != 0


def _checked_messages(row: Row, column: str) -> list[Message]:
    messages = normalised(row, column)
    last = messages[-1]
    if last["role"] != "assistant":
        role = last["role"]
        raise row_error(row, f"the role of the last message is '{role}', it must be 'assistant'")
    if not last["content"].strip() and not last.get("tool_calls"):
        raise row_error(row, "the answer is empty, so there is nothing to learn from")
    if last.get("weight", 1) == 0:
        raise row_error(
            row, "the last answer has weight 0, so it would not be learnt; remove it or its weight"
        )
    return messages
