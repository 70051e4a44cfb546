"""Methods of a comparison start alike where their shapes agree, whatever gates they have."""

from __future__ import annotations

import torch
from peft import get_peft_model

import tiny
from rotmole import RotMoleConfig
from rotmole.training.start import draw_by_layer


def adapted(**settings: object) -> torch.nn.Module:
    torch.manual_seed(0)
    config = RotMoleConfig(r=4, target_modules=["q_proj", "v_proj"], **settings)
    return get_peft_model(tiny.llama(), config)


def drawn(model: torch.nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    draw_by_layer(model, seed)
    named = model.named_parameters()
    return {n: p.detach().clone() for n, p in named if "expert_A" in n or "router" in n}


def test_methods_with_other_gates_have_the_same_start():
    plane, none = adapted(rotation="plane"), adapted(rotation="none")  # plane draws its gates too
    before = [dict(model.named_parameters()) for model in (plane, none)]
    names = [n for n in before[0] if "expert_A" in n]
    assert any(not torch.equal(before[0][n], before[1][n]) for n in names)
    one, other = drawn(plane), drawn(none)
    assert one.keys() == other.keys()
    assert {n.rpartition(".")[2] for n in one} == {"expert_A", "router_weight"}
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_layers_and_seeds_differ():
    model = adapted(rotation="none")
    first, again, second = drawn(model), drawn(model), drawn(model, 1)
    values = [value for name, value in first.items() if "expert_A" in name]
    assert not torch.equal(values[0], values[1])
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert not torch.equal(value, second[name])
