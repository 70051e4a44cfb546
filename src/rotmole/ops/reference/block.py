"""Feed-forward blocks as experts, as loops over tokens and experts.

A slot is one of the K places for a token's experts: the fast side computes the block in slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]


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


def slot_experts(selected_TE: Tensor, slots: int) -> list[list[int]]:
    """Return the expert of each slot of each token: selected experts first, then the others."""
    tokens = []
    for selected_E in selected_TE.tolist():
        experts = [e for e, selected in enumerate(selected_E) if selected]
        experts += [e for e, selected in enumerate(selected_E) if not selected]
        tokens.append(experts[:slots])
    return tokens


def slot_additions(turned_TER: Tensor, expert_TK: Tensor, B_ERO: Tensor, *, scale: float) -> Tensor:
    """Return s z'_e B_e of the expert e of each slot, [K, T, O]."""
    slots = []
    for expert_T in expert_TK.T.tolist():
        rows = [scale * turned_TER[t, e] @ B_ERO[e] for t, e in enumerate(expert_T)]
        slots.append(torch.stack(rows))
    return torch.stack(slots)


def slot_mean(hidden_KTF: Tensor, weight_TE: Tensor, expert_TK: Tensor) -> Tensor:
    """Return sum_k g_e(k) h_k, [T, F]; the weights of a token's slots sum to one."""
    rows = []
    for t, experts in enumerate(expert_TK.tolist()):
        weighted = (weight_TE[t, e] * hidden_KTF[k, t] for k, e in enumerate(experts))
        rows.append(sum(weighted, start=torch.zeros_like(hidden_KTF[0, t])))
    return torch.stack(rows)


def weigh_slots(
    turned_KTER: Tensor, weight_TE: Tensor, expert_TK: Tensor, B_ERO: Tensor, *, scale: float
) -> Tensor:
    """Return s sum_k g_e(k) z'_k,e(k) B_e(k), [T, O]."""
    rows = []
    for t, experts in enumerate(expert_TK.tolist()):
        additions = (
            scale * weight_TE[t, e] * turned_KTER[k, t, e] @ B_ERO[e] for k, e in enumerate(experts)
        )
        rows.append(sum(additions, start=torch.zeros_like(B_ERO[0, 0])))
    return torch.stack(rows)
