"""Parameter groups: by role, complete, with the rates asked for."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import tiny
from rotmole import RotMoleConfig, parameter_groups


@pytest.fixture
def model() -> PeftModel:
    config = RotMoleConfig(
        r=4, rotation="plane", target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    return get_peft_model(tiny.llama(), config)


def test_every_trainable_parameter_is_in_one_group(model: PeftModel) -> None:
    groups = parameter_groups(model, lr=1.0)
    listed = [id(p) for group in groups for p in group["params"]]
    trainable = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(listed) == sorted(trainable)
    torch.optim.AdamW(groups)


def test_rates_follow_the_roles(model: PeftModel) -> None:
    groups = parameter_groups(
        model, lr=1e-3, scaling_gate_lr=1e-4, rotation_gate_lr=1e-5, lora_plus_ratio=16
    )
    names = {id(p): n for n, p in model.named_parameters()}
    rates = {names[id(p)].rpartition(".")[2]: g["lr"] for g in groups for p in g["params"]}
    assert rates == {
        "expert_A": 1e-3,
        "expert_B": 16e-3,
        "router_weight": 1e-4,
        "rotation_vector": 1e-5,
        "rotation_angle": 1e-5,
        "weight": 1e-3,
    }
    assert {g["role"] for g in groups} == {
        "expert", "expert_B", "scaling_gate", "rotation_gate", "other",
    }  # fmt: skip


def test_roles_do_not_depend_on_names_of_the_base_model() -> None:
    base = torch.nn.ModuleDict(
        {"router_weight": torch.nn.Linear(4, 4), "gate": torch.nn.Linear(4, 4)}
    )
    base.forward = lambda x: base["gate"](base["router_weight"](x))
    config = RotMoleConfig(r=2, target_modules=["gate"], modules_to_save=["router_weight"])
    model = get_peft_model(base, config)
    groups = {g["role"]: g for g in parameter_groups(model, lr=1.0, scaling_gate_lr=0.5)}
    assert len(groups["scaling_gate"]["params"]) == 1
    assert groups["other"]["lr"] == 1.0


def test_weight_decay_spares_vectors_and_a_plain_lora_model_works() -> None:
    lora = get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"], bias="none"))
    (group,) = parameter_groups(lora, lr=1.0, weight_decay=0.1)
    assert group["role"] == "other"
    base = tiny.gpt2()
    base.requires_grad_(True)
    decays = {g["weight_decay"] for g in parameter_groups(base, lr=1.0, weight_decay=0.1)}
    assert decays == {0.0, 0.1}


def test_groups_are_the_same_whatever_the_rates_are() -> None:
    """So that an optimizer's state, which knows them by number, fits a run with other rates."""
    base = tiny.gpt2()
    base.requires_grad_(True)
    groupings = [
        [[id(p) for p in g["params"]] for g in parameter_groups(base, lr=1.0, weight_decay=decay)]
        for decay in (0.0, 0.1)
    ]
    assert groupings[0] == groupings[1]
