from __future__ import annotations

from typing import ClassVar

import pytest

from rotmole.config.schema import TaskSection
from rotmole.data import encode
from rotmole.data.formats import render
from rotmole.data.sources import Row
from rotmole.data.templates import fields, fill
from rotmole.errors import DataError, ModelError


def one(columns: dict, tokenizer=None, **section):
    task = TaskSection(source="jsonl", **section)
    return render("t", task, [Row("x.jsonl", 4, columns)], tokenizer)[0]


def test_template():
    row = Row("x", 1, {"a": 1.5, "b": ["x", "y"], "c": "{a}", "d.e-f": "ok"})
    assert fill('{a}|{b}|{c}|{{a}}|{d.e-f}|{"json": 1}|{ a }', row) == (
        '1.5|x, y|{a}|{a}|ok|{"json": 1}|{ a }'
    )
    assert fields('{a} {{b}} {d.e-f} {"c": 1}') == ["a", "d.e-f"]


def test_prompt_completion_moves_spaces_and_keeps_all_else():
    made = one({"q": "2+2 ", "r": "4", "id": "k"}, prompt="Q: {q}\nA:  ", completion="{r}\n")
    assert (made.prompt, made.completion) == ("Q: 2+2 \nA:", "  4\n")
    assert (made.task, made.group, made.id) == ("t", "", "k")
    assert one({"prompt": "p\n", "completion": "c"}).completion == "c"


def test_column_typo_is_named():
    with pytest.raises(
        DataError, match=r"x.jsonl: row 4: no column 'promt' .*did you mean 'prompt"
    ):
        one({"prompt": "a", "completion": "b"}, prompt="{promt}")


def test_text():
    made = one({"text": "a long text", "lang": "de"}, format="text", group_column="lang")
    assert (made.prompt, made.completion, made.group) == ("", "a long text", "de")


class TestMultipleChoice:
    ROW: ClassVar = {"question": "Where?", "choices": ["bank", "library"], "answer": 1}

    def test_choice_texts(self):
        made = one(self.ROW, format="multiple_choice", prompt="{question}\nAnswer:")
        assert made.choices == (" bank", " library")
        assert (made.answer, made.completion) == (1, " library")
        assert made.prompt == "Where?\nAnswer:"

    def test_lettered(self):
        made = one(
            self.ROW,
            format="multiple_choice",
            prompt="{question}\n{choices}\n",
            completion="{letter}",
        )
        assert made.prompt == "Where?\nA. bank\nB. library\n"
        assert made.choices == ("A", "B")
        assert made.completion == "B"

    @pytest.mark.parametrize("answer", [1, 1.0, "1", "B", " B "])
    def test_ways_to_write_the_answer(self, answer):
        made = one({**self.ROW, "answer": answer}, format="multiple_choice", prompt="{question}")
        assert made.answer == 1

    @pytest.mark.parametrize("answer", [2, -1, "C", "librarian", 0.5])
    def test_answer_out_of_range(self, answer):
        with pytest.raises(
            DataError, match=r"row 4: column 'answer' is .* must be 0..1 or one of A, B"
        ):
            one({**self.ROW, "answer": answer}, format="multiple_choice", prompt="{question}")

    @pytest.mark.parametrize("choices", ["bank", ["bank"], ["bank", ""], ["bank", 3]])
    def test_bad_choices(self, choices):
        with pytest.raises(DataError, match="row 4: column 'choices' must"):
            one({**self.ROW, "choices": choices}, format="multiple_choice", prompt="{question}")


class TestClassification:
    SECTION: ClassVar = {"format": "classification", "prompt": "Review: {s}\nSentiment:"}
    LABELS: ClassVar = ["negative", "positive"]

    @pytest.mark.parametrize("label", [1, "1", "positive"])
    def test_label(self, label):
        made = one({"s": "fine", "label": label}, labels=self.LABELS, **self.SECTION)
        assert made.choices == (" negative", " positive")
        assert (made.completion, made.answer) == (" positive", 1)

    def test_wrong_label_is_named_with_the_nearest(self):
        with pytest.raises(DataError, match=r"row 4: .*'positve'.*did you mean 'positive'"):
            one({"s": "x", "label": "positve"}, labels=self.LABELS, **self.SECTION)
        with pytest.raises(DataError, match=r"column 'label' is -1, it must be 0..1"):
            one({"s": "x", "label": -1}, labels=self.LABELS, **self.SECTION)


class TestRegression:
    SECTION: ClassVar = {"format": "regression", "prompt": "{s}\nScore:"}

    @pytest.mark.parametrize(
        ("score", "word"), [(0, "0"), (2.4, "2"), (2.5, "3"), ("4.75", "5"), (5.0, "5")]
    )
    def test_score_becomes_the_nearest_word(self, score, word):
        made = one({"s": "x", "score": score}, **self.SECTION)
        assert made.choices == (" 0", " 1", " 2", " 3", " 4", " 5")
        assert (made.completion, made.answer, made.score) == (f" {word}", int(word), float(score))

    @pytest.mark.parametrize("score", [-0.1, 5.1, "high", "nan", True, [1]])
    def test_bad_score(self, score):
        with pytest.raises(DataError, match=r"row 4: column 'score' .*number in 0..5"):
            one({"s": "x", "score": score}, **self.SECTION)


class TestMessages:
    ROW: ClassVar = {
        "messages": [
            {"role": "user", "content": "good film?"},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "bad film?"},
            {"role": "assistant", "content": "no"},
        ]
    }

    def test_last_answer_with_one_end(self, tokenizer):
        made = one(self.ROW, tokenizer, format="messages", loss_on="last")
        assert made.prompt.endswith("bad film?<|im_end|>\n<|im_start|>assistant\n")
        assert (made.completion, made.end) == ("no", "")
        row = encode(made, tokenizer, max_length=256)
        learnt = [label for label in row["labels"] if label != -100]
        assert tokenizer.decode(learnt) == "no<|im_end|>"
        rendered = tokenizer.apply_chat_template(self.ROW["messages"], tokenize=False)
        assert tokenizer.decode(row["input_ids"]) + "\n" == rendered

    def test_loss_on_all(self, tokenizer):
        made = one(self.ROW, tokenizer, format="messages", loss_on="all")
        row = encode(made, tokenizer, max_length=256)
        assert row["labels"] == row["input_ids"]

    def test_bos_of_the_template_is_not_doubled(self, bos_tokenizer):
        row = encode(one(self.ROW, bos_tokenizer, format="messages"), bos_tokenizer, max_length=256)
        assert row["input_ids"].count(bos_tokenizer.bos_token_id) == 1

    def test_other_end_of_turn(self, tokenizer):
        before = tokenizer.chat_template
        tokenizer.chat_template = before.replace("<|im_end|>", "<end_of_turn>")
        try:
            made = one(self.ROW, tokenizer, format="messages")
        finally:
            tokenizer.chat_template = before
        assert made.end == "<end_of_turn>"
        row = encode(made, tokenizer, max_length=256)
        assert tokenizer.eos_token_id not in row["input_ids"]
        assert tokenizer.decode(row["input_ids"]).endswith("no<end_of_turn>")

    @pytest.mark.parametrize(
        ("messages", "words"),
        [
            ([], "must be a list of messages"),
            ("hello", "must be a list of messages"),
            ([{"role": "user"}], "message 1 .* has no content"),
            ([{"role": "user", "content": "q"}], "is 'user', it must be 'assistant'"),
            ([{"role": "assistant", "content": ""}], "answer is empty"),
        ],
    )
    def test_bad_messages(self, tokenizer, messages, words):
        with pytest.raises(DataError, match=f"x.jsonl: row 4: .*{words}"):
            one({"messages": messages}, tokenizer, format="messages")

    def test_tokenizer_without_template(self, slow_tokenizer):
        with pytest.raises(ModelError, match="task 't': format messages needs a chat template"):
            one(self.ROW, slow_tokenizer, format="messages")
        with pytest.raises(DataError, match="needs the model's tokenizer"):
            one(self.ROW, format="messages")
