"""Texts that begin alike in one row: the figures of each text alone, at fewer tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from evaluation_cases import choice_rows, make_model, score_rows
from peft import PromptTuningConfig, get_peft_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rotmole import RotMoleConfig
from rotmole.data.examples import Example
from rotmole.evaluation import scoring
from rotmole.evaluation.prefixes import forests, keeps_apart, tree_of
from rotmole.evaluation.scoring import log_likelihoods, scored_answers, scored_choices
from rotmole.tuner.experts.experts import Experts

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


def other(kind: str, vocabulary: int):
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": vocabulary, "initializer_range": 0.3}
    if kind == "gpt2":
        config = GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=2, n_positions=128)
        return GPT2LMHeadModel(config)
    if kind == "opt":
        return OPTForCausalLM(
            OPTConfig(vocab_size=vocabulary, hidden_size=32, ffn_dim=48, num_hidden_layers=2,
                      num_attention_heads=4, max_position_embeddings=128, word_embed_proj_dim=32,
                      init_std=0.3)
        )  # fmt: skip
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**sizes))
    return Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=8, sliding_window=64))


def texts_of(tokenizer) -> list:
    demonstrated = [
        Example("few", "", str(i), f"a fish can swim. a bird can fly. x{i}:", " a fish",
                choices=(" a fish", " a bird or a bat"), answer=0)
        for i in range(3)
    ]  # fmt: skip
    rows = choice_rows() + score_rows() + demonstrated
    return scored_choices(rows, tokenizer) + scored_answers(rows, tokenizer)


def tokens_read(model, texts, **options) -> tuple[list[float], int]:
    counts = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: counts.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    values = log_likelihoods(model, texts, **options)
    hook.remove()
    return values, sum(counts)


@pytest.mark.parametrize(
    ("kind", "attention", "exact"),
    # eager attention computes its weights in float32
    [("gpt2", "sdpa", 1e-12), ("opt", "sdpa", 1e-12), ("qwen2", "eager", 1e-6),
     ("gemma2", "eager", 1e-6)],
)  # fmt: skip
def test_trees_give_the_figures_of_rows(tokenizer, kind, attention, exact):
    model = other(kind, len(tokenizer)).double().eval()
    model.set_attn_implementation(attention)
    texts = texts_of(tokenizer)
    expected, plain = tokens_read(model, texts, batch_size=4, apart=True)
    values, tree = tokens_read(model, texts, batch_size=4)
    assert tree < 0.6 * plain
    assert values == pytest.approx(expected, rel=exact)


def test_float32_gives_the_figures_that_are_printed(tokenizer):
    model = make_model(tokenizer).float()
    texts = texts_of(tokenizer)
    expected = log_likelihoods(model, texts, batch_size=4, apart=True)
    assert log_likelihoods(model, texts, batch_size=16) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("most", [1, 20, 45, 100_000])
def test_every_size_of_a_pass_gives_the_same(model, tokenizer, monkeypatch, most):
    monkeypatch.setattr(scoring, "TREE_TOKENS", most)
    monkeypatch.setattr(scoring, "_WORTH", 10.0)
    texts = texts_of(tokenizer)
    expected = log_likelihoods(model, texts, batch_size=4, apart=True)
    assert log_likelihoods(model, texts, batch_size=64) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("selection", ["top_k", "top_p"])
def test_adapters_give_the_figures_of_rows(tokenizer, selection):
    config = RotMoleConfig(
        num_experts=4, r=2, selection=selection, target_modules=["q_proj", "down_proj"],
        init_weights=False,
    )  # fmt: skip
    model = get_peft_model(make_model(tokenizer), config).double().eval()
    texts = texts_of(tokenizer)
    expected, plain = tokens_read(model, texts, batch_size=4, apart=True)
    values, tree = tokens_read(model, texts, batch_size=4)
    assert tree < 0.6 * plain
    assert values == pytest.approx(expected, rel=1e-12)
    experts = next(module for module in model.modules() if isinstance(module, Experts))
    experts.spec = replace(experts.spec, selection="expert_choice")
    assert not keeps_apart(model, 10)


def test_models_that_mix_tokens_otherwise_get_rows(tokenizer, model):
    assert keeps_apart(model, 100)
    windowed = other("gemma2", len(tokenizer))
    assert keeps_apart(windowed, 64)
    assert not keeps_apart(windowed, 65)
    windowed.config._attn_implementation = "flash_attention_2"
    assert not keeps_apart(windowed, 64)
    prompted = get_peft_model(
        model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    assert not keeps_apart(prompted, 100)


def test_a_tree_holds_every_text_once():
    texts = [(1, 2), (1, 2, 3), (1, 2, 4, 5), (1, 2, 4, 5), (1, 7)]
    tree = tree_of(texts)
    assert tree.tokens == [1, 2, 3, 4, 5, 7]
    assert tree.positions == [0, 1, 2, 2, 3, 1]
    for text, path in zip(texts, tree.paths, strict=True):
        assert tuple(tree.tokens[place] for place in path) == text
        assert [tree.positions[place] for place in path] == list(range(len(text)))


def test_passes_are_full_and_not_more():
    texts = [(1, 2, 3), (1, 2, 4), (1, 2, 5), (6, 7, 8, 9, 10, 11)]
    passes, total = forests(texts, range(4), 4)
    assert passes == [[0, 1], [2], [3]]
    assert total == 4 + 3 + 6
    assert forests(texts, range(4), 100) == ([[0, 1, 2, 3]], 5 + 6)
