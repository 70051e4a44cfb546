from __future__ import annotations

import datetime
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from tests import tiny_folders
from transformers import PreTrainedTokenizerFast

from rotmole.config.schema import TaskSection
from rotmole.data import Example, chat_prompt, encode, fingerprint, learnt_messages, turn_end
from rotmole.data.chat import ChatTemplate, today
from rotmole.data.formats import render
from rotmole.data.sources import Row
from rotmole.errors import DataError, InputError, ModelError

from . import templates


@cache
def with_template(name: str) -> PreTrainedTokenizerFast:
    eos = templates.EOS.get(name, "</s>")
    made = tiny_folders.tokenizer(
        size=300, specials=templates.SPECIALS, eos_token=eos, pad_token=eos, bos_token="<s>"
    )
    made.chat_template = getattr(templates, name)
    return made


def chat(*texts: str | dict[str, Any]) -> list[dict[str, Any]]:
    """Turns of user and assistant, the user first; a whole message stands for itself."""
    roles = ("user", "assistant")
    return [
        {"role": roles[i % 2], "content": t} if isinstance(t, str) else t
        for i, t in enumerate(texts)
    ]


def rendered(name: str, messages: Any, date: str | None = None, **columns: Any) -> Example:
    settings = columns.pop("settings", {})
    task = TaskSection(source="jsonl", format="messages", **settings)
    row = Row("x.jsonl", 4, {"messages": messages, **columns})
    return render("t", task, [row], with_template(name), date=date)[0]


def learnt_texts(example: Example, name: str, max_length: int = 1000) -> list[str]:
    """The texts of the runs of learnt tokens."""
    row = encode(example, with_template(name), max_length=max_length)
    runs: list[list[int]] = [[]]
    for label in row["labels"]:
        if label == -100:
            runs.append([])
        else:
            runs[-1].append(label)
    return [with_template(name).decode(run) for run in runs if run]


THINK = "<think>\n\n</think>\n\n"
TURNS = chat("good film?", "hi", "bad film?", "hi")
# per template: what is learnt of the first and of the last answer
WRITTEN = {
    "CHATML": ("hi<|im_end|>", "hi<|im_end|>"),
    "QWEN3": ("hi<|im_end|>", f"{THINK}hi<|im_end|>"),
    "LLAMA3": ("hi<|eot_id|>", "hi<|eot_id|>"),
    "GEMMA": ("hi<end_of_turn>", "hi<end_of_turn>"),
    "MISTRAL": (" hi</s>", " hi</s>"),
    "PHI3": ("hi<|end|>", "hi<|end|>"),
    "MARKED": ("hi<|im_end|>", "hi<|im_end|>"),
    "TRANSCRIPT": ("hi", "hi</s>"),
    "HASHES": ("hi\n###", "hi\n###"),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_every_answer_is_learnt_and_nothing_else(name: str) -> None:
    tokenizer = with_template(name)
    made = rendered(name, TURNS)
    assert learnt_texts(made, name) == list(WRITTEN[name])
    assert learnt_messages(made) == 2
    assert made.completion.strip() == "hi"
    last = rendered(name, TURNS, settings={"loss_on": "last"})
    assert learnt_texts(last, name) == [WRITTEN[name][1]]
    assert (last.prompt, last.completion, last.end) == (made.prompt, made.completion, made.end)
    ids = encode(made, tokenizer, max_length=1000)["input_ids"]
    everything = rendered(name, TURNS, settings={"loss_on": "all"})
    assert encode(everything, tokenizer, max_length=1000)["labels"] == ids
    # what is trained on is what the template writes, and begins with the generation prompt
    text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    trained = tokenizer.decode(ids)
    assert text.startswith(trained.removesuffix("</s>") if name == "TRANSCRIPT" else trained)
    assert trained.startswith(chat_prompt(tokenizer, TURNS[:-1]).rstrip(" "))
    assert turn_end(tokenizer) == made.end


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("answer", ["t", "in", "a", "user", "think", "\n", "<", "assistant"])
def test_an_answer_that_is_also_the_templates_word(name: str, answer: str) -> None:
    if not answer.strip():
        with pytest.raises(DataError, match="answer is empty"):
            rendered(name, chat("good film?", answer))
        return
    made = rendered(name, chat(answer, answer))
    before, _, after = WRITTEN[name][1].rpartition("hi")
    assert learnt_texts(made, name) == [before + answer + after]
    assert made.completion.strip() == answer


def test_learnt_tokens_are_transformers_own_where_the_template_marks_them() -> None:
    tokenizer = with_template("MARKED")
    marked = tokenizer.apply_chat_template(
        TURNS, return_dict=True, return_assistant_tokens_mask=True
    )
    row = encode(rendered("MARKED", TURNS), tokenizer, max_length=1000)
    length = len(row["input_ids"])  # the template writes a line break after the end
    assert marked["input_ids"][:length] == row["input_ids"]
    mask = [int(label != -100) for label in row["labels"]]
    assert mask == marked["assistant_masks"][:length]


def test_reasoning_is_learnt_where_it_is_written() -> None:
    thought = "<think>\nmaybe\n</think>\n\nhi"
    assert learnt_texts(rendered("QWEN3", chat("q", thought)), "QWEN3") == [f"{thought}<|im_end|>"]
    apart = {"role": "assistant", "content": "hi", "reasoning_content": "maybe"}
    made = rendered("QWEN3", chat("q", apart))
    assert learnt_texts(made, "QWEN3") == [f"{thought}<|im_end|>"]
    assert (made.prompt[-10:], made.completion) == ("assistant\n", thought)
    with pytest.warns(UserWarning, match=r"changes the text of 1 answers.*becomes 'hi' \(x\.jsonl"):
        made = rendered("QWEN3", chat("q", thought, "r", "yes"))
    assert learnt_texts(made, "QWEN3") == ["hi<|im_end|>", f"{THINK}yes<|im_end|>"]


@pytest.mark.parametrize(
    ("name", "change", "answer", "written"),
    [
        ("LLAMA3", "", " hi \n", "hi"),
        ("GEMMA", "", "hi\n", "hi"),
        ("CHATML", " | lower", "Hi There", "hi there"),
        ("CHATML", " | replace('<', '&lt;')", "a < b", "a &lt; b"),
        ("CHATML", " | replace('a', 'aa')", "banana", "baanaanaa"),
    ],
)
def test_a_template_that_changes_answers_is_said_once(name, change, answer, written) -> None:
    tokenizer = with_template(name)
    task = TaskSection(source="jsonl", format="messages")
    rows = [Row("x.jsonl", n, {"messages": chat("q", answer)}) for n in (1, 2)]
    before = tokenizer.chat_template
    tokenizer.chat_template = before.replace("m['content']", f"(m['content']{change})")
    try:
        with pytest.warns(UserWarning, match=r"task 't': .* 2 answers, such as .*row 1") as said:
            made = render("t", task, rows, tokenizer)
    finally:
        tokenizer.chat_template = before
    assert len(said) == 1
    assert made[0].completion == written


@pytest.mark.parametrize(
    ("name", "messages", "words"),
    [
        ("GEMMA", [{"role": "system", "content": "s"}, *TURNS], "System role not supported"),
        ("GEMMA", [TURNS[0], *TURNS], "roles must alternate"),
        ("MISTRAL", [*TURNS, TURNS[1]], "roles must alternate"),
        ("R1", TURNS, "after its generation prompt, which ends with .*<think>"),
        ("CHATML", [{"role": "user", "content": "q"}, {"role": "user", "content": "r"}], "'user'"),
    ],
)
def test_what_a_template_refuses_is_an_error_of_the_row(name, messages, words) -> None:
    with pytest.raises(DataError, match=rf"x\.jsonl: row 4: .*{words}.*the row begins: "):
        rendered(name, messages)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0]['content'] + 1 }}",  # TypeError
        "{{ messages[0].nothing.there }}",  # UndefinedError
        "{% for m in messages %}",  # TemplateSyntaxError
    ],
)
def test_a_broken_template_is_an_error_of_the_row(template: str) -> None:
    tokenizer = tiny_folders.tokenizer()
    tokenizer.chat_template = template
    task = TaskSection(source="jsonl", format="messages")
    with pytest.raises(DataError, match=r"x\.jsonl: row 4: .*refuses this chat"):
        render("t", task, [Row("x.jsonl", 4, {"messages": TURNS})], tokenizer)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}"
         "{% endfor %}", "message 2"),
        ("{% for m in messages %}{{ m['content'] * 2 }}{% endfor %}", "message 2"),
        (templates.CHATML.replace("{% for m in messages %}",
            "{% for m in messages if m['role'] != 'system' %}"), "role 'system', so they would"),
    ],
)  # fmt: skip
def test_messages_that_a_template_drops_or_repeats(template: str, words: str) -> None:
    tokenizer = tiny_folders.tokenizer(specials=templates.SPECIALS)
    tokenizer.chat_template = template
    task = TaskSection(source="jsonl", format="messages")
    messages = [{"role": "system", "content": "s"}, *chat("q", "hi")]
    shown = messages if "system" in words else messages[1:]
    with pytest.raises(DataError, match=rf"row 4: .*{words}"):
        render("t", task, [Row("x.jsonl", 4, {"messages": shown})], tokenizer)


class TestTools:
    CALL: ClassVar = {
        "type": "function",
        "function": {"name": "clock", "arguments": {"zone": "UTC"}},
    }
    MESSAGES: ClassVar = chat(
        "time?",
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "noon"},
        "It is noon.",
    )
    TOOLS: ClassVar = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]

    @pytest.mark.parametrize("name", ["QWEN3", "MISTRAL"])
    def test_calls_are_learnt_and_results_are_not(self, name: str) -> None:
        made = rendered(name, self.MESSAGES, tools=self.TOOLS)
        call, answer = learnt_texts(made, name)
        assert '"name": "clock"' in call
        assert "assistant" not in call
        assert "noon" not in call
        assert call.endswith("<|im_end|>" if name == "QWEN3" else "</s>")
        assert "It is noon." in answer
        assert '"parameters"' in made.prompt

    def test_a_call_as_the_last_answer(self) -> None:
        made = rendered("QWEN3", self.MESSAGES[:2], tools=self.TOOLS)
        (learnt,) = learnt_texts(made, "QWEN3")
        assert learnt.startswith(f"{THINK}<tool_call>\n{{")
        assert learnt.endswith("</tool_call><|im_end|>")

    def test_a_template_without_tools(self) -> None:
        with pytest.raises(DataError, match=r"row 4: .*does not write tool calls"):
            rendered("CHATML", self.MESSAGES)


def test_an_answer_with_weight_0_or_without_text_is_not_learnt() -> None:
    first = {"role": "assistant", "content": "no", "weight": 0}
    made = rendered("CHATML", chat("q", first, "r", "", "s", "yes"))
    assert learnt_texts(made, "CHATML") == ["yes<|im_end|>"]
    with pytest.raises(DataError, match="last answer has weight 0"):
        rendered("CHATML", chat("q", first))


def test_a_chat_that_the_assistant_begins() -> None:
    made = rendered("CHATML", [{"role": "assistant", "content": "Hello"}, *TURNS])
    assert learnt_texts(made, "CHATML") == ["Hello<|im_end|>", "hi<|im_end|>", "hi<|im_end|>"]


class TestDate:
    def test_the_template_sees_the_given_date(self) -> None:
        made = rendered("LLAMA3", TURNS, date="2025-02-03")
        assert "Today: 03 Feb 2025" in made.prompt
        assert "Today: 03 Feb 2025" in chat_prompt(
            with_template("LLAMA3"), TURNS[:1], date="2025-02-03"
        )
        now = rendered("LLAMA3", TURNS)
        assert now == rendered("LLAMA3", TURNS, date=today())
        assert now != made

    @pytest.mark.parametrize(
        "form", ["%Y-%m-%d", "%A, %B %-d, %y", "%j %H:%M:%S", "100%% %d/%m", "plain", "%x %X %c"]
    )
    def test_every_form_of_a_date(self, form: str) -> None:
        tokenizer = tiny_folders.tokenizer()
        tokenizer.chat_template = "\n {{ strftime_now('" + form + "') }}\n x"
        text = ChatTemplate(tokenizer, "2025-02-03").render(TURNS)
        assert text == f"\n {datetime.datetime(2025, 2, 3).strftime(form)}\n x"

    def test_other_templates_are_rendered_as_transformers_renders_them(self) -> None:
        for name in ("CHATML", "GEMMA", "QWEN3"):
            expected = with_template(name).apply_chat_template(TURNS, tokenize=False)
            assert ChatTemplate(with_template(name), "2025-02-03").render(TURNS) == expected


class TestPrompt:
    def test_system(self) -> None:
        text = chat_prompt(with_template("CHATML"), TURNS[:1], system="Be brief.")
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
        assert text.endswith("<|im_start|>assistant\n")
        with pytest.raises(InputError, match="system message already"):
            chat_prompt(
                with_template("CHATML"), [{"role": "system", "content": "a"}], system="Be brief."
            )

    def test_templates_without_system_messages(self) -> None:
        with pytest.raises(InputError, match="System role not supported"):
            chat_prompt(with_template("GEMMA"), TURNS[:1], system="Be brief.")
        tokenizer = tiny_folders.tokenizer()
        tokenizer.chat_template = (
            "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
        )
        with pytest.raises(InputError, match="does not write system messages"):
            chat_prompt(tokenizer, TURNS[:1], system="Be brief.")

    def test_no_template(self) -> None:
        with pytest.raises(ModelError, match="has no chat template"):
            chat_prompt(tiny_folders.tokenizer(), TURNS[:1])
        assert turn_end(tiny_folders.tokenizer()) == ""


class TestFingerprint:
    """Rows that train as they did in 0.1.0 keep the fingerprint of 0.1.0."""

    @pytest.mark.parametrize(
        ("name", "loss_on", "turns", "sha256"),
        [
            ("CHATML", "completion", 1, "07acf36bd02a0bd9"),
            ("QWEN3", "completion", 1, "b596ee208e1f1fd0"),
            ("MISTRAL", "completion", 1, "f43a2dbb5f4882dc"),
            ("GEMMA", "last", 2, "5384173ba51507cd"),
            ("CHATML", "last", 2, "cf69e1a34bff3961"),
            ("TRANSCRIPT", "all", 2, "71f38989fe5433a0"),
        ],
    )  # computed by 0.1.0, where loss_on: completion learnt the last answer alone
    def test_as_0_1_0(self, name: str, loss_on: str, turns: int, sha256: str) -> None:
        messages = chat("good film?", "yes", "bad film?", "no")[: 2 * turns]
        made = rendered(name, messages, settings={"loss_on": loss_on})
        assert fingerprint({"t": [made]}).startswith(sha256)

    def test_learning_every_answer_is_another_row(self) -> None:
        every, last = (
            rendered("CHATML", TURNS, settings={"loss_on": on}) for on in ("completion", "last")
        )
        assert fingerprint({"t": [every]}) != fingerprint({"t": [last]})


class TestLongChats:
    SETTINGS: ClassVar = {"long_rows": "cut"}

    def test_the_beginning_is_cut_and_a_cut_answer_is_not_learnt(self) -> None:
        messages = chat("q" * 20, "yes " * 20, "good film?", "hi")
        made = rendered("CHATML", messages, settings=self.SETTINGS)
        whole = learnt_texts(made, "CHATML")
        assert len(whole) == 2
        length = len(encode(made, with_template("CHATML"), max_length=1000)["input_ids"])
        assert learnt_texts(made, "CHATML", length - 10) == whole  # only the first question is cut
        assert learnt_texts(made, "CHATML", length // 2) == ["hi<|im_end|>"]
        row = encode(made, with_template("CHATML"), max_length=length // 2)
        assert len(row["input_ids"]) == len(row["labels"]) == length // 2


def test_learnt_tokens_without_offsets(slow_tokenizer) -> None:
    template = slow_tokenizer.chat_template
    slow_tokenizer.chat_template = templates.TRANSCRIPT
    try:
        task = TaskSection(source="jsonl", format="messages")
        (made,) = render("t", task, [Row("x", 1, {"messages": TURNS})], slow_tokenizer)
    finally:
        slow_tokenizer.chat_template = template
    row = encode(made, slow_tokenizer, max_length=1000)
    labels = torch.tensor(row["labels"])
    assert slow_tokenizer.decode(labels[labels != -100]) == "hihi</s>"
