"""Two adapters with one start: A, B and router equal by name, rotation gates left alone."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

import tiny
from rotmole import RotMoleConfig
from rotmole.errors import AdapterError
from rotmole.training.start import load_start, save_start, shared_parameters, start_digest


def adapted(seed: int, **settings: object) -> torch.nn.Module:
    model = tiny.llama()
    torch.manual_seed(seed)
    config = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_weights": False} | settings
    return get_peft_model(model, RotMoleConfig(**config))


def test_the_twin_takes_over_the_start(tmp_path):
    # plane draws its vector gates too, so that equal seeds alone would not give equal starts
    ours, twin = adapted(0, rotation="plane"), adapted(0, rotation="none")
    assert start_digest(ours) != start_digest(twin)
    save_start(ours, tmp_path / "start.safetensors")
    load_start(twin, tmp_path / "start.safetensors")
    assert start_digest(ours) == start_digest(twin)
    theirs = dict(shared_parameters(ours))
    for name, value in shared_parameters(twin):
        assert torch.equal(value, theirs[name]), name
    names = {name.rpartition(".")[2] for name in theirs}
    assert names == {"expert_A", "expert_B", "router_weight"}


def test_adapters_of_other_shapes_share_nothing(tmp_path):
    save_start(adapted(0), tmp_path / "start.safetensors")
    with pytest.raises(AdapterError, match="same experts, rank and modules"):
        load_start(adapted(0, r=8), tmp_path / "start.safetensors")
