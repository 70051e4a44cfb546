"""LoRAMoE (arXiv 2312.09979; github.com/Ablustrund/LoRAMoE): dense softmax, localised loss.

Loaded in isolation: peft/tuners/lora.py, with a stand-in for its ..utils (configuration classes and
a transpose). Its task type 0 favours the first half of the experts, as our task_id 0 does.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from common import D, E, O, R, T, checkout, compare, finish, gradients, isolated, load, ours
from torch import nn

from rotmole.ops import route
from rotmole.ops.routing.task_balance import task_balance_loss


@dataclass
class Config:
    """Stand-in for PeftConfig."""


path = checkout(__doc__)
isolated("original", path / "peft", "utils", "tuners")
utils = load("original.utils")
utils.PeftConfig = Config
utils.PeftType = enum.Enum("PeftType", "LORA")
utils.transpose = lambda weight, fan_in_fan_out: weight.T if fan_in_fan_out else weight
original = load("original.tuners.lora")

WEIGHT, OFFSET, N = 0.3, 0.2, 4
theirs = original.Linear(
    D, O, r=R, lora_alpha=6, lora_nums=E, blc_alpha=OFFSET, blc_weight=WEIGHT
)  # in float32: it computes softmax and loss there whatever its type
base = nn.Linear(D, O)
layer = ours(base, torch.float32, selection="dense", lora_alpha=6)
own = layer.experts("default")
with torch.no_grad():
    theirs.weight.copy_(base.weight)
    theirs.bias.copy_(base.bias)
    theirs.lora_route.weight.copy_(own.router_weight)
    for e in range(E):
        getattr(theirs, f"lora_A{e}").weight.copy_(own.expert_A[e])
        getattr(theirs, f"lora_B{e}").weight.copy_(own.expert_B[e].T)
x = torch.randn(N, T // N, D, requires_grad=True)
tasks = torch.tensor([0, 1, 1, 0])
found = gradients(
    layer(x), {"x": x, "A": own.expert_A, "B": own.expert_B, "router": own.router_weight}
)
leaves = {"x": x, "router": theirs.lora_route.weight}
leaves |= {f"{n}{e}": getattr(theirs, f"lora_{n}{e}").weight for n in "AB" for e in range(E)}
y, loss = theirs(x, tasks)
wanted = gradients(y, leaves)
wanted["gradient of A"] = torch.stack([wanted.pop(f"gradient of A{e}") for e in range(E)])
wanted["gradient of B"] = torch.stack([wanted.pop(f"gradient of B{e}").T for e in range(E)])

_, routing = route(own.spec, x.flatten(0, 1), own.weights())
rows = torch.arange(N).repeat_interleave(T // N)
mine = WEIGHT * task_balance_loss(routing.weight_TE, rows, tasks, groups=2, offset=OFFSET)
_, loss = theirs(x, tasks)
found["balance loss"], wanted["balance loss"] = mine, loss
(found["its gradient of router"],) = torch.autograd.grad(mine, own.router_weight)
(wanted["its gradient of router"],) = torch.autograd.grad(loss, theirs.lora_route.weight)
finish(compare(found, wanted))
