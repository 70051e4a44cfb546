"""Whether rows of one sequence see each other is tried, for models that do and that do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import get_peft_model

import tiny
import tiny_folders
from rotmole import RotMoleConfig
from rotmole.config.schema import ModelSection
from rotmole.errors import ModelError
from rotmole.models import rows_apart
from rotmole.models.rows_apart import check_rows_apart, check_without_weights

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2}
BLOOM = {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}
CONFIGS: dict[str, tuple[hf.PretrainedConfig, str]] = {
    "llama": (hf.LlamaConfig(**LLAMA), ""),
    "gpt2": (tiny.gpt2().config, ""),
    "gemma3": (
        hf.Gemma3TextConfig(
            **LLAMA, head_dim=8, sliding_window=3,
            layer_types=["sliding_attention", "full_attention"],
        ),
        "",
    ),
    "qwen2-moe": (
        hf.Qwen2MoeConfig(**LLAMA, num_experts=4, moe_intermediate_size=16,
                          shared_expert_intermediate_size=16), "",
    ),
    "opt": (hf.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32), "lets them see each other"),
    "falcon": (hf.FalconConfig(**SIZES), "lets them see each other"),
    "bloom": (hf.BloomConfig(**BLOOM), "takes no positions"),
    "mamba2": (
        hf.Mamba2Config(hidden_size=32, num_heads=4, head_dim=16, expand=2, state_size=8,
                        n_groups=1, num_hidden_layers=2, vocab_size=96, chunk_size=8),
        "takes no positions",
    ),
    "lfm2": (hf.Lfm2Config(**LLAMA, layer_types=["conv", "full_attention"]), "cannot read them"),
}  # fmt: skip


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_models_that_keep_rows_apart_and_that_do_not(name: str, flat: bool, tmp_path: Path) -> None:
    """With weights, and from the configuration alone, as `rotmole check` looks at it."""
    config, reason = CONFIGS[name]
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(tmp_path)
    tiny_folders.tokenizer().save_pretrained(tmp_path)
    section = ModelSection(name=str(tmp_path))
    if not reason:
        check_rows_apart(model, flat=flat)
        assert check_without_weights(section, flat=flat)
        return
    for look in (
        lambda: check_rows_apart(model, flat=flat),
        lambda: check_without_weights(section, flat=flat),
    ):
        with pytest.raises(ModelError, match=reason):
            look()


def test_looking_leaves_a_model_as_it_was() -> None:
    """The adapter is left out, and every module stays in its own mode."""
    settings = {"r": 4, "num_experts": 2, "target_modules": ["q_proj"], "init_weights": False}
    model = get_peft_model(tiny.llama(), RotMoleConfig(**settings)).train()
    layers = model.get_base_model().model.layers
    layers[1].eval()
    layer, seen = layers[0].self_attn.q_proj, []
    layer.register_forward_hook(lambda *_: seen.append((layer.disable_adapters, layer.training)))
    check_rows_apart(model, flat=False)
    assert seen == [(True, False)] * 3
    assert layers[0].training
    assert not layers[1].training
    assert not layer.disable_adapters


def test_a_model_too_large_to_be_tried_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_apart, "LARGEST", 10)
    tiny_folders.write_model(tmp_path)
    assert not check_without_weights(ModelSection(name=str(tmp_path)), flat=False)
