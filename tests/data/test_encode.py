from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rotmole.data import Collator, Example, encode, encode_all, tokenize_pair
from rotmole.errors import DataError, ModelError

from .conftest import byte_level


def example(prompt: str, completion: str, **more) -> Example:
    return Example("t", "", "1", prompt, completion, **more)


def learnt(row: dict, tokenizer) -> str:
    return tokenizer.decode([label for label in row["labels"] if label != -100])


def test_loss_is_on_the_answer_and_one_eos(tokenizer):
    row = encode(example("Sentiment:", " positive"), tokenizer, max_length=64)
    assert learnt(row, tokenizer) == " positive<|im_end|>"
    assert tokenizer.decode(row["input_ids"]) == "Sentiment: positive<|im_end|>"
    assert row["input_ids"].count(tokenizer.eos_token_id) == 1
    assert row["labels"][-1] == tokenizer.eos_token_id
    assert (row["task"], row["group"]) == ("t", "")


def test_loss_on_all(tokenizer):
    row = encode(example("Sentiment:", " positive", loss_on="all"), tokenizer, max_length=64)
    assert row["labels"] == row["input_ids"]


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("Sentiment: ", "positive"),  # the space joins the word after it
        ("Sentiment: posi", "tive"),  # a cut inside a token
        ("Words in German: 1480 -> 5. M", "ärz"),
        ("Question", ": yes"),
    ],
)
def test_tokens_are_those_of_the_whole_text(tokenizer, prompt, completion):
    ids, start = tokenize_pair(tokenizer, prompt, completion)
    assert ids == tokenizer(prompt + completion)["input_ids"]
    # every token that holds a part of the answer is learnt, no token before it
    assert tokenizer.decode(ids[start:]).endswith(completion)
    assert prompt.startswith(tokenizer.decode(ids[:start]))


def test_a_token_over_the_boundary_is_learnt(tokenizer):
    whole = tokenizer("Sentiment: positive")["input_ids"]
    apart = tokenizer("Sentiment: posi")["input_ids"] + tokenizer("tive")["input_ids"]
    assert whole != apart, "the fixture must merge over the boundary"
    ids, start = tokenize_pair(tokenizer, "Sentiment: posi", "tive")
    assert ids == whole
    assert tokenizer.decode(ids[start:]) == " positive"


@settings(max_examples=150, derandomize=True, deadline=None)
@given(prompt=st.text(max_size=20), completion=st.text(min_size=1, max_size=12))
@pytest.mark.parametrize("trim_offsets", [True, False])
def test_split_of_any_text(made, trim_offsets, prompt, completion):
    tokenizer = made[trim_offsets]
    ids, start = tokenize_pair(tokenizer, prompt, completion)
    assert ids == tokenizer(prompt + completion)["input_ids"]
    # bytes before the boundary are the prompt's, and no byte of the answer is left out
    symbols = tokenizer.convert_ids_to_tokens(ids[:start])
    assert sum(len(symbol) for symbol in symbols) <= len(prompt.encode())


@pytest.fixture(scope="module")
def made():
    return {trim: byte_level(trim_offsets=trim) for trim in (True, False)}


def test_bos_only_where_the_tokenizer_adds_it(tokenizer, bos_tokenizer):
    without, _ = tokenize_pair(tokenizer, "Sentiment:", " yes")
    assert tokenizer.bos_token_id not in without
    row = encode(example("Sentiment:", " yes"), bos_tokenizer, max_length=64)
    assert row["input_ids"][0] == bos_tokenizer.bos_token_id
    assert row["input_ids"].count(bos_tokenizer.bos_token_id) == 1
    assert learnt(row, bos_tokenizer) == " yes<|im_end|>"
    text = encode(example("", "good film"), bos_tokenizer, max_length=64)
    assert text["labels"][0] == -100


def test_bos_in_the_text_is_not_doubled(bos_tokenizer):
    ids, _ = tokenize_pair(bos_tokenizer, "<s>Sentiment:", " yes")
    assert ids.count(bos_tokenizer.bos_token_id) == 1


def test_tokenizer_without_offsets_that_adds_eos(slow_tokenizer):
    assert not slow_tokenizer.is_fast
    row = encode(example("Answer:", " März"), slow_tokenizer, max_length=64)
    assert row["input_ids"].count(slow_tokenizer.eos_token_id) == 1
    assert row["input_ids"][-1] == slow_tokenizer.eos_token_id
    assert row["labels"][: len("Answer:")] == [-100] * len("Answer:")
    assert learnt(row, slow_tokenizer) == " März</s>"


def test_eos_written_in_the_text_is_not_doubled(tokenizer):
    row = encode(example("Sentiment:", " yes<|im_end|>"), tokenizer, max_length=64)
    assert row["input_ids"].count(tokenizer.eos_token_id) == 1


def test_own_end_of_turn_replaces_eos(tokenizer):
    row = encode(example("q", " yes", end="<end_of_turn>"), tokenizer, max_length=64)
    assert learnt(row, tokenizer) == " yes<end_of_turn>"


def test_batch_of_rows_equals_single_rows(tokenizer, bos_tokenizer, slow_tokenizer):
    rows = [example("Sentiment:", " yes"), example("<s>a", " b"), example("", "text")]
    for each in (tokenizer, bos_tokenizer, slow_tokenizer):
        single = [encode(row, each, max_length=32) for row in rows]
        assert encode_all(rows, each, max_length=32) == single


class TestLongRows:
    def test_error_names_row_and_numbers(self, tokenizer):
        row = example("Review: a good film. " * 9, " yes", origin="train.jsonl: row 7")
        length = len(tokenizer(row.prompt + row.completion)["input_ids"]) + 1
        with pytest.raises(DataError, match=r"train\.jsonl: row 7: ") as caught:
            encode(row, tokenizer, max_length=16)
        message = str(caught.value)
        assert f"{length} tokens are more than training.max_length 16" in message
        assert "long_rows: cut" in message
        encode(row, tokenizer, max_length=length)

    def test_cut_keeps_answer_and_end_of_prompt(self, tokenizer, bos_tokenizer):
        row = example("start " * 30 + "Sentiment:", " positive", long_rows="cut")
        for each in (tokenizer, bos_tokenizer):
            made = encode(row, each, max_length=16)
            assert len(made["input_ids"]) == len(made["labels"]) == 16
            assert learnt(made, each) == " positive<|im_end|>"
            assert each.decode(made["input_ids"]).endswith("Sentiment: positive<|im_end|>")
        assert made["input_ids"][0] == bos_tokenizer.bos_token_id

    def test_answer_that_does_not_fit_is_always_an_error(self, tokenizer):
        row = example("q", " positive" * 30, long_rows="cut")
        with pytest.raises(DataError, match="answer alone has"):
            encode(row, tokenizer, max_length=16)

    def test_cut_text_loses_its_end(self, tokenizer):
        row = example("", "a good film " * 20, long_rows="cut")
        made = encode(row, tokenizer, max_length=16)
        assert made["input_ids"] == tokenizer(row.completion)["input_ids"][:16]


def test_all_labels_masked_is_an_error(tokenizer):
    row = example("", "", origin="x.csv: row 2")
    with pytest.raises(DataError, match=r"x\.csv: row 2: all labels are masked"):
        encode(row, tokenizer, max_length=16)


def test_no_eos_is_an_error():
    tokenizer = byte_level()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        encode(example("a", "b"), tokenizer, max_length=16)


class TestCollator:
    def test_mask_comes_from_lengths_not_from_the_pad_id(self, tokenizer):
        assert tokenizer.pad_token_id == tokenizer.eos_token_id
        rows = [
            encode(example(p, c), tokenizer, max_length=64)
            for p, c in [("Sentiment:", " positive"), ("Q", " yes")]
        ]
        batch = Collator(tokenizer)(rows)
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        lengths = [len(row["input_ids"]) for row in rows]
        assert batch["attention_mask"].sum(1).tolist() == lengths
        for row, length in enumerate(lengths):
            # the EOS of the target is attended and learnt, the padding after it is neither
            assert batch["labels"][row, length - 1] == tokenizer.eos_token_id
            assert (batch["labels"][row, length:] == -100).all()
            assert (batch["input_ids"][row, length:] == tokenizer.pad_token_id).all()

    def test_multiple_and_task_ids(self, tokenizer):
        rows = [
            {"input_ids": [5] * n, "labels": [5] * n, "task": "a", "task_id": n} for n in (3, 9)
        ]
        batch = Collator(tokenizer, pad_to_multiple_of=8)(rows)
        assert batch["input_ids"].shape == (2, 16)
        assert batch["task_id"].tolist() == [3, 9]
        assert all(isinstance(value, torch.Tensor) for value in batch.values())

    def test_without_labels_or_pad_token(self):
        tokenizer = byte_level()
        tokenizer.pad_token = None
        batch = Collator(tokenizer)([{"input_ids": [5, 6]}, {"input_ids": [7]}])
        assert batch["input_ids"].tolist() == [[5, 6], [7, tokenizer.eos_token_id]]
        assert "labels" not in batch
