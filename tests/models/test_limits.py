from __future__ import annotations

import warnings

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from rotmole import RotMoleConfig
from rotmole.errors import DataError, ModelError
from rotmole.models.limits import Window, check_readable, check_vocabulary, window_of
from tiny_folders import tokenizer

COMMON = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 32,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 96, "n_positions": 32}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32}
NEO = {"num_layers": 1, "num_heads": 4, "attention_types": [[["global"], 1]]}
MPT = {"d_model": 32, "n_heads": 4, "n_layers": 1, "vocab_size": 96, "max_seq_len": 32}
FALCON = {"num_hidden_layers": 1, "vocab_size": 96, "num_attention_heads": 4, "hidden_size": 32}
MAMBA = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 96, "state_size": 4}


def rope(kind: str, **values: object) -> dict:
    return {"rope_scaling": {"rope_type": kind, **values}}


def model_of(kind: str, settings: dict, device: str = "cpu"):
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gpt2", GPT2), ("gpt_bigcode", GPT2), ("gptj", GPT2 | {"rotary_dim": 4}),
        ("codegen", GPT2 | {"rotary_dim": 4}), ("ctrl", GPT2 | {"dff": 48}),
        ("openai-gpt", GPT2), ("opt", COMMON | OPT), ("gpt_neo", COMMON | NEO), ("mpt", MPT),
        ("biogpt", COMMON),
        ("roberta", COMMON | {"max_position_embeddings": 34, "is_decoder": True}),
    ],
)  # fmt: skip
def test_tables_of_positions_end_where_the_model_fails(kind, settings):
    model = model_of(kind, settings)
    assert window_of(model) == Window(32, fixed=True)
    ids = torch.randint(3, 90, (1, 33))
    with torch.no_grad():
        model(ids[:, :32])
        with pytest.raises((IndexError, RuntimeError)):
            model(ids)


@pytest.mark.parametrize(
    ("kind", "settings", "positions"),
    [
        ("llama", {}, 32),
        ("mistral", {"sliding_window": 8}, 32),
        ("gpt_neox", {}, 32),
        ("qwen2", rope("yarn", factor=4.0), 128),
        ("llama", rope("yarn", factor=2.0, original_max_position_embeddings=16), 32),
        ("llama", rope("dynamic", factor=2.0), 64),
        ("llama", rope("linear", factor=2.0), 64),
        ("gemma3_text", {"head_dim": 8}, 32),
    ],
)
def test_rotary_positions_go_on_behind_what_the_model_was_made_for(kind, settings, positions):
    assert window_of(model_of(kind, COMMON | settings)) == Window(positions, fixed=False)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("falcon", FALCON | {"alibi": True}), ("bloom", FALCON), ("mamba", MAMBA)],
)
def test_models_without_positions_have_no_window(kind, settings):
    assert window_of(model_of(kind, settings)) is None


def test_an_adapter_and_a_model_without_weights_change_nothing():
    model = model_of("gpt2", GPT2, "meta")
    assert window_of(model) == Window(32, fixed=True)
    config = RotMoleConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], r=4)
    assert window_of(get_peft_model(model, config)) == Window(32, fixed=True)


@pytest.fixture(scope="module")
def words():
    return tokenizer(size=300, specials=["<|im_start|>"])


def test_a_row_that_is_too_long_is_named_with_both_numbers(words):
    model = model_of("gpt2", GPT2)
    check_readable(model, words, [("a: row 1", [3] * 32)])
    check_readable(model, words, [("a: row 1", [3] * 28)], new_tokens=4)
    with pytest.raises(DataError) as caught:
        check_readable(model, words, [("a: row 1", [3] * 33), ("a: row 2", [3] * 141)])
    assert str(caught.value) == (
        "a: row 2: 141 tokens are more than the 32 positions of the model; set training.max_length:"
        " 32, with long_rows: cut to drop the start of prompts (2 rows are affected)."
    )
    with pytest.raises(DataError, match=r"29 tokens and 4 new ones are more than the 32 positions"):
        check_readable(model, words, [("a: row 1", [3] * 29)], new_tokens=4)


def test_rows_past_the_window_of_rotary_positions_warn_once():
    model = model_of("llama", COMMON)
    with pytest.warns(
        UserWarning, match=r"b: row 9: 40 tokens .* 32 positions .*max_position"
    ) as w:
        check_readable(model, None, [("b: row 9", [3] * 40), ("b: row 10", [3] * 33)])
    assert len(w) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_readable(model_of("falcon", FALCON | {"alibi": True}), None, [("c", [3] * 9000)])


def test_a_token_that_the_model_does_not_embed_is_named(words):
    model = model_of("gpt2", GPT2)
    token = 250
    with pytest.raises(DataError) as caught:
        check_readable(model, words, [("a: row 1", [3, 95]), ("a: row 2", [3, token])])
    name = words.convert_ids_to_tokens(token)
    said = f"a: row 2: token {token} ({name!r}) is none of the 96 tokens that the model embeds"
    assert str(caught.value).startswith(said)
    with pytest.raises(ModelError, match=r"'m': the tokenizer has token .* embeds only 96 tokens"):
        check_vocabulary(model, words, "m")


def test_a_special_token_that_no_text_has_is_no_fault(words):
    size = len(words)
    words.add_special_tokens({"additional_special_tokens": ["<|extra|>"]})
    model = model_of("gpt2", GPT2 | {"vocab_size": size})
    check_vocabulary(model, words, "m")
    (token,) = words("<|extra|>")["input_ids"]
    with pytest.raises(DataError, match=rf"token {token} \('<\|extra\|>'\)"):
        check_readable(model, words, [("a: row 1", [token])])
    check_readable(model, words, [("a: row 1", [])])
    assert isinstance(window_of(model), Window)
