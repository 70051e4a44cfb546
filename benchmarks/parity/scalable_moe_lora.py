"""Scalable MoE-LoRA (github.com/attrung/scalable-moe-lora): top-k in rank space, three routers.

Loaded in isolation: src/scalable_moe_lora/adapters/moe.py and routers.py, with an empty package in
place of the __init__ files. Its scale is alpha / top_k, ours lora_alpha / r, so lora_alpha is
chosen to match. Its routers read the input after dropout, ours before it; dropout is off here.
"""

from __future__ import annotations

import torch
from common import D, E, O, R, T, checkout, compare, finish, gradients, isolated, load, ours
from torch import nn

from rotmole.ops import load_balance_loss, route

path = checkout(__doc__)
isolated("original", path / "src" / "scalable_moe_lora" / "adapters")
original = load("original.moe")
K, ALPHA, WIDTH = 2, 5, 6
ROUTERS = {
    "linear": (
        {"router": "linear"},
        {"router_weight": "router.router.weight"},
    ),
    "lowrank": (
        {"router": "attention", "router_dim": WIDTH},
        {"router_query": "router.W_query.weight", "router_key": "router.keys"},
    ),
    "cosine": (
        {"router": "cosine", "router_dim": WIDTH, "router_temperature": 1.0},
        {"router_query": "router.W_query.weight", "router_key": "router.keys"},
    ),
}

right = True
for name, (settings, parameters) in ROUTERS.items():
    print(f"router {name} = our {settings['router']}:")
    base = nn.Linear(D, O).double()
    layer = ours(base, top_k=K, lora_alpha=ALPHA * R / K, **settings)
    theirs = original.MoELoRA(
        D, O, rank=R, alpha=ALPHA, num_experts=E, top_k=K, router_type=name, router_dim=WIDTH
    ).double()
    own = layer.experts("default")
    print("  ours:", {n: tuple(p.shape) for n, p in own.named_parameters()})
    mine = {"A": own.expert_A, "B": own.expert_B}
    mine |= {n: getattr(own, n) for n in own.router_names}
    other = {"A": theirs.A.weight, "B": theirs.B.weight}
    other |= {n: theirs.get_parameter(parameters[n]) for n in own.router_names if n in parameters}
    factor = {n: WIDTH**0.5 if name == "lowrank" and n == "router_query" else 1.0 for n in mine}
    with torch.no_grad():
        theirs.A.weight.copy_(own.expert_A.flatten(0, 1))
        theirs.B.weight.copy_(own.expert_B.flatten(0, 1).T)
        for n, target in other.items():
            if n not in "AB":
                # our attention divides by sqrt(router_dim), theirs does not
                target.copy_(getattr(own, n).reshape(target.shape) / factor[n])
    x = torch.randn(2, T // 2, D, dtype=torch.float64, requires_grad=True)
    mine = {n: p for n, p in mine.items() if n in other}
    found = gradients(layer(x), {"x": x} | mine)
    wanted = gradients(base(x) + theirs(x), {"x": x} | other)
    wanted["gradient of A"] = wanted["gradient of A"].reshape(own.expert_A.shape)
    wanted["gradient of B"] = wanted["gradient of B"].T.reshape(own.expert_B.shape)
    for n in other:
        if n not in "AB":
            wanted[f"gradient of {n}"] = wanted[f"gradient of {n}"] / factor[n]
    logits, routing = route(own.spec, x.flatten(0, 1), own.weights())
    # theirs counts choices per token, so it is K where ours is 1
    found["balance loss"] = K * load_balance_loss(routing.probability_TE, routing.selected_TE)
    wanted["balance loss"] = theirs._last_aux_loss
    right &= compare(found, wanted)
finish(right)
