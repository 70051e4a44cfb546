"""From a row to an Example: one function per format of the run file."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from rotmole.config.schema import TaskSection
from rotmole.data.chat import Answer, ChatTemplate
from rotmole.data.examples import Example
from rotmole.data.labels import answer_indices, choices_of, label_index, score_of
from rotmole.data.messages import Message, check_tools, normalised, tools
from rotmole.data.sources import Row, column_faults, row_error, snippet, together
from rotmole.data.templates import (
    fields,
    fill,
    join_choice,
    letter_of,
    lettered,
    move_spaces,
    template_problem,
)
from rotmole.errors import DataError, ModelError

DEFAULT_COMPLETION = "{completion}"
CHOICE_FIELDS = ("choice", "letter")  # of the completion template, in formats with choices
_REASONING = ("reasoning_content", "thinking", "reasoning")  # fields that templates write too
HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair
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
    columns = dict.fromkeys(column for row in rows for column in row.columns)
    _check_templates(name, task, rows, columns)
    used = used_columns(task, columns)
    faults = column_faults(rows, used)
    answers = _answers(task, rows, faults)
    prompted = task.format not in ("messages", "text")
    asked = fields(task.prompt, columns) if prompted else []
    chats = None
    if task.format == "messages":
        chats = _Chats(task, _chat_template(name, tokenizer, date))
    examples = []
    for index, row in enumerate(rows):
        if index in faults:
            continue
        try:
            if chats is not None:
                parts = chats.parts(row)
            elif task.format == "text":
                parts = {"prompt": "", "completion": _string(row, task.text_column)}
            elif task.format == "prompt_completion":
                prompt, completion = move_spaces(fill(task.prompt, row), fill(task.completion, row))
                parts = {"prompt": prompt, "completion": completion}
            else:
                parts = _with_choices(task, row, answers.get(index, 0))
            _check_filled(row, asked, str(parts["prompt"]), str(parts["completion"]))
        except DataError as error:
            faults[index] = error
            continue
        examples.append(_example(name, task, row, parts))
    if faults:
        raise together([faults[index] for index in sorted(faults)])
    if chats is not None:
        chats.say(name)
    return examples


def _example(name: str, task: TaskSection, row: Row, parts: Mapping[str, Any]) -> Example:
    """Return the example of a row whose format gave its parts, prompt and completion among them."""
    return Example(
        task=name,
        group=str(row.columns[task.group_column]) if task.group_column else "",
        id=str(row.columns.get("id", row.number)),
        loss_on="all" if task.loss_on == "all" else "completion",
        long_rows=task.long_rows,
        origin=row.origin,
        **parts,
    )


def _check_templates(
    name: str, task: TaskSection, rows: Sequence[Row], columns: Collection[str]
) -> None:
    """Check the braces of prompt and completion against the columns that the rows have."""
    if task.format in ("messages", "text") or not rows:
        return
    with_choices = task.format != "prompt_completion"
    templates = {"prompt": (task.prompt, columns)}
    if with_choices:
        templates["completion"] = (choice_template(task), [*columns, *CHOICE_FIELDS])
    else:
        templates["completion"] = (task.completion, columns)
    problems = []
    for setting, (template, names) in templates.items():
        problem = template_problem(template, names)
        same = with_choices and not set(CHOICE_FIELDS) & set(fields(template, names))
        if setting == "completion" and same and not problem:
            problem = "it has neither {choice} nor {letter}, so all answers would be the same"
        if setting == "prompt" and not template.strip():
            problem = "it is empty; use format: text for rows without a prompt"
        if problem:
            where = f"data.tasks.{name}.{setting}"
            problems.append(DataError(f"{where}: {snippet(template)!r}: {problem}", source=where))
    if problems:
        raise together(problems)


def _answers(
    task: TaskSection, rows: Sequence[Row], faults: dict[int, DataError]
) -> dict[int, int]:
    """Return the answer's index of each row of multiple_choice; adds faults to `faults`."""
    choices = {}
    if task.format == "multiple_choice":
        for index, row in enumerate(rows):
            try:
                if index not in faults:
                    choices[index] = choices_of(row, task.choices_column)
            except DataError as error:
                faults[index] = error
    indices, wrong = answer_indices(
        [rows[index] for index in choices], task.answer_column, list(choices.values())
    )
    places = list(choices)
    faults |= {places[number]: error for number, error in wrong.items()}
    return dict(zip(places, indices, strict=True))


def _check_filled(row: Row, asked: Sequence[str], prompt: str, completion: str) -> None:
    """Check that there is an answer, and that the prompt's columns are not all empty."""
    if not completion.strip():
        raise row_error(row, "the answer is empty, so there is nothing to learn from")
    if asked and all(isinstance(v := row.columns[c], str) and not v.strip() for c in asked):
        plural = "s" * (len(asked) > 1)
        raise row_error(
            row, f"nothing is in the prompt's column{plural} {', '.join(map(repr, asked))}"
        )
    text = prompt + completion
    if not text.isascii() and (half := HALF.search(text)):
        raise row_error(row, f"the text has half a character, {half[0]!r}; remove it")


def used_columns(task: TaskSection, columns: Iterable[str] = ()) -> list[str]:
    """Return the columns that the format reads, each once.

    Args:
        columns: that the rows have; in braces, they may be more than a word.
    """
    names: list[str] = []
    if task.format == "messages":
        names.append(task.messages_column)
    elif task.format == "text":
        names.append(task.text_column)
    elif task.format == "prompt_completion":
        names += fields(task.prompt, columns) + fields(task.completion, columns)
    else:
        names += fields(task.prompt, columns)
        names += [f for f in fields(choice_template(task), columns) if f not in CHOICE_FIELDS]
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


def _with_choices(task: TaskSection, row: Row, answer: int) -> dict[str, Any]:
    """Render multiple_choice, classification and regression, which have candidate answers.

    Args:
        answer: the index of the right choice (format multiple_choice).
    """
    score = None
    if task.format == "multiple_choice":
        words = choices_of(row, task.choices_column)
    elif task.format == "classification":
        words = task.labels or []
        answer = label_index(row, task.label_column, words)
    else:
        words = task.labels or list(SCORE_WORDS)
        score = score_of(row, task.score_column, words, len(words) - 1)
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
