"""What target_modules leave out is said, and layers that are never called are refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

import tiny
from rotmole import ModelError, RotMoleConfig

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}


def qwen3_moe() -> torch.nn.Module:
    sizes = {"moe_intermediate_size": 16, "num_experts": 4, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, **HEADS, **sizes))


def mixtral() -> torch.nn.Module:
    return MixtralForCausalLM(MixtralConfig(**SMALL, **HEADS, num_local_experts=4))


MAMBAS = {
    "mamba": lambda: MambaForCausalLM(MambaConfig(**SMALL, state_size=4)),
    "falcon_mamba": lambda: FalconMambaForCausalLM(FalconMambaConfig(**SMALL, state_size=4)),
    "mamba2": lambda: Mamba2ForCausalLM(
        Mamba2Config(**SMALL, state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=4)
    ),
}


def notices(model: torch.nn.Module, targets: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        get_peft_model(model, RotMoleConfig(r=4, target_modules=targets))
    return [str(w.message) for w in said if "target_modules" in str(w.message)]


@pytest.mark.parametrize("make", [qwen3_moe, mixtral])
def test_fused_experts_that_are_left_out_are_said_once(make: Any) -> None:
    (notice,) = notices(make(), "all-linear")
    assert "'all-linear' leaves out model.layers.0.mlp.experts.gate_up_proj and 3 more" in notice
    (notice,) = notices(make(), ["q_proj", "gate_proj", "w1"])
    assert "no linear layer of the model matches 'gate_proj', 'w1' of target_modules" in notice
    assert "several experts in one tensor" in notice
    assert not notices(make(), ["q_proj", "layers.1.self_attn.v_proj"])


def test_a_target_that_matches_nothing_is_said_and_a_regular_expression_is_not() -> None:
    (notice,) = notices(tiny.llama(), ["q_proj", "w_pack"])
    assert notice.endswith("matches 'w_pack' of target_modules")
    assert not notices(tiny.llama(), r".*\.(q_proj|nothing)")
    assert not notices(tiny.llama(), "all-linear")
    assert not notices(tiny.llama(), None)


@pytest.mark.parametrize("kind", MAMBAS)
@pytest.mark.parametrize("targets", ["all-linear", ["in_proj", "out_proj"]])
def test_layers_that_mamba_never_calls_are_refused_as_for_lora(kind: str, targets: Any) -> None:
    fields = {"target_modules": targets, "task_type": "CAUSAL_LM"}
    with pytest.raises(ValueError, match="incompatible with Mamba"):
        get_peft_model(MAMBAS[kind](), LoraConfig(**fields))
    with pytest.raises(ModelError, match="never calls the layer"):
        get_peft_model(MAMBAS[kind](), RotMoleConfig(**fields))


@pytest.mark.parametrize("kind", MAMBAS)
def test_what_is_left_of_mamba_is_trained_whole(kind: str) -> None:
    model = MAMBAS[kind]()
    excluded = ["out_proj", "conv1d", "dt_proj", "lm_head"]
    config = RotMoleConfig(
        r=4, target_modules="all-linear", exclude_modules=excluded, init_weights=False
    )
    model = get_peft_model(model, config).train()
    ids = torch.arange(12).view(2, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name


def test_dt_proj_of_the_first_mamba_is_refused_though_lora_takes_it() -> None:
    for kind in ("mamba", "falcon_mamba"):
        with pytest.raises(ModelError, match=r"reads the weight of '\S+\.dt_proj'"):
            get_peft_model(MAMBAS[kind](), RotMoleConfig(target_modules=["x_proj", "dt_proj"]))


STATES = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}  # fmt: skip


def test_hybrids_that_peft_does_not_know_are_refused_too() -> None:
    """Their training kernel reads out_proj.weight; Qwen3-Next, which calls it, is not refused."""
    bamba = BambaForCausalLM(BambaConfig(**SMALL, **HEADS, **STATES, attn_layer_indices=[1]))
    with pytest.raises(
        ModelError, match=r"reads the weight of 'model\.layers\.0\.mamba\.out_proj'"
    ):
        get_peft_model(bamba, RotMoleConfig(target_modules=["out_proj"]))
    jamba = JambaForCausalLM(
        JambaConfig(**SMALL, **HEADS, use_mamba_kernels=False, mamba_d_state=4, num_experts=2)
    )
    with pytest.raises(ModelError, match=r"reads the weight of '\S+\.dt_proj'"):
        get_peft_model(jamba, RotMoleConfig(target_modules=["dt_proj"]))
    get_peft_model(jamba, RotMoleConfig(target_modules=["out_proj"], init_weights=False))
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    sizes = {"num_experts": 0, "head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    nextly = Qwen3NextForCausalLM(Qwen3NextConfig(**SMALL, **HEADS, **sizes, **linear))
    get_peft_model(nextly, RotMoleConfig(target_modules=["out_proj"]))


def test_a_mamba_inside_another_model_is_known_by_its_own_type() -> None:
    class Pair(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reader, self.writer = tiny.llama(), MAMBAS["mamba2"]()

    with pytest.raises(ModelError, match=r"reads the weight of 'writer\.backbone"):
        get_peft_model(Pair(), RotMoleConfig(target_modules=["q_proj", "out_proj"]))


def test_a_target_that_another_setting_leaves_out_is_not_missed() -> None:
    model = tiny.llama()
    config = RotMoleConfig(target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        get_peft_model(model, config)
    assert not [w for w in said if "target_modules" in str(w.message)]
