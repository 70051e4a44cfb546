"""GOAT (arXiv 2502.16894; github.com/Facico/GOAT-PEFT): SVD segments, residual, top-k.

Loaded in isolation: goat/peta/src/goat/layer.py, which needs the installed PEFT only. Its start is
made in float32 (the SVD is taken there), so it is compared in float32; the layer with copied
weights is compared in float64. The residual stays in W there, and in buffers here.
"""

from __future__ import annotations

import torch
from common import D, E, O, R, T, checkout, compare, finish, gradients, isolated, load, ours
from torch import nn

from rotmole.ops import load_balance_loss, route

path = checkout(__doc__)
isolated("original", path / "goat" / "peta" / "src" / "goat")
original = load("original.layer")
K, COEFFICIENT = 2, 1 / E


def pair(init_type: str, **settings: object) -> tuple[nn.Module, nn.Module]:
    """Make ours and theirs on one base weight, in float32 as theirs does."""
    base = nn.Linear(D, O)
    twin = nn.Linear(D, O)
    twin.load_state_dict(base.state_dict())
    theirs = original.LinearGOATLayer(
        twin, "default", lora_rank=R * E, lora_alpha=6, num_experts=E, top_k=K,
        init_type=init_type, init_cof=COEFFICIENT,
    )  # fmt: skip
    layer = ours(base, torch.float32, top_k=K, lora_alpha=6, init_weights="svd", **settings)
    return layer, theirs


def sides(layer: nn.Module, theirs: nn.Module, x: torch.Tensor) -> tuple[dict, dict]:
    """Return output, gradients and balance loss of both, the router of ours in both."""
    own, moe = layer.experts("default"), theirs.moe_layer["default"]
    with torch.no_grad():
        moe.gate.weight.copy_(own.router_weight)
    A, B = (list(getattr(theirs, f"lora_{n}")["default"]) for n in "AB")
    found = gradients(
        layer(x), {"x": x, "A": own.expert_A, "B": own.expert_B, "router": own.router_weight}
    )
    leaves = {"x": x, "router": moe.gate.weight}
    leaves |= {f"A{e}": A[e].weight for e in range(E)} | {f"B{e}": B[e].weight for e in range(E)}
    wanted = gradients(theirs(x), leaves)
    wanted["gradient of A"] = torch.stack([wanted.pop(f"gradient of A{e}") for e in range(E)])
    wanted["gradient of B"] = torch.stack([wanted.pop(f"gradient of B{e}").T for e in range(E)])
    _, routing = route(own.spec, x.flatten(0, 1), own.weights())
    # theirs counts choices per token, so it is K where ours is 1
    found["balance loss"] = K * load_balance_loss(routing.probability_TE, routing.selected_TE)
    wanted["balance loss"] = moe.layer_loss
    return found, wanted


print("the start, init_type goat, s = lora_alpha / r (float32):")
layer, theirs = pair("goat")
own = layer.experts("default")
A = torch.stack([m.weight for m in theirs.lora_A["default"]])
B = torch.stack([m.weight.T for m in theirs.lora_B["default"]])
products = [torch.einsum("erd,ero->eod", *f) for f in ((own.expert_A, own.expert_B), (A, B))]
right = compare({"B_e^T A_e": products[0]}, {"B_e^T A_e": products[1]})
x = torch.randn(2, T // 2, D, requires_grad=True)
with torch.no_grad():  # singular vectors have either sign; take theirs
    for parameter, value in ((own.expert_A, A), (own.expert_B, B)):
        parameter.copy_(value)
found, wanted = sides(layer, theirs, x)
right &= compare(found, wanted)

print("the layer with copied weights, W as theirs left it (float64):")
layer, theirs = layer.double(), theirs.double()
with torch.no_grad():
    layer.base_layer.weight.copy_(
        theirs.base_layer.weight
        + own.spec.scale * COEFFICIENT
        * torch.einsum("erd,ero->od", own.residual_A, own.residual_B)
    )  # fmt: skip
    own.expert_A.mul_(1.5)
    for e in range(E):
        theirs.lora_A["default"][e].weight.mul_(1.5)
found, wanted = sides(layer, theirs, x.detach().double().requires_grad_())
right &= compare(found, wanted)
finish(right)
