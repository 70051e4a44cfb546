from __future__ import annotations

import pytest
import torch
from evaluation_cases import make_model, make_tokenizer, text_rows

from rotmole.data.encode import encode
from rotmole.evaluation.generation import (
    LineEnd,
    answers,
    cut_answer,
    end_tokens,
    generate_text,
    prompt_tokens,
)

PROMPTS = [row.prompt for row in text_rows()] + ["a", "Question: which animal can fly?\nAnswer:"]


def greedy_by_hand(model, tokenizer, prompt: str, steps: int) -> str:
    """No cache, no padding, one token at a time."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        for _ in range(steps):
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("pad", [False, True], ids=["pad is eos", "own pad"])
def test_batches_equal_greedy_by_hand(batch_size, pad):
    tokenizer = make_tokenizer(pad=pad)
    model = make_model(tokenizer)
    texts = answers(
        model, tokenizer, PROMPTS, max_new_tokens=8, batch_size=batch_size, one_line=False
    )
    expected = [greedy_by_hand(model, tokenizer, prompt, 8).strip() for prompt in PROMPTS]
    assert texts == expected
    assert len(set(texts)) > 3


def test_the_tokenizers_own_padding_side_does_not_matter(model, tokenizer):
    arguments = {"max_new_tokens": 6, "batch_size": 4, "one_line": True}
    texts = answers(model, tokenizer, PROMPTS, **arguments)
    other = make_tokenizer()
    other.padding_side = "left"
    assert answers(model, other, PROMPTS, **arguments) == texts
    assert other.padding_side == "left"


def test_settings_of_the_model_do_not_change_greedy(model, tokenizer):
    arguments = {"max_new_tokens": 12, "batch_size": 4, "one_line": False}
    texts = answers(model, tokenizer, PROMPTS, **arguments)
    model.generation_config.update(
        do_sample=True, temperature=5.0, top_k=3, repetition_penalty=9.0, no_repeat_ngram_size=1,
        num_beams=2, min_length=50,
    )  # fmt: skip
    assert answers(model, tokenizer, PROMPTS, **arguments) == texts


def test_answers_end_at_the_end_of_sequence(model, tokenizer):
    with torch.no_grad():  # every token is followed by the end of sequence
        model.lm_head.weight.zero_()
        model.lm_head.weight[tokenizer.eos_token_id] = model.model.norm.weight * 0 + 1
        model.model.embed_tokens.weight.fill_(1.0)
    texts = answers(model, tokenizer, PROMPTS, max_new_tokens=4, batch_size=3, one_line=False)
    assert texts == [""] * len(PROMPTS)


def test_an_end_of_turn_ends_an_answer(model, tokenizer):
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    assert end_tokens(model, tokenizer) == [tokenizer.eos_token_id]
    assert end_tokens(model, tokenizer, ["<|turn|>"]) == sorted([tokenizer.eos_token_id, turn])
    model.generation_config.eos_token_id = [0, turn]
    assert end_tokens(model, tokenizer) == sorted({0, turn, tokenizer.eos_token_id})


@pytest.mark.parametrize(
    ("text", "one_line", "expected"),
    [
        (" fish\nQuestion: next", True, "fish"),
        ("\n\n fish \nmore", True, "fish"),
        (" two\nlines ", False, "two\nlines"),
        ("", True, ""),
    ],
)
def test_cut_answer(text, one_line, expected):
    assert cut_answer(text, one_line=one_line) == expected


def test_the_line_rule_stops_only_after_something(model, tokenizer):
    stop = LineEnd(model, tokenizer)
    stop.starts_B = torch.tensor([2, 2, 2])
    (newline,) = tokenizer("\n")["input_ids"]
    (letter,) = tokenizer("b")["input_ids"]
    start = [newline, letter]  # of the prompt: does not count
    rows = [[newline, newline], [letter, newline], [newline, letter]]
    done = stop(torch.tensor([start + row for row in rows]), None)
    assert done.tolist() == [False, True, False]


def test_stopping_early_changes_no_answer(model, tokenizer):
    (newline,) = tokenizer("\n")["input_ids"]
    with torch.no_grad():
        model.lm_head.weight[newline] *= 3  # line breaks become frequent
    arguments = {"max_new_tokens": 16, "batch_size": 4}
    whole = answers(model, tokenizer, PROMPTS, one_line=False, **arguments)
    texts = answers(model, tokenizer, PROMPTS, one_line=True, **arguments)
    assert any("\n" in text for text in whole)
    assert texts == [text.split("\n")[0].strip() for text in whole]


def test_prompts_are_tokenised_as_before_an_answer(tokenizer):
    row = text_rows()[2]
    trained = encode(row, tokenizer, max_length=1000)
    learnt = [i for i, label in enumerate(trained["labels"]) if label != -100]
    assert prompt_tokens(row.prompt, tokenizer) == trained["input_ids"][: learnt[0]]
    spaced = prompt_tokens(row.prompt + "  ", tokenizer)
    assert spaced == prompt_tokens(row.prompt, tokenizer)
    assert prompt_tokens("", tokenizer, longest=5) == [tokenizer.eos_token_id]
    assert len(prompt_tokens("the film " * 50, tokenizer, longest=5)) == 5


def test_sampling_is_seeded_and_leaves_the_global_generator_alone(model, tokenizer):
    arguments = {"max_new_tokens": 12, "temperature": 1.5, "top_p": 0.95}
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = generate_text(model, tokenizer, "the film", seed=1, **arguments)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    assert generate_text(model, tokenizer, "the film", seed=1, **arguments) == first
    assert generate_text(model, tokenizer, "the film", seed=2, **arguments) != first


def test_temperature_zero_is_greedy(model, tokenizer):
    expected = greedy_by_hand(model, tokenizer, "the film", 10)
    assert generate_text(model, tokenizer, "the film", max_new_tokens=10, seed=5) == expected


def test_every_prompt_is_counted_once(model, tokenizer):
    counts: list[int] = []
    answers(
        model, tokenizer, PROMPTS, max_new_tokens=2, batch_size=3, one_line=True, tick=counts.append
    )
    assert sum(counts) == len(PROMPTS)
