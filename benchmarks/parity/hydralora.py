"""HydraLoRA (arXiv 2404.19245; github.com/Clin0212/HydraLoRA): one A, a softmax over every B.

Loaded in isolation: HydraLoRA/peft/tuners/lora.py, with a stand-in for its ..utils (configuration
classes and a transpose, none of which the layer's forward pass uses but the transpose).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from common import D, E, O, R, T, checkout, compare, finish, gradients, isolated, load, ours
from torch import nn


@dataclass
class Config:
    """Stand-in for PeftConfig."""


path = checkout(__doc__)
isolated("original", path / "HydraLoRA" / "peft", "utils", "tuners")
utils = load("original.utils")
utils.PeftConfig = Config
utils.PeftType = enum.Enum("PeftType", "LORA")
utils.transpose = lambda weight, fan_in_fan_out: weight.T if fan_in_fan_out else weight
original = load("original.tuners.lora")

right = True
for dtype in (torch.float64, torch.float32):
    theirs = original.Linear(D, O, r=R, lora_alpha=6, lora_nums=E).to(dtype)
    base = nn.Linear(D, O).to(dtype)
    layer = ours(base, dtype, selection="dense", share_A=True, lora_alpha=6)
    own = layer.experts("default")
    with torch.no_grad():
        theirs.weight.copy_(base.weight)
        theirs.bias.copy_(base.bias)
        theirs.lora_A.weight.copy_(own.expert_A[0])
        theirs.lora_route.weight.copy_(own.router_weight)
        for e in range(E):
            getattr(theirs, f"lora_B{e}").weight.copy_(own.expert_B[e].T)
    x = torch.randn(2, T // 2, D, dtype=dtype, requires_grad=True)
    found = gradients(
        layer(x), {"x": x, "A": own.expert_A, "B": own.expert_B, "router": own.router_weight}
    )
    leaves = {"x": x, "A": theirs.lora_A.weight, "router": theirs.lora_route.weight}
    leaves |= {f"B{e}": getattr(theirs, f"lora_B{e}").weight for e in range(E)}
    y, loss = theirs(x)
    wanted = gradients(y, leaves)
    wanted["gradient of B"] = torch.stack([wanted.pop(f"gradient of B{e}").T for e in range(E)])
    print(f"  its balance loss is {loss.item()} (it has none)")
    line = "peft/tuners/lora.py: softmax(self.lora_route(x), dim=-1, dtype=torch.float32)"
    right &= compare(found, wanted, {} if dtype == torch.float32 else dict.fromkeys(wanted, line))
    if dtype == torch.float64:  # the same with that one line's cast undone

        def softmax(z: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.softmax(z, dim)

        plain, original.nn.functional.softmax = original.nn.functional.softmax, softmax
        print("  with that softmax in float64:")
        y, _ = theirs(x)
        original.nn.functional.softmax = plain
        wanted = gradients(y, leaves)
        wanted["gradient of B"] = torch.stack([wanted.pop(f"gradient of B{e}").T for e in range(E)])
        right &= compare(found, wanted)
finish(right)
