"""Rates by load: a factor for each expert, from its running share of the tokens' choices."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

import tiny
from rotmole import ConfigError, RotMoleConfig, update_router_bias
from rotmole.optim import ExpertRates, Muon, RiemannianAdamW, RiemannianSGD, parameter_groups
from rotmole.optim.riemannian import expert_modules
from rotmole.tuner.layer import RotMoleLayer

LR = 1e-2
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one A": {"share_A": True, "rotation": "none"},
    "through C": {"rotation": "plane", "rotation_dim": 4},
    "centers": {"rotation": "centroid"},
    "grown": {"experts_added": [1], "selection": "top_p"},
    "biased": {"router_bias_rate": 0.01, "top_k": 1, "norm_topk_prob": False},
    "top_p": {"selection": "top_p", "shared_expert_r": 2, "router": "mlp"},
}


def adapted(**settings: Any) -> PeftModel:
    torch.manual_seed(4)
    fields = {"r": 3, "num_experts": 4, "target_modules": ["q_proj", "down_proj"]}
    return get_peft_model(
        tiny.llama(), RotMoleConfig(**(fields | {"init_weights": False} | settings))
    )


def batch(seed: int) -> dict[str, Tensor]:
    ids = tiny.tokens(3, 7, seed)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def named(model: PeftModel) -> dict[str, RotMoleLayer]:
    return {n: m for n, m in model.named_modules() if isinstance(m, RotMoleLayer)}


def choices(model: PeftModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Count choices by hand, from each layer's input, padding left out."""
    read: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda m, args, n=name: read.update({n: args[0]}))
        for name, layer in named(model).items()
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    kept = inputs["attention_mask"].bool().flatten()
    routed = {
        n: tiny.routing(layer.experts("default"), read[n].flatten(0, 1))
        for n, layer in named(model).items()
    }
    return {n: routing.selected_TE[kept].sum(0).float() for n, routing in routed.items()}


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, torch.optim.AdamW) for name in CASES), ("plain", RiemannianAdamW), ("plain", Muon),
     ("one A", Muon)],
)  # fmt: skip
def test_each_expert_moves_as_by_an_optimizer_with_its_own_rate(name: str, kind: Any) -> None:
    """Beside the same step without rates by load; of two micro-batches, with weight decay."""
    model = adapted(**CASES[name]).train()
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    options = {} if kind is torch.optim.AdamW else {"model": model}
    share = {n: torch.full((4,), 0.25) for n in named(model)}

    def trained(rate: float, by_load: bool) -> dict[str, Tensor]:
        with torch.no_grad():
            for n, p in model.named_parameters():
                if n in start:
                    p.copy_(start[n])
                    p.grad = None
        groups = parameter_groups(model, lr=rate, weight_decay=0.1)
        optimizer = kind(groups, **options)
        rates = ExpertRates(optimizer, model=model, decay=0.5) if by_load else None
        for micro in (0, 1):  # the gradient of two micro-batches
            inputs = batch(micro)
            if rates is not None:
                chosen = choices(model.eval(), inputs)
                for n, count in chosen.items():
                    counted[n] = counted.get(n, torch.zeros(4)) + count
            model.train()(**inputs).loss.backward()
        optimizer.step()
        for module in expert_modules(model):
            module.loads.loads_E = None  # the bias stays
        if rates is not None:
            factors.update(rates.factors())
        return {n: p.detach().clone() for n, p in model.named_parameters() if n in start}

    counted: dict[str, Tensor] = {}
    factors: dict[str, Tensor] = {}
    found = trained(LR, True)
    plain = trained(LR, False)
    for n, count in counted.items():
        share[n] = 0.5 * share[n] + 0.5 * count / count.sum()
        wanted_E = (4 * share[n]).sqrt().clamp(0.25, 2.0)
        torch.testing.assert_close(factors[f"{n}.default"], wanted_E)
    assert len({round(float(f), 3) for factor in factors.values() for f in factor}) > 4
    numbers = {id(p): experts for m in expert_modules(model) for p, experts in m.by_expert()}
    moved = set()
    for n, p in model.named_parameters():
        if n not in start:
            continue
        if id(p) not in numbers:
            assert torch.equal(found[n], plain[n]), n
            continue
        moved.add(n.rpartition(".")[2].removesuffix("_1"))
        factor_E = factors[n.partition(".rotmole_experts")[0] + ".default"]
        for row, factor in enumerate(factor_E[numbers[id(p)]]):
            step = found[n][row] - start[n][row]
            wanted = factor * (plain[n][row] - start[n][row])
            torch.testing.assert_close(step, wanted, rtol=1e-3, atol=1e-6)
    expected = {"expert_B"} | ({"expert_A"} if name != "one A" else set())
    gates = {"plain": {"rotation_vector"}, "through C": {"rotation_vector", "rotation_angle"},
             "centers": {"rotation_center", "rotation_angle"}, "biased": {"rotation_vector"},
             "top_p": {"rotation_vector"}, "grown": {"rotation_vector"}}  # fmt: skip
    assert moved == expected | gates.get(name, set())


@pytest.mark.parametrize("kind", [torch.optim.AdamW, Muon])
def test_a_loaded_state_goes_on_bit_equal(kind: Any) -> None:
    model = adapted(router_bias_rate=0.01)
    options = {} if kind is torch.optim.AdamW else {"model": model}
    start = {n: v.clone() for n, v in model.state_dict().items()}
    states = []
    for stop in (False, True):
        model.load_state_dict(start)
        optimizer = kind(parameter_groups(model, lr=LR), **options)
        ExpertRates(optimizer, model=model)
        for step in range(4):
            if stop and step == 2:
                saved = optimizer.state_dict()
                assert saved["expert_shares"]
                optimizer = kind(parameter_groups(model, lr=LR), **options)
                ExpertRates(optimizer, model=model)
                optimizer.load_state_dict(saved)
                assert "expert_shares" in saved  # the caller's
            model.train()(**batch(step)).loss.backward()
            optimizer.step()
            update_router_bias(model)  # counts of its own
            optimizer.zero_grad()
        states.append({n: v.clone() for n, v in model.state_dict().items()})
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_a_state_without_shares_starts_even_and_one_with_them_loads_without_rates() -> None:
    model = adapted()
    plain = torch.optim.AdamW(parameter_groups(model, lr=LR))
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=LR))
    rates = ExpertRates(optimizer, model=model, decay=0.5)
    model.train()(**batch(0)).loss.backward()
    optimizer.step()
    assert any((f != 1).any() for f in rates.factors().values())
    plain.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(plain.state_dict())
    assert all((f == 1).all() for f in rates.factors().values())


def test_the_limits_hold_and_an_unused_expert_keeps_a_quarter() -> None:
    """hash sends each token where its id says: here all to one expert."""
    model = adapted(router="hash", top_k=1, rotation="none", num_experts=9)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=LR))
    rates = ExpertRates(optimizer, model=model, decay=0.0)
    ids = torch.full((2, 5), 7)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    for factor_E in rates.factors().values():
        assert sorted(factor_E.tolist()) == [0.25] * 8 + [2.0]


def test_the_layers_of_a_block_follow_the_router_of_the_block() -> None:
    model = adapted(
        router_scope="block", rotation="none", num_experts_pattern={"q_proj": 1},
        target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"],
    )  # fmt: skip
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=LR))
    rates = ExpertRates(optimizer, model=model, decay=0.5)
    layers = named(model)
    before = {n: layer.experts("default").expert_B.detach().clone() for n, layer in layers.items()}
    model.train()(**batch(0)).loss.backward()
    optimizer.step()
    assert {n.split(".")[-2] for n in rates.factors()} == {"gate_proj"}
    for name, layer in layers.items():
        length_E = (layer.experts("default").expert_B.detach() - before[name]).flatten(1).abs()
        # Adam's first step is the rate, wherever there is a gradient
        if "q_proj" in name:
            wanted = torch.ones(1)
        else:
            lead = f"{name.rpartition('.')[0]}.gate_proj.default"
            wanted = rates.factors()[lead]
        torch.testing.assert_close(length_E.amax(1), LR * wanted, rtol=1e-3, atol=1e-6)


def test_what_cannot_work_is_said() -> None:
    model = adapted()
    with pytest.raises(ConfigError, match="do not fit SGD"):
        ExpertRates(RiemannianSGD(parameter_groups(model, lr=LR), model=model), model=model)
    with pytest.raises(ConfigError, match=r"decay is 1\.0"):
        ExpertRates(torch.optim.AdamW(model.parameters()), model=model, decay=1.0)
    for settings in ({"num_experts": 1}, {"selection": "dense"}):
        plain = adapted(**settings)
        with pytest.warns(UserWarning, match="rates by load have no effect"):
            ExpertRates(torch.optim.AdamW(plain.parameters()), model=plain)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=LR))
    ExpertRates(optimizer, model=model)
    compiled = torch.compile(model.train(), backend="eager")
    compiled(**batch(0)).loss.backward()
    with pytest.warns(UserWarning, match=r"not inside torch\.compile"):
        optimizer.step()
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error")
        optimizer.step()
    expert_modules(model)[0].expert_A.placements = ()  # as a DTensor has
    with pytest.raises(ConfigError, match="FSDP shards them"):
        optimizer.step()
