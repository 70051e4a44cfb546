"""With one expert and no rotation the method is PEFT's LoRA, parameter for parameter."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny
from rotmole import RotMoleConfig

TARGETS = ["q_proj", "v_proj", "down_proj"]


def _copy_weights(ours: torch.nn.Module, theirs: torch.nn.Module) -> dict[str, str]:
    """Copy LoRA's factors into the single expert; return {our parameter: LoRA's}."""
    pairs = {}
    parameters = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if not parameter.requires_grad:
            continue
        stem = name.split(".rotmole_experts.")[0]
        letter = name[-1]
        other = f"{stem}.lora_{letter}.default.weight"
        value = parameters[other].data
        parameter.data = (value if letter == "A" else value.T).unsqueeze(0).clone()
        pairs[name] = other
    return pairs


@pytest.mark.parametrize("use_rslora", [False, True])
def test_one_expert_without_rotation_equals_lora_forward_and_every_gradient(
    use_rslora: bool,
) -> None:
    base = tiny.llama().double()
    shared = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "use_rslora": use_rslora}
    lora = get_peft_model(copy.deepcopy(base), LoraConfig(init_lora_weights=False, **shared))
    ours = get_peft_model(
        copy.deepcopy(base), RotMoleConfig(num_experts=1, rotation="none", **shared)
    )
    pairs = _copy_weights(ours, lora)
    assert ours.get_nb_trainable_parameters() == lora.get_nb_trainable_parameters()
    ids = tiny.tokens(3, 11)
    outputs = {}
    for name, model in (("lora", lora), ("ours", ours)):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        outputs[name] = model(input_ids=ids).logits
    torch.testing.assert_close(outputs["ours"], outputs["lora"], rtol=1e-12, atol=1e-13)
    assert (outputs["ours"] - base(input_ids=ids).logits).abs().max() > 1e-3
    reference = dict(lora.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            gradient = reference[pairs[name]].grad
            gradient = gradient if name.endswith("A") else gradient.T
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad[0], gradient, rtol=1e-12, atol=1e-14)


def test_one_expert_creates_no_router() -> None:
    model = get_peft_model(
        tiny.llama(), RotMoleConfig(num_experts=1, rotation="none", target_modules=TARGETS)
    )
    assert not [name for name, _ in model.named_parameters() if "router" in name]


def test_gates_are_counted_as_trainable_parameters() -> None:
    config = RotMoleConfig(r=4, num_experts=3, rotation="tangent", target_modules=["q_proj"])
    trainable, _ = get_peft_model(tiny.llama(), config).get_nb_trainable_parameters()
    width, experts, rank = 32, 3, 4
    factors = experts * rank * (width + width)
    gates = experts * width + experts * rank * width
    assert trainable == 2 * (factors + gates)  # two layers
