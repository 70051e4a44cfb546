"""Slow twins of the sqrt-gate, of the localised balance loss and of block routing.

Like reference.py: loops over tokens and experts, straight from the equations, sharing no function
with the fast path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]


def combine_sqrt_gate(
    weight_TE: Tensor, turned_TER: Tensor, B_ERO: Tensor, *, scale: float
) -> Tensor:
    """Return s sum_e g_e z'_e B_e whose gradient by autograd is that of the sqrt-gate.

    sqrt(g) v + (g - sqrt(g)) v with the first sqrt(g) and the second v held constant has the value
    g v, the gradient sqrt(g) for v, and <dy, v> for g.
    """
    rows = []
    for t in range(weight_TE.shape[0]):
        y_O = torch.zeros_like(B_ERO[0, 0])
        for e in range(weight_TE.shape[1]):
            g, v_O = weight_TE[t, e], scale * (turned_TER[t, e] @ B_ERO[e])
            root = g.detach().sqrt()
            y_O = y_O + root * v_O + (g - root) * v_O.detach()
        rows.append(y_O)
    return torch.stack(rows)


def task_balance_loss(
    weight_TE: Tensor,
    sequence_T: Tensor,
    group_N: Tensor,
    *,
    groups: int,
    offset: float,
    mask_T: Tensor | None = None,
) -> Tensor:
    """Return variance / mean^2 of I[n,e] G[n,e], every pair (n, e) one number."""
    T, E = weight_TE.shape
    values = []
    for n in range(len(group_N)):
        for e in range(E):
            own = max(g for g in range(groups) if g * E <= e * groups)
            kept = [t for t in range(T) if sequence_T[t] == n and (mask_T is None or mask_T[t])]
            G = sum((weight_TE[t, e] for t in kept), start=weight_TE.new_zeros(()))
            values.append(G * (1 - offset if own == int(group_N[n]) else 1 + offset))
    mean = sum(values, start=weight_TE.new_zeros(())) / len(values)
    square = sum(((v - mean) ** 2 for v in values), start=weight_TE.new_zeros(()))
    return square / (len(values) - 1) / (mean**2 + 1e-10)


def block(
    x_TD: Tensor,
    weight_TE: Tensor,
    selected_TE: Tensor,
    inner: Sequence[Map],
    outer: Map,
    additions: Sequence[Sequence[Map]],
    middle: Callable[..., Tensor],
) -> Tensor:
    """Return sum_e g_e FFN_e(x), each selected expert a feed-forward block of its own.

    FFN_e(x) = down_e(middle(gate_e(x), up_e(x))),  layer_e(v) = layer(v) + addition_layer,e(v)

    Args:
        x_TD: [T, D] the block's input.
        weight_TE, selected_TE: the block's routing.
        inner: the base layers that read x (gate and up; one layer in a block without a gate).
        outer: the base layer that writes the block's output.
        additions: additions[l][e], what expert e adds to layer l (the outer layer is the last).
        middle: what lies between, such as act(gate) * up.
    """
    rows = []
    for t in range(x_TD.shape[0]):
        y = None
        for e in range(weight_TE.shape[1]):
            if not selected_TE[t, e]:
                continue
            row = x_TD[t : t + 1]
            hidden = [base(row) + add[e](row) for base, add in zip(inner, additions, strict=False)]
            h = middle(*hidden)
            v = weight_TE[t, e] * (outer(h) + additions[-1][e](h))
            y = v if y is None else y + v
        assert y is not None  # every token selects at least one expert
        rows.append(y)
    return torch.cat(rows)
