"""A3: braces that hold a column's name are that column; what else is in braces."""

from __future__ import annotations

import pytest

from rotmole.config.schema import TaskSection
from rotmole.data.formats import render
from rotmole.data.sources import Row
from rotmole.data.templates import fields, fill, template_problem
from rotmole.errors import DataError

ODD = [
    "Customer's Question", "my question", "Größe (cm)", "a.b", "a{b}", "1", "q: x", 'say "x"',
    "質問", "a,b", " padded ", "$x", "a|b", "x[0]", "a\\b",
]  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_any_column_is_a_field(name):
    row = Row("x", 1, {name: "VALUE", "b": "B"})
    assert fields(f"Q {{{name}}}\nA:", row.columns) == [name]
    assert fill(f"Q {{{name}}}\nA:", row) == "Q VALUE\nA:"
    assert template_problem(f"{{{name}}}", row.columns) is None


def test_longer_names_before_shorter_and_values_are_not_filled_again():
    row = Row("x", 1, {"a": "{b}", "b": "B", "a b": "AB"})
    assert fill("{a} {a b} {b}", row) == "{b} AB B"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ('{"a": 1} {q}', '{"a": 1} Q'),
        ('{"a": {"b": {q}}}', '{"a": {"b": Q}}'),
        ('{"a": {"b": "{q}"}}', '{"a": {"b": "Q"}}'),
        ("{{literal}} {{{q}}}", "{literal} {Q}"),
        ("{} {1} {1,2} { x; } {q}", "{} {1} {1,2} { x; } Q"),
        ("\\frac{{1}}{{2}} {q}", "\\frac{1}{2} Q"),
        ("{a: b} {x = 1} [{q}]", "{a: b} {x = 1} [Q]"),
    ],
)
def test_other_braces_are_text(template, text):
    assert template_problem(template, ["q"]) is None
    assert fill(template, Row("x", 1, {"q": "Q"})) == text


@pytest.mark.parametrize(
    ("template", "columns", "words"),
    [
        ("{my question}", ["my questions"], "did you mean 'my questions'"),
        (
            "{Customers Question}: {x}",
            ["Customer's Question", "x"],
            "did you mean \"Customer's Question",
        ),
        ("{ question } {x}", ["question", "x"], "did you mean 'question'"),
        ("{the thing} {x}", ["x"], "{the thing} is no column (the rows have: x)"),
        ("Write a poem:", ["topic"], "no column in it"),
        ("{{question}}", ["question"], "such as {question}"),
        ("$question", ["a", "question"], "such as {question}"),
        ('{"a": 1}', ["q"], "no column in it"),
    ],
)
def test_what_could_be_meant_as_a_field_is_an_error(template, columns, words):
    assert words in str(template_problem(template, columns))


def said(rows: list[dict], **section: object) -> str:
    with pytest.raises(DataError) as caught:
        render("t", TaskSection(**section), [Row("x", i, r) for i, r in enumerate(rows, start=1)])
    return str(caught.value)


def test_render_names_setting_and_template():
    row = {"my question": "a", "reply": "b"}
    text = said([row], prompt="{my qestion}", completion="{rep ly}")
    assert "data.tasks.t.prompt: '{my qestion}': {my qestion} is no column" in text
    assert "data.tasks.t.completion: '{rep ly}'" in text
    assert "no column 'answer' (the row has: my question, reply)" in said(
        [row], prompt="{my question}", completion="{answer}"
    )
    assert "it is empty; use format: text" in said([row], prompt="", completion="{reply}")
    made = render(
        "t",
        TaskSection(prompt="{my question}\nA:", completion=" {reply}"),
        [Row("x", 1, row)],
    )
    assert (made[0].prompt, made[0].completion) == ("a\nA:", " b")


def test_choices_need_a_field_of_the_choice():
    section = {"format": "classification", "labels": ["a", "b"], "prompt": "{x}"}
    text = said([{"x": "1", "label": 0}], **section, completion="{x}")
    assert "neither {choice} nor {letter}" in text


def test_an_empty_prompt_is_refused_and_an_empty_part_is_not():
    section = {"prompt": "{q} {context}", "completion": "{a}"}
    task = TaskSection(**section)
    assert render("t", task, [Row("x", 1, {"q": "Q", "context": "", "a": "A"})])
    text = said([{"q": "", "context": " ", "a": "A"}], **section)
    assert "nothing is in the prompt's columns 'q', 'context'" in text


@pytest.mark.parametrize("value", [b"\x89PNG", object(), [{"a": 1}], [b"x"], {"a": 1}])
def test_values_without_a_text_are_refused(value):
    text = said([{"q": value, "a": "A"}], prompt="{q}", completion="{a}")
    assert "which a template cannot contain" in text
