from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from evaluation_cases import choice_rows, make_model, make_tokenizer, score_rows
from transformers import GPT2Config, GPT2LMHeadModel

from rotmole.data.encode import encode
from rotmole.data.examples import Example
from rotmole.errors import ModelError
from rotmole.evaluation import scoring
from rotmole.evaluation.scoring import (
    Scored,
    likelihoods,
    log_likelihoods,
    scored_answers,
    scored_choices,
    without_beginning,
)


def one_by_one(model, text: Scored) -> float:
    """The plain way: one text, all logits, a loop over positions."""
    with torch.no_grad():
        logits = model(torch.tensor([text.tokens])).logits[0].double()
    steps = logits.log_softmax(-1)
    return sum(float(steps[p - 1, text.tokens[p]]) for p in text.positions)


def scored_answer(row, tokenizer, **arguments) -> Scored:
    return scored_answers([row], tokenizer, **arguments)[0]


def scored_choice(row, choice, tokenizer) -> Scored:
    return scored_choices([replace(row, choices=(choice,))], tokenizer)[0]


def texts_of(rows, tokenizer):
    return scored_choices(rows, tokenizer) + scored_answers(rows, tokenizer)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_every_batch_size_equals_one_by_one(model, tokenizer, batch_size):
    texts = texts_of(choice_rows() + score_rows(), tokenizer)
    values = log_likelihoods(model, texts, batch_size=batch_size)
    assert values == pytest.approx([one_by_one(model, text) for text in texts], rel=1e-12)


@pytest.mark.parametrize("apart", [True, False])
def test_greedy_is_what_greedy_decoding_writes(model, tokenizer, monkeypatch, apart):
    monkeypatch.setattr(scoring, "_WORTH", 10.0)  # trees wherever the model can, unless apart
    prompts = [tuple(tokenizer(text).input_ids) for text in ("one", "one two", "three four five")]
    texts = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        tokens = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0]
        whole = tuple(tokens.tolist())
        positions = tuple(range(len(prompt), len(whole)))
        other = (*whole[:-2], (whole[-2] + 1) % len(tokenizer), whole[-1])
        texts += [Scored(whole, positions), Scored(other, positions)]
    found = likelihoods(model, texts, batch_size=4, apart=apart)
    assert [each.greedy for each in found] == [True, False] * len(prompts)
    assert [each.log for each in found] == log_likelihoods(model, texts, batch_size=4, apart=apart)


def test_models_without_position_argument(tokenizer):
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=128)
    model = GPT2LMHeadModel(config).double().eval()
    forward = GPT2LMHeadModel.forward

    class Plain(GPT2LMHeadModel):
        def forward(self, input_ids, attention_mask=None, use_cache=None):
            return forward(self, input_ids, attention_mask=attention_mask, use_cache=use_cache)

    plain = Plain(config).double().eval()
    plain.load_state_dict(model.state_dict())
    texts = texts_of(choice_rows(), tokenizer)
    expected = log_likelihoods(model, texts, batch_size=4)
    assert log_likelihoods(plain, texts, batch_size=4) == pytest.approx(expected, rel=1e-12)


def test_shared_prompts_cost_one_row(model, tokenizer):
    """Six one-token choices and the right answer need one forward row, not seven."""
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    rows = score_rows(4)
    texts = texts_of(rows, tokenizer)
    log_likelihoods(model, texts, batch_size=64, apart=True)
    assert sum(seen) == len(rows)


@pytest.mark.parametrize("apart", [False, True])
def test_passes_fit_into_memory(model, tokenizer, monkeypatch, apart):
    texts = texts_of(choice_rows() + score_rows(), tokenizer)
    expected = log_likelihoods(model, texts, batch_size=64)
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    # one layer's tensors and the logits of 320 words, in float64
    each = 8 * (4 * 48 + 10 * 32) + 320 * 16
    longest = max(len(text.tokens) for text in texts)
    free = 2 * each * (longest + 7)
    monkeypatch.setattr("rotmole.models.room.free_memory", lambda device: free)
    values = log_likelihoods(model, texts, batch_size=64, apart=apart)
    assert values == pytest.approx(expected, rel=1e-12)
    assert longest / 2 < max(seen) <= longest + 7
    seen.clear()
    monkeypatch.setattr("rotmole.models.room.free_memory", lambda device: 0)
    assert log_likelihoods(model, texts, batch_size=64, apart=apart) == pytest.approx(expected)
    assert max(seen) < longest  # one text, without its last token


def test_choices_are_the_trained_tokens_without_the_end(tokenizer):
    row = choice_rows()[1]
    trained = encode(row, tokenizer, max_length=1000)
    learnt = [i for i, label in enumerate(trained["labels"]) if label != -100]
    text = scored_choice(row, row.completion, tokenizer)
    assert trained["input_ids"][-1] == tokenizer.eos_token_id
    assert list(text.tokens) == trained["input_ids"][:-1]
    assert list(text.positions) == learnt[:-1]
    answer = scored_answer(row, tokenizer)
    assert list(answer.tokens) == trained["input_ids"]
    assert list(answer.positions) == learnt


def test_a_token_across_the_boundary_counts_as_answer(tokenizer):
    whole = "the film"
    ids = tokenizer(whole)["input_ids"]
    row = Example("t", "", "0", "the fi", "lm")
    assert len(tokenizer("the fi")["input_ids"] + tokenizer("lm")["input_ids"]) > len(ids)
    text = scored_choice(row, "lm", tokenizer)
    assert list(text.tokens) == ids
    first = min(text.positions)
    assert tokenizer.decode(ids[first:]).endswith("lm")
    assert len(tokenizer.decode(ids[:first])) <= len("the fi")


def test_an_end_of_turn_of_its_own_is_not_scored_in_choices(tokenizer):
    row = replace(choice_rows()[0], end="<|turn|>")
    assert tokenizer.convert_tokens_to_ids("<|turn|>") == scored_answer(row, tokenizer).tokens[-1]
    plain = scored_choice(replace(row, end=""), row.choices[0], tokenizer)
    assert scored_choice(row, row.choices[0], tokenizer) == plain


def test_a_uniform_model_gives_chance(model, tokenizer):
    torch.nn.init.zeros_(model.lm_head.weight)
    text = scored_answer(choice_rows()[0], tokenizer)
    (value,) = log_likelihoods(model, [text], batch_size=1)
    assert value == pytest.approx(-len(text.positions) * math.log(len(tokenizer)))


def test_a_long_prompt_is_cut_as_in_training(tokenizer):
    row = replace(choice_rows()[0], prompt="the film was bad " * 100 + "Answer:", long_rows="cut")
    trained = encode(row, tokenizer, max_length=30)
    text = scored_answer(row, tokenizer, longest=30)
    assert list(text.tokens) == trained["input_ids"]
    assert [i for i, label in enumerate(trained["labels"]) if label != -100] == list(text.positions)
    assert text.cut
    assert not scored_answer(row, tokenizer).cut


def test_all_choices_of_a_long_row_follow_the_same_prompt(tokenizer):
    row = replace(choice_rows()[0], prompt="the film was bad " * 100 + "Answer:", long_rows="cut")
    texts = scored_choices([row], tokenizer, longest=30)
    prompts = {text.tokens[: text.positions[0]] for text in texts}
    assert len(prompts) == 1
    assert max(len(text.tokens) for text in texts) == 29  # and the end of sequence
    whole = scored_choices([row], tokenizer)
    ends = [tuple(text.tokens[p] for p in text.positions) for text in texts]
    assert ends == [tuple(text.tokens[p] for p in text.positions) for text in whole]


def test_the_beginning_of_sequence_stays(tokenizer):
    begun = make_tokenizer()
    begun.bos_token = "<|turn|>"
    first = begun.bos_token_id
    assert without_beginning(begun, [first, 5, 6, 7], 3, 2) == ([first, 7], 1)
    assert without_beginning(begun, [4, 5, 6, 7], 3, 2) == ([6, 7], 1)
    assert without_beginning(begun, [first, 5], 1, 9) == ([first], 0)
    assert without_beginning(begun, [4, 5], 1, 0) == ([4, 5], 1)


def test_the_mode_and_gradients_come_back(model, tokenizer):
    model.train()
    log_likelihoods(model, texts_of(choice_rows(1), tokenizer), batch_size=2)
    assert model.training
    assert torch.is_grad_enabled()


def test_nan_is_an_error(tokenizer):
    model = make_model(tokenizer)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="NaN"):
        log_likelihoods(model, texts_of(choice_rows(1), tokenizer), batch_size=2)


def test_progress_counts_every_text_once(model, tokenizer):
    counts: list[int] = []
    texts = texts_of(choice_rows(), tokenizer)
    log_likelihoods(model, texts, batch_size=2, tick=counts.append)
    assert sum(counts) == len(texts)


def test_half_precision_is_summed_in_float32(model, tokenizer):
    texts = texts_of(choice_rows(), tokenizer)
    exact = log_likelihoods(model, texts, batch_size=8)
    rough = log_likelihoods(model.bfloat16(), texts, batch_size=8)
    assert rough == pytest.approx(exact, rel=0.1)
    assert any(value != float(torch.tensor(value).bfloat16()) for value in rough)
