from __future__ import annotations

import json

import pytest

from rotmole.data.messages import check_tools, normalised, tools
from rotmole.data.sources import Row
from rotmole.errors import DataError

HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CALL = {"function": {"name": "weather", "arguments": {"city": "Rom"}}, "type": "function"}


def read(value: object, column: str = "messages", **more: object) -> list[dict]:
    return normalised(Row("x.jsonl", 4, {column: value, **more}), column)


def said(value: object, **more: object) -> str:
    with pytest.raises(DataError) as caught:
        read(value, **more)
    assert str(caught.value).startswith("x.jsonl: row 4: ")
    return str(caught.value)


def test_openai_messages_are_unchanged_with_all_their_keys():
    extra = [{"role": "user", "content": "Hi", "name": "Ada"}, {**HI[1], "reasoning_content": "r"}]
    assert read(HI) == HI
    assert read(extra) == extra


@pytest.mark.parametrize(
    "value",
    [
        [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
        [{"role": "Human", "content": "Hi"}, {"role": "bot", "content": "Hello"}],
        [{"from": "user", "content": "Hi", "value": None}, {"role": "assistant", "value": "Hello"}],
        [{**HI[0], "content": [{"type": "text", "text": "H"}, "i"]}, HI[1]],
        [{**m, "tool_calls": None, "tool_call_id": None} for m in HI],  # as parquet has them
        json.dumps(HI),  # as csv has it
        {"messages": HI},
    ],
)
def test_other_ways_to_write_a_conversation_mean_the_same(value):
    assert read(value) == HI


def test_share_gpt_with_system_and_tools():
    found = read(
        [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rom"}}'},
            {"from": "observation", "value": "sun"},
            {"from": "gpt", "value": "Sun."},
        ],
        "conversations",
        system="Be short.",
    )
    assert found == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "sun"},
        {"role": "assistant", "content": "Sun."},
    ]
    # with OpenAI's keys a column `system` is a column like any other
    assert read(HI, system="x") == HI


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"id": None, "function": {"name": "weather", "arguments": '{"city": "Rom"}'}},
        {"name": "weather", "arguments": {"city": "Rom", "unit": None}},
    ],
)
def test_tool_calls_have_one_form(call):
    found = read([HI[0], {"role": "assistant", "content": None, "tool_calls": [call]}])
    assert found[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("Hi", "must be a list of messages"),
        ([], "must be a list of messages"),
        ("[{broken", "must be a list of messages"),
        (["Hi"], "message 1 of column 'messages' is Hi, it must be an object"),
        ([{"speaker": "a", "text": "b"}], "its keys are: speaker, text"),
        ([{"role": "user"}], "message 1 of column 'messages' has no content"),
        ([{"from": "robot", "value": "x"}], "has the role 'robot', it must be one of"),
        ([{"role": "asistant", "content": "x"}], "did you mean 'assistant'"),
        ([{"role": "user", "content": 5}], "which is a number; it must be text"),
        ([{"role": "user", "content": "a", "value": "b"}], "both content and value"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "has a part of type 'image_url'",
        ),
        ([{"role": "assistant", "tool_calls": "x"}], "tool_calls x, which must be a list"),
        ([{"role": "assistant", "tool_calls": [{"id": "1"}]}], "without a function's name"),
        (
            [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "x=1"}]}],
            "calls f with the arguments x=1",
        ),
        ([{"from": "function_call", "value": "f(1)"}], "must hold JSON with name and arguments"),
    ],
)
def test_what_is_no_conversation_is_one_sentence(value, words):
    assert words in said(value)


def test_two_system_messages_are_refused():
    value = [{"from": "system", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert "both a system message" in said(value, system="c")


def test_tools_are_read_from_their_column():
    tool = {"type": "function", "function": {"name": "weather"}}
    assert tools(Row("x", 1, {"tools": json.dumps([tool])})) == [tool]
    assert tools(Row("x", 1, {"tools": [{**tool, "strict": None}]})) == [tool]
    assert tools(Row("x", 1, {"tools": ""})) is None
    assert tools(Row("x", 1, {})) is None
    with pytest.raises(DataError, match="column 'tools' must be a list of objects"):
        tools(Row("x", 1, {"tools": "weather"}))


@pytest.mark.parametrize(
    ("knows", "lost"),
    [
        ("crt", None),
        ("cr", "the tools of column 'tools'"),
        ("ct", "tool results (role tool)"),
        ("rt", "tool calls (tool_calls)"),
    ],
)
def test_a_template_that_ignores_tools_is_refused(knows, lost):
    """One of c, r, t: a template that writes calls, results, tools."""

    def render(messages, functions):
        text = str(functions) if "t" in knows else ""
        for message in messages:
            text += str(message.get("tool_calls")) if "c" in knows else ""
            text += message["content"] if message["role"] != "tool" or "r" in knows else ""
        return text

    row = Row("x.jsonl", 4, {})
    conversation = [
        HI[0],
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "sun"},
        HI[1],
    ]
    functions = [{"name": "weather"}]
    if lost is None:
        check_tools(row, conversation, functions, render)
    else:
        with pytest.raises(DataError) as caught:
            check_tools(row, conversation, functions, render)
        assert f"does not write {lost}" in str(caught.value)
    check_tools(row, HI, None, lambda *_: pytest.fail("nothing to compare"))
