"""torch.func, forward mode and in-place changes: what works with PEFT's LoRA works here."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LongformerConfig,
    LongformerModel,
)

import tiny
from rotmole import RotMoleConfig
from rotmole.tuner.layer import Linear

SETTINGS: dict[str, dict[str, Any]] = {
    "fused": {},
    "grouped": {"dispatch": "grouped"},
    "dense": {"rotation": "plane", "rotation_metric": "output"},
    "sqrt_gate": {"router_sqrt_gate": True},
    "sigmoid": {"scoring": "sigmoid"},
    "givens": {"rotation": "givens"},
    "dropout": {"lora_dropout": 0.5},
    "losses": {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.1},
    "bias": {"router_bias_rate": 0.1},
}
every = pytest.mark.parametrize("name", SETTINGS)


def adapted(name: str = "fused") -> PeftModel:
    torch.manual_seed(0)
    fields = {"r": 4, "num_experts": 4, "target_modules": ["q_proj", "down_proj"]}
    config = RotMoleConfig(**(fields | {"init_weights": False} | SETTINGS[name]))
    model = get_peft_model(tiny.llama().double(), config).double()
    return model.train(name != "dropout")


def layer_of(model: PeftModel) -> Linear:
    return next(m for m in model.modules() if isinstance(m, Linear))


def trained(module: torch.nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in module.named_parameters() if p.requires_grad}


@every
def test_gradients_of_a_functional_call(name: str) -> None:
    model, ids = adapted(name), tiny.tokens(2, 7)
    parameters = trained(model)

    def loss(values: dict[str, Tensor]) -> Tensor:
        inputs = {"input_ids": ids, "labels": ids}
        result: Tensor = functional_call(model, values, kwargs=inputs).loss
        return result

    found = grad(loss)({n: p.detach() for n, p in parameters.items()})
    loss(parameters).backward()
    for key, parameter in parameters.items():
        assert torch.allclose(found[key], parameter.grad, rtol=0, atol=1e-12), key


@every
def test_gradients_sample_by_sample(name: str) -> None:
    layer = layer_of(adapted(name))
    x, values = torch.randn(3, 5, layer.in_features).double(), trained(layer)

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, values, (x[None],)).square().sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a layer by itself knows no batch
        each = vmap(grad(loss), in_dims=(None, 0), randomness="different")(values, x)
        for i in range(3):
            layer.zero_grad()
            loss(values, x[i]).backward()
            for key, parameter in values.items():
                assert torch.allclose(each[key][i], parameter.grad, rtol=0, atol=1e-9), key


def tangent_of(function: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    """The derivative along v, by central differences."""
    step = 1e-6
    return (function(x + step * v) - function(x - step * v)) / (2 * step)


@every
def test_forward_mode(name: str) -> None:
    layer = layer_of(adapted(name))
    x, v = torch.randn(2, 3, 5, layer.in_features).double().unbind()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = jvp(layer, (x,), (v,))[1]
        with torch.no_grad():
            wanted = tangent_of(layer, x, v)
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, v))).tangent
    assert torch.allclose(dual, found, rtol=0, atol=1e-12)
    if name != "sqrt_gate":  # whose gradient is no function's
        assert torch.allclose(found, wanted, rtol=0, atol=1e-6)


def test_jacobians_and_hessians() -> None:
    layer = layer_of(adapted())
    x = torch.randn(3, layer.in_features).double()
    found = jacrev(layer)(x)
    wanted = torch.autograd.functional.jacobian(layer, x)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12)

    def loss(x: Tensor) -> Tensor:
        return layer(x).square().sum()

    found, wanted = hessian(loss)(x), torch.autograd.functional.hessian(loss, x)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-9)


def falcon(**settings: Any) -> torch.nn.Module:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return FalconForCausalLM(FalconConfig(bias=False, **sizes, **settings))


def neox() -> torch.nn.Module:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=64, **sizes))


def longformer() -> torch.nn.Module:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LongformerModel(LongformerConfig(intermediate_size=64, attention_window=4, **sizes))


INPLACE = {
    "falcon": (lambda: falcon(parallel_attn=True), ["query_key_value", "dense", "dense_4h_to_h"]),
    "falcon-new": (
        lambda: falcon(new_decoder_architecture=True, num_kv_heads=2),
        ["query_key_value", "dense_4h_to_h"],
    ),
    "neox": (neox, ["query_key_value", "dense_4h_to_h"]),
    "longformer": (longformer, ["query", "key", "value"]),
}


@pytest.mark.parametrize("kind", INPLACE)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*whose rows cannot be matched:UserWarning")
def test_models_that_change_a_layers_output_in_place(kind: str, checkpointing: bool) -> None:
    """The balance loss acts on the routers as its coefficient says, and on nothing else."""
    make, targets = INPLACE[kind]
    ids = tiny.tokens(2, 8) % 64
    grads = []
    for coefficient in (0.0, 0.1, 0.2):
        torch.manual_seed(0)
        base = make()
        config = RotMoleConfig(
            r=4, target_modules=targets, init_weights=False, router_aux_loss_coef=coefficient,
            router_bias_rate=0.1 * (coefficient > 0),
        )  # fmt: skip
        model = get_peft_model(base, config).double().train()
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():  # randomness would hide the difference
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        torch.manual_seed(1)
        outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids))
        outputs[0].square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    moved = 0
    for name, plain in grads[0].items():
        once, twice = grads[1][name] - plain, grads[2][name] - plain
        assert torch.allclose(2 * once, twice, rtol=1e-6, atol=1e-9), name
        moved += bool("router_weight" in name and once.abs().max() > 0)
    assert moved == sum("router_weight" in name for name in grads[0])
