"""AdaMoLE (arXiv 2405.00361; github.com/zefang-liu/AdaMoLE): threshold selection.

Loaded in isolation: src/lora/layer.py, src/mole/layer.py and src/adamole/layer.py, with empty
packages in place of their __init__ files (those import the whole of an older PEFT).
"""

from __future__ import annotations

import torch
from common import D, E, O, R, T, checkout, compare, finish, gradients, isolated, load, ours
from torch import nn

from rotmole.ops import load_balance_loss, route

path = checkout(__doc__)
isolated("original", path / "src", "lora", "mole", "adamole")
load("original.lora").LoraLayer = load("original.lora.layer").LoraLayer
original = load("original.adamole.layer")

base = nn.Linear(D, O).double()
layer = ours(base, selection="threshold", lora_alpha=6)
theirs = original.LinearAdaMoleLayer(
    base, "default", lora_rank=R, lora_alpha=6, num_experts=E
).double()
own = layer.experts("default")
with torch.no_grad():
    own.router_threshold_weight.mul_(5)  # so that tokens differ in how many experts they select
    theirs.lora_gating["default"].weight.copy_(own.router_weight)
    theirs.lora_threshold["default"].weight.copy_(own.router_threshold_weight.reshape(1, D))
    theirs.lora_threshold["default"].bias.copy_(own.router_threshold_bias.reshape(1))
    for e in range(E):
        theirs.lora_A["default"][e].weight.copy_(own.expert_A[e])
        theirs.lora_B["default"][e].weight.copy_(own.expert_B[e].T)

x = torch.randn(2, T // 2, D, dtype=torch.float64, requires_grad=True)
found = gradients(
    layer(x),
    {"x": x, "A": own.expert_A, "B": own.expert_B, "router": own.router_weight,
     "threshold": own.router_threshold_weight, "threshold bias": own.router_threshold_bias},
)  # fmt: skip
A = [m.weight for m in theirs.lora_A["default"]]
B = [m.weight for m in theirs.lora_B["default"]]
gate, threshold = theirs.lora_gating["default"], theirs.lora_threshold["default"]
leaves = {"x": x, "router": gate.weight, "threshold": threshold.weight,
          "threshold bias": threshold.bias}  # fmt: skip
leaves |= {f"A{e}": A[e] for e in range(E)} | {f"B{e}": B[e] for e in range(E)}
wanted = gradients(theirs(x), leaves)
wanted["gradient of A"] = torch.stack([wanted.pop(f"gradient of A{e}") for e in range(E)])
wanted["gradient of B"] = torch.stack([wanted.pop(f"gradient of B{e}").T for e in range(E)])

_, routing = route(own.spec, x.flatten(0, 1), own.weights())
counts = routing.selected_TE.sum(-1)
print(f"  experts a token selects: {counts.min().item()} to {counts.max().item()}")
loss = theirs.moe_layer["default"].layer_loss
found["balance loss"] = load_balance_loss(routing.probability_TE, routing.selected_TE)
wanted["balance loss"] = loss.detach()
# the same loss from ours: theirs takes p - tau for p, and choices per token, not shares of choices
tau = torch.sigmoid(threshold(x.flatten(0, 1))) / E
same = load_balance_loss(routing.probability_TE - tau, routing.selected_TE) * counts.sum() / T
found["balance loss, converted"] = same
wanted["balance loss, converted"] = loss.detach()
reasons = {
    "balance loss": "src/adamole/layer.py: layer_loss = get_layer_loss(gate_logits="
    "adapted_gate_logits): p - tau in place of p, and counts over tokens, not over choices"
}
finish(compare(found, wanted, reasons))
