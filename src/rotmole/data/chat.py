"""Chats as a model's chat template writes them, and where in that text the answers are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date as Date
from datetime import datetime
from functools import cached_property
from typing import Any

from rotmole.errors import DataError, InputError, ModelError

Messages = Sequence[Mapping[str, Any]]

_MARK = "\ue0f1\ue0f2\ue0f3"
"""Stands for one message's text in a second rendering; no case, no space, nothing to escape."""

# jinja's own function tells the time of the rendering; a macro of that name comes before it
_DATED = (
    "{% macro strftime_now(format) %}{% set text = namespace(value=format) %}"
    "{% for code, part in rotmole_date.items() %}"
    "{% set text.value = text.value | replace(code, part) %}"
    "{% endfor %}{{ text.value }}{% endmacro %}\n"
)


def today() -> str:
    """Return the local date as ISO text, such as 2026-03-01."""
    return Date.today().isoformat()


def chat_prompt(
    tokenizer: Any,
    messages: Messages,
    *,
    system: str | None = None,
    date: str | None = None,
    tools: list[Any] | None = None,
) -> str:
    """Return a chat as the text that a model continues with its answer.

    Args:
        tokenizer: its chat template renders the text, with the generation prompt at the end.
        messages: with role and content; the last one is usually the user's.
        system: text of a system message before them.
        date: ISO date that the template sees as today's; None is today's.
        tools: descriptions of functions, for templates that write them.

    Raises:
        ModelError: the tokenizer has no chat template.
        InputError: the template refuses the chat, or does not write the system message.
    """
    template = ChatTemplate(tokenizer, date)
    chat = list(messages)
    if system is not None:
        if any(message["role"] == "system" for message in chat):
            raise InputError("the chat has a system message already; leave one of the two out")
        chat.insert(0, {"role": "system", "content": system})
        if template.drops(chat, 0):
            raise InputError(
                "the model's chat template does not write system messages; put the text into the "
                "first message of the user"
            )
    return template.render(chat, tools, prompt=True)


def turn_end(tokenizer: Any) -> str:
    """Return the text that ends an assistant's turn; "" means the tokenizer's end of sequence."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    template = ChatTemplate(tokenizer)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _MARK}]
    tail = template.render(chat).rpartition(_MARK)[2]
    return template.own_end(template.ending(tail))


@dataclass(frozen=True)
class Answer:
    """Where one assistant's turn is in the text of a chat, as indices of characters.

    Attributes:
        start: where the model begins to write: the end of the generation prompt.
        content: where the message's own text begins; between start and content is what the
            template writes before each answer, such as an empty think block.
        stop: the end of the answer; the text that ends the turn follows.
    """

    start: int
    content: int
    stop: int


class ChatTemplate:
    """A tokenizer's chat template on one date.

    Args:
        tokenizer: of the model.
        date: ISO date that the template sees as today's; None is today's.

    Raises:
        ModelError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, date: str | None = None) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(
                "the model's tokenizer has no chat template; use an instruct model, or prompts "
                "that are plain text"
            )
        self.tokenizer = tokenizer
        self._date = _parts_of(date or today())

    def render(
        self, messages: Messages, tools: list[Any] | None = None, *, prompt: bool = False
    ) -> str:
        """Return the text of a chat.

        Args:
            messages: with role and content.
            tools: descriptions of functions, for templates that write them.
            prompt: end with the generation prompt.

        Raises:
            DataError: the template refuses the chat; says why in the template's own words.
        """
        chat = [dict(message) for message in messages]
        options: dict[str, Any] = {"add_generation_prompt": prompt}
        try:
            template = self.tokenizer.get_chat_template(None, tools)
            if "strftime_now" in template:
                options |= {"chat_template": _DATED + template, "rotmole_date": self._date}
            text = self.tokenizer.apply_chat_template(chat, tools=tools, tokenize=False, **options)
        except Exception as error:  # a template is a program and may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"the model's chat template refuses this chat: {reason}") from error
        return str(text)

    def render_or_none(self, messages: Messages, tools: list[Any] | None = None) -> str | None:
        """Return the text of a chat, None if the template refuses it."""
        try:
            return self.render(messages, tools)
        except DataError:
            return None

    def answer(
        self, messages: Messages, index: int, tools: list[Any] | None = None
    ) -> Answer | None:
        """Find the turn of one assistant's message in the text of a chat.

        The chat is rendered a second time with another text in place of the message. What both
        renderings have in common before and after it is the template's and the other messages';
        nothing is searched for in the answer.

        Args:
            messages: the chat; message `index` is the assistant's.

        Returns:
            None if the template does not write it in one piece after its generation prompt.
        """
        whole = self.render(messages, tools)
        turn = self._located(messages, index, whole, tools)
        if turn is None and index + 1 < len(messages):
            # a template may need the tool call that the second rendering replaces
            begun = messages[: index + 1]
            text = self.render(begun, tools)
            turn = self._located(begun, index, text, tools)
            if turn is not None and not whole.startswith(text[: turn.stop]):
                return None
        return turn

    def drops(self, messages: Messages, index: int, tools: list[Any] | None = None) -> bool:
        """Tell whether the template leaves out the text of one message."""
        text = self.render_or_none(_marked(messages, index, whole=False), tools)
        return text is not None and _MARK not in text

    def ending(self, tail: str) -> str:
        """Return what ends a turn: the text after the last answer up to its first added token.

        Args:
            tail: the text after an answer, to the end of the chat.
        """
        token = self._added_tokens.search(tail)
        return tail[: token.end()] if token else tail.rstrip()

    def own_end(self, ending: str) -> str:
        """Return an ending, or "" if it is the tokenizer's end of sequence or nothing."""
        return "" if ending.strip() in ("", self.tokenizer.eos_token) else ending

    @cached_property
    def _added_tokens(self) -> re.Pattern[str]:
        names = {*self.tokenizer.get_added_vocab(), *self.tokenizer.all_special_tokens}
        longest_first = sorted(filter(None, names), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @cached_property
    def _header(self) -> str:
        """The generation prompt alone, "" if the template has none."""
        chat = [{"role": "user", "content": "Hi"}]
        try:
            without, text = self.render(chat), self.render(chat, prompt=True)
        except DataError:
            return ""
        return text.removeprefix(without) if text.startswith(without) else ""

    def _located(
        self, messages: Messages, index: int, text: str, tools: list[Any] | None
    ) -> Answer | None:
        other = self.render_or_none(_marked(messages, index, whole=True), tools)
        if other is None or other.count(_MARK) != 1:
            return None
        before, after = other.split(_MARK)
        stop = len(text) - len(after)
        start = self._start(messages[:index], before, text, tools)
        if start is None or start > stop or not text.endswith(after):
            return None
        plain = text.startswith(before) and start <= len(before) <= stop
        # spaces belong to the answer's first token
        own = plain and bool(text[start : len(before)].strip())
        return Answer(start, len(before) if own else start, stop)

    def _start(
        self, history: Messages, before: str, text: str, tools: list[Any] | None
    ) -> int | None:
        """Return where the model begins to write: after the generation prompt."""
        prompt = self._prompt(history, tools)
        if prompt and text.startswith(prompt):
            return len(prompt)
        # earlier turns may be written differently in a chat that goes on
        if self._header and before.endswith(self._header) and text.startswith(before):
            return len(before)
        return None

    def _prompt(self, history: Messages, tools: list[Any] | None) -> str | None:
        try:
            return self.render(history, tools, prompt=True) if history else None
        except DataError:
            return None


def _marked(messages: Messages, index: int, *, whole: bool) -> list[Mapping[str, Any]]:
    """Return the chat with a mark as the text of one message; whole leaves its role alone."""
    kept = {"role": messages[index]["role"]} if whole else messages[index]
    return [*messages[:index], {**kept, "content": _MARK}, *messages[index + 1 :]]


def _parts_of(date: str) -> dict[str, str]:
    """Return what strftime writes for each directive on a date, at midnight."""
    moment = datetime.fromisoformat(date)
    parts = {f"%{code}": moment.strftime(f"%{code}") for code in "aAbBcdfGHIjmMpSuUVwWxXyYzZ"}
    bare = {f"%-{code}": str(int(parts[f"%{code}"])) for code in "dHIjmMSy"}
    return {**bare, **parts, "%%": "%"}
