"""Riemannian MoE-LoRA (arXiv 2502.15828; github.com/THUDM/MoELoRA_Riemannian).

Loaded in isolation: moe_lora.py (a subclass of the installed PEFT's LoRA layer) and
custom_optimizer.py. It has no balance loss.
"""

from __future__ import annotations

import contextlib
import io

import torch
from common import D, E, O, R, T, checkout, compare, finish, gradients, isolated, load, ours
from peft import LoraConfig, get_peft_model
from torch import nn

from rotmole.optim import RiemannianAdamW, RiemannianSGD

path = checkout(__doc__)
isolated("original", path)
moe_lora, optimizers = load("original.moe_lora"), load("original.custom_optimizer")
K = 2


def pair(strategy: str) -> tuple[nn.Module, nn.Module]:
    """Make ours and theirs with equal weights, all of them float64."""
    holder = nn.Sequential(nn.Linear(D, O)).double()
    lora = get_peft_model(holder, LoraConfig(r=R, lora_alpha=6, target_modules=["0"]))
    theirs = lora.base_model.model[0].double()
    theirs.__class__ = moe_lora.MoELoRA  # as its training scripts do
    theirs.set_moe(number_experts=E, top_k=K)
    theirs.double()
    theirs.descent_strategy = strategy
    base = nn.Linear(D, O).double()
    base.load_state_dict(theirs.base_layer.state_dict())
    sqrt_gate = strategy == "moe-riemannian"
    layer = ours(base, top_k=K, lora_alpha=6, router_sqrt_gate=sqrt_gate)
    own = layer.experts("default")
    with torch.no_grad():
        theirs.gate.weight.copy_(own.router_weight)
        for e in range(E):
            theirs.lora_A[e].weight.copy_(own.expert_A[e])
            theirs.lora_B[e].weight.copy_(own.expert_B[e].T)
    return layer, theirs


def factors(theirs: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return its A and B of every expert."""
    return [m.weight for m in theirs.lora_A], [m.weight for m in theirs.lora_B]


def sides(layer: nn.Module, theirs: nn.Module, x: torch.Tensor) -> tuple[dict, dict]:
    """Return output and gradients of both."""
    own, (A, B) = layer.experts("default"), factors(theirs)
    found = gradients(
        layer(x), {"x": x, "A": own.expert_A, "B": own.expert_B, "router": own.router_weight}
    )
    leaves = {"x": x, "router": theirs.gate.weight}
    leaves |= {f"A{e}": A[e] for e in range(E)} | {f"B{e}": B[e] for e in range(E)}
    wanted = gradients(theirs(x), leaves)
    wanted["gradient of A"] = torch.stack([wanted.pop(f"gradient of A{e}") for e in range(E)])
    wanted["gradient of B"] = torch.stack([wanted.pop(f"gradient of B{e}").T for e in range(E)])
    return found, wanted


right = True
x = torch.randn(2, T // 2, D, dtype=torch.float64, requires_grad=True)
for strategy in ("riemannian", "moe-riemannian"):
    print(f"descent strategy {strategy} (sqrt-gate {strategy == 'moe-riemannian'}):")
    right &= compare(*sides(*pair(strategy), x))

for name in ("SGDr", "AdamWr"):
    print(f"one step of {name}:")
    layer, theirs = pair("moe-riemannian")
    own, (A, B) = layer.experts("default"), factors(theirs)
    for module in (layer, theirs):
        module(x).square().mean().backward()
    for parameter in (*A, *B, own.expert_A, own.expert_B):
        parameter.requires_grad_()
    with contextlib.redirect_stdout(io.StringIO()):
        options = {} if name == "SGDr" else {"correct_bias": True, "eps": 1e-20}
        kind = getattr(optimizers, name)
        kind.number_experts = E
        their_optimizer = kind([*A, *B], lr=1e-2, **options)
    mine = {"SGDr": RiemannianSGD, "AdamWr": RiemannianAdamW}[name]
    options = {} if name == "SGDr" else {"weight_decay": 0.0, "eps": 1e-20}
    old_B = own.expert_B.detach().clone()
    mine([own.expert_A, own.expert_B], model=layer, lr=1e-2, **options).step()
    their_optimizer.step()
    reasons = {}
    if name == "AdamWr":
        reasons["B after the step"] = (
            "custom_optimizer.py: c1 = p1.data, then p1.data.addcdiv_(...), then "
            "torch.inverse(c1@c1.T ...): B is preconditioned with the new A (its SGDr uses the old)"
        )
    found = {name: getattr(own, f"expert_{name[0]}").detach().clone()
             for name in ("A after the step", "B after the step")}  # fmt: skip
    wanted = {"A after the step": torch.stack([a.detach() for a in A]),
              "B after the step": torch.stack([b.detach().T for b in B])}  # fmt: skip
    if name == "AdamWr":  # the same from ours: the old B, once more, beside the A of after the step
        own.expert_B.data.copy_(old_B)
        mine([own.expert_A, own.expert_B], model=layer, lr=1e-2, **options).step()
        found["B beside the new A"] = own.expert_B
        wanted["B beside the new A"] = wanted["B after the step"]
    right &= compare(found, wanted, reasons)
finish(right)
