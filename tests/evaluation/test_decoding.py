"""Rows leave their batch, and leftovers are joined: tokens stay those of each prompt alone."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from evaluation_cases import make_model, make_tokenizer
from peft import PromptTuningConfig, get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM, MambaConfig, MambaForCausalLM

from lanes import first_then_slow
from rotmole import RotMoleConfig
from rotmole.evaluation import decoding, generation
from rotmole.evaluation.decoding import can_leave
from rotmole.evaluation.generation import continuations, prompt_tokens

PROMPTS = [f"the film {i} was" + " bad and" * (i % 4) for i in range(23)]
OPTIONS = {"max_new_tokens": 24, "one_line": False}


def frequent_ends(model, tokenizer):
    """Make ends and line breaks frequent, so that answers have different lengths."""
    (newline,) = tokenizer("\n")["input_ids"]
    with torch.no_grad():
        model.lm_head.weight[newline] *= 2.5
        model.lm_head.weight[tokenizer.eos_token_id] *= 2.5
    return model


def rows_of(tokenizer) -> list[list[int]]:
    return [prompt_tokens(prompt, tokenizer) for prompt in PROMPTS]


def alone(model, tokenizer, **options):
    """Each prompt in a batch of its own, by one call of generate()."""
    return [
        continuations(model, tokenizer, [row], batch_size=1, **options)[0]
        for row in rows_of(tokenizer)
    ]


@pytest.fixture
def counted(monkeypatch):
    """Count the tokens that are computed: rows times steps, and how often leftovers are joined."""
    counts = {"rows": 0, "joined": 0}
    together = decoding._together

    def joined(*arguments):
        counts["joined"] += 1
        return together(*arguments)

    monkeypatch.setattr(decoding, "_together", joined)

    def watch(model):
        def count(module, args, kwargs):
            counts["rows"] += kwargs["input_ids"].shape[0]

        return model.register_forward_pre_hook(count, with_kwargs=True)

    counts["watch"] = watch
    return counts


@pytest.mark.parametrize("pad", [False, True], ids=["pad is eos", "own pad"])
@pytest.mark.parametrize("size", first_then_slow([3, 1, 8, 64]))
def test_leaving_and_joining_change_no_token(size, pad, counted, monkeypatch):
    tokenizer = make_tokenizer(pad=pad)
    model = frequent_ends(make_model(tokenizer), tokenizer)
    rows = rows_of(tokenizer)
    counts = []
    counted["watch"](model)
    texts = continuations(model, tokenizer, rows, batch_size=size, tick=counts.append, **OPTIONS)
    left, counted["rows"] = counted["rows"], 0
    if size == 8 and not pad:
        assert counted["joined"] > 0
    assert sum(counts) == len(rows)
    monkeypatch.setattr(generation, "can_leave", lambda model: False)
    assert continuations(model, tokenizer, rows, batch_size=size, **OPTIONS) == texts
    assert left < counted["rows"] or size == 1
    assert texts == alone(model, tokenizer, **OPTIONS)
    assert len({len(text.text) for text in texts}) > 5
    assert {text.ended for text in texts} == {True, False}


@pytest.mark.slow
def test_stop_strings_and_lines_end_rows_of_joined_batches(model, tokenizer):
    model = frequent_ends(model, tokenizer)
    rows = rows_of(tokenizer)
    free = continuations(model, tokenizer, rows, batch_size=8, **OPTIONS)
    pieces = Counter(piece for text in free for piece in set(re.findall("[a-z]{2}", text.text)))
    words = [p for p, _ in pieces.most_common() if len(tokenizer(p)["input_ids"]) > 1]
    for one_line in (False, True):
        options = {"max_new_tokens": 24, "ends": words[:3], "one_line": one_line}
        texts = continuations(model, tokenizer, rows, batch_size=8, **options)
        assert texts == alone(model, tokenizer, **options)
        assert texts != free
        assert not any(word in text.text for text in texts for word in words[:3])


def test_adapters_decode_the_same_in_every_batch(tokenizer):
    config = RotMoleConfig(
        num_experts=4, r=2, target_modules=["q_proj", "k_proj", "v_proj"], init_weights=False
    )
    model = get_peft_model(frequent_ends(make_model(tokenizer), tokenizer), config).double().eval()
    texts = continuations(model, tokenizer, rows_of(tokenizer), batch_size=8, **OPTIONS)
    assert texts == alone(model, tokenizer, **OPTIONS)


def test_rows_leave_a_sliding_window_too(tokenizer):
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=8,
        initializer_range=0.3, eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = frequent_ends(Gemma2ForCausalLM(config).eval(), tokenizer)
    assert can_leave(model)
    texts = continuations(model, tokenizer, rows_of(tokenizer), batch_size=8, **OPTIONS)
    assert texts == alone(model, tokenizer, **OPTIONS)


def test_models_without_such_a_cache_keep_their_rows(tokenizer, model):
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 1}
    assert not can_leave(MambaForCausalLM(MambaConfig(**sizes)))
    assert can_leave(model)
    prompted = get_peft_model(
        model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    assert not can_leave(prompted)


def test_batches_fit_into_memory(tokenizer, model, monkeypatch):
    rows = rows_of(tokenizer)
    expected = continuations(model, tokenizer, rows, batch_size=8, **OPTIONS)
    sizes = []
    decoded = generation.decoded

    def watched(*arguments, size, **options):
        sizes.append(size)
        return decoded(*arguments, size=size, **options)

    monkeypatch.setattr(generation, "decoded", watched)
    # 2 layers of keys and values, 2 heads of 8 numbers of 8 bytes
    each = generation.token_bytes(model)
    assert each == 2 * 2 * 2 * 8 * 8
    longest = max(map(len, rows))
    needs = 2 * each * (longest + 24) + longest * generation.pass_bytes(model, logits=False)
    monkeypatch.setattr("rotmole.models.room.free_memory", lambda device: 2 * 3 * needs + 10)
    assert continuations(model, tokenizer, rows, batch_size=8, **OPTIONS) == expected
    assert set(sizes) == {3}
