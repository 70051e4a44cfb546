"""Conversations as data sets write them (OpenAI's keys, ShareGPT's) as one list of messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rotmole.data.sources import Row, kind_of, row_error, snippet
from rotmole.errors import did_you_mean

Message = dict[str, Any]
Render = Callable[[list[Message], list[Any] | None], str | None]

# what data sets call a role -> its name in chat templates
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
CALL = "function_call"  # ShareGPT's role of an assistant's turn that is a tool call
TEXT_PARTS = ("text", "input_text", "output_text")


def normalised(row: Row, column: str) -> list[Message]:
    """Return a row's conversation as messages with OpenAI's keys, which chat templates read.

        {"from": "human", "value": "Hi"}                       -> {"role": "user", "content": "Hi"}
        {"role": "user", "content": [{"type": "text", ...}]}   -> content is the parts' text
        "[...]", the list as JSON text, as in a csv file       -> the list

    Every message has a text `content` ("" for a tool call without text). The `arguments` of a
    tool call are an object, also if the data has them as JSON text; null fields are left out,
    because columns of parquet files cannot leave a key out. With ShareGPT's keys, the text of a
    column `system` beside the conversation is its system message.

    Args:
        column: the column of the conversation.

    Raises:
        DataError: the value is no conversation, or has parts that are not text, such as images.
    """
    conversation = _parsed(row.columns[column])
    if isinstance(conversation, dict) and isinstance(conversation.get("messages"), list):
        conversation = conversation["messages"]
    if not isinstance(conversation, list) or not conversation:
        raise row_error(row, f"column '{column}' must be a list of messages")
    messages = [
        _Reader(row, f"message {number} of column '{column}'").message(message)
        for number, message in enumerate(conversation, start=1)
    ]
    system = row.columns.get("system")
    share_gpt = any("from" in message for message in conversation)
    if share_gpt and isinstance(system, str) and system.strip() and column != "system":
        if messages[0]["role"] == "system":
            raise row_error(
                row,
                f"column 'system' and message 1 of column '{column}' are both a system message; "
                "remove one of the two",
            )
        messages.insert(0, {"role": "system", "content": system})
    return messages


def tools(row: Row) -> list[Any] | None:
    """Return the tools that the row's column `tools` lists (also as JSON text), None without them.

    Raises:
        DataError: the column is neither empty nor a list of objects.
    """
    value = row.columns.get("tools")
    if value is None or value == "":
        return None
    value = _parsed(value)
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise row_error(
            row, "column 'tools' must be a list of objects, each the description of a function"
        )
    return [_without_nulls(tool) for tool in value] or None


def check_tools(
    row: Row, messages: Sequence[Message], functions: list[Any] | None, render: Render
) -> None:
    """Check that a chat template writes the row's tools, tool calls and tool results.

    Each is changed in turn; a template that renders the same text before and after ignores it.

    Args:
        functions: of `tools`.
        render: renders messages and tools by the template.

    Raises:
        DataError: the template ignores one of them; names it.
    """
    kept = list(messages)
    whole: str | None = None
    for what, changed, listed in _changes(kept, functions):
        whole = render(kept, functions) if whole is None else whole
        if render(changed, listed) == whole:
            raise row_error(
                row,
                f"the model's chat template does not write {what}, so they would be lost; use a "
                "model whose template knows tools, or remove them",
            )


def _changes(
    messages: list[Message], functions: list[Any] | None
) -> list[tuple[str, list[Message], list[Any] | None]]:
    """Return each kind of tool use in a conversation, with the conversation without it."""
    changes: list[tuple[str, list[Message], list[Any] | None]] = []
    if any(message.get("tool_calls") for message in messages):
        without = [{**m, "tool_calls": []} if m.get("tool_calls") else m for m in messages]
        changes.append(("tool calls (tool_calls)", without, functions))
    if any(message["role"] == "tool" for message in messages):
        other = [{**m, "content": "_"} if m["role"] == "tool" else m for m in messages]
        changes.append(("tool results (role tool)", other, functions))
    if functions:
        changes.append(("the tools of column 'tools'", messages, None))
    return changes


class _Reader:
    """Reads one message; `where` names it in errors."""

    def __init__(self, row: Row, where: str) -> None:
        self.row, self.where = row, where

    def error(self, problem: str) -> Exception:
        return row_error(self.row, f"{self.where} {problem}")

    def message(self, found: object) -> Message:
        if not isinstance(found, dict):
            raise self.error(f"is {snippet(found)}, it must be an object with role and content")
        message = {key: value for key, value in found.items() if value is not None}
        role = self._one(message, ("role", "from"))
        content = message.pop("content", None)
        value = message.pop("value", None)
        if content is not None and value is not None:
            raise self.error("has both content and value; keep one")
        content = value if content is None else content
        calls = message.pop("tool_calls", None)
        if role == CALL:
            role, calls, content = "assistant", self._json(content), ""
            calls = calls if isinstance(calls, list) else [calls]
        else:
            role = self._role(role, share_gpt="from" in message)
        known: Message = {"role": role, "content": self._text(content, optional=bool(calls))}
        if calls:
            known["tool_calls"] = self._calls(calls)
        extra = {k: v for k, v in message.items() if k not in ("role", "from", *known)}
        return {**known, **extra}

    def _one(self, message: Mapping[str, Any], names: tuple[str, str]) -> str:
        values = [message[name] for name in names if name in message]
        if len(values) == 1 and isinstance(values[0], str):
            return values[0]
        keys = ", ".join(message) or "none"
        raise self.error(
            "must be an object with the texts 'role' and 'content' (or 'from' and 'value'), its "
            f"keys are: {keys}"
        )

    def _role(self, role: str, *, share_gpt: bool) -> str:
        name = ROLES.get(role.strip().lower())
        if name:
            return name
        hint = did_you_mean(role.strip().lower(), ROLES)
        if share_gpt or hint:
            listed = ", ".join(ROLES)
            raise self.error(f"has the role '{role}', it must be one of {listed}{hint}")
        return role  # of a template that knows more roles

    def _text(self, content: object, *, optional: bool) -> str:
        if isinstance(content, str):
            return content
        if content is None and optional:
            return ""
        if isinstance(content, list):
            return "".join(self._part(part) for part in content)
        if content is None:
            raise self.error("has no content; write its text, or remove the message")
        raise self.error(
            f"has the content {snippet(content)}, which is a {kind_of(content)}; it must be text "
            "or a list of text parts"
        )

    def _part(self, part: object) -> str:
        if isinstance(part, str):
            return part
        if not isinstance(part, dict):
            raise self.error(f"has a part that is neither text nor an object: {snippet(part)}")
        if part.get("type", "text") in TEXT_PARTS and isinstance(part.get("text"), str):
            return str(part["text"])
        raise self.error(
            f"has a part of type {part.get('type')!r}, but only parts of type 'text' can be "
            "trained on; remove the part or the row"
        )

    def _json(self, text: object) -> Any:
        parsed = _parsed(text)
        if isinstance(parsed, dict | list):
            return parsed
        raise self.error(f"must hold JSON with name and arguments, it holds {snippet(text)}")

    def _calls(self, calls: object) -> list[Any]:
        calls = _parsed(calls)
        if not isinstance(calls, list):
            raise self.error(f"has the tool_calls {snippet(calls)}, which must be a list")
        return [self._call(call) for call in calls]

    def _call(self, call: object) -> dict[str, Any]:
        outer = _without_nulls(call) if isinstance(call, dict) else {}
        function = outer.pop("function", None)
        if function is None:  # name and arguments without a frame, as ShareGPT has them
            function = {key: outer.pop(key) for key in ("name", "arguments") if key in outer}
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise self.error(f"has a tool call without a function's name: {snippet(call)}")
        arguments = function.get("arguments", {})
        arguments = _parsed(arguments) if arguments != "" else {}
        if not isinstance(arguments, dict):
            raise self.error(
                f"calls {function['name']} with the arguments {snippet(arguments)}, which must be "
                "an object or an object as JSON text"
            )
        return {"type": "function", **outer, "function": {**function, "arguments": arguments}}


def _parsed(value: Any) -> Any:
    """Return a list or an object that is written as JSON text; anything else as it is."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
