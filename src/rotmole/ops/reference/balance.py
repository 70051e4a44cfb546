"""How evenly the experts are used, as loops: balance losses, their gradient, the usage."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rotmole.ops.reference.method import wide


def counted(tokens: int, mask_T: Tensor | None) -> list[int]:
    """Return the numbers of the tokens that are not padding."""
    return [t for t in range(tokens) if mask_T is None or mask_T[t]]


def load_balance_loss(
    probability_TE: Tensor,
    selected_TE: Tensor,
    *,
    sequence_T: Tensor | None = None,
    mask_T: Tensor | None = None,
) -> Tensor:
    """Return E * sum_e f_e P_e: f_e the share of selections that fell on e, P_e its mean p.

    With `sequence_T` (each token's sequence number) it is computed for each sequence and averaged
    with the number of unpadded tokens as weight. Padding never counts; no token at all gives 0.
    """
    probability_TE, E = wide(probability_TE), probability_TE.shape[1]
    unpadded = counted(len(probability_TE), mask_T)
    sequences: dict[int, list[int]] = {}
    for t in unpadded:
        sequences.setdefault(0 if sequence_T is None else int(sequence_T[t]), []).append(t)
    total = probability_TE.new_zeros(())
    for tokens in sequences.values():
        selections = sum(int(selected_TE[t].sum()) for t in tokens)
        for e in range(E):
            f = sum(int(selected_TE[t, e]) for t in tokens) / selections
            sum_p = sum((probability_TE[t, e] for t in tokens), start=torch.zeros_like(total))
            P = sum_p / len(tokens)
            total = total + E * f * P * len(tokens) / len(unpadded)
    return total


def router_z_loss(logits_TE: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """Return the mean over unpadded tokens of (log sum_e exp(logit_e))^2; no token gives 0."""
    logits_TE = wide(logits_TE)
    unpadded = counted(len(logits_TE), mask_T)
    total = logits_TE.new_zeros(())
    for t in unpadded:
        total = total + torch.logsumexp(logits_TE[t], dim=0) ** 2 / len(unpadded)
    return total


class BalanceGradient(NamedTuple):
    """The gradient [E, T] of balance * load_balance_loss + z * router_z_loss.

    Both losses stand beside it, times the tokens that count.
    """

    logits_ET: Tensor
    balance: Tensor
    z: Tensor
    tokens: int


def balance_gradient(
    logits_ET: Tensor,
    index_KT: Tensor | None,
    *,
    sequences: int,
    balance: float,
    z: float,
    mask_T: Tensor | None = None,
    sequence_T: Tensor | None = None,
) -> BalanceGradient:
    """Return both losses and their gradient, which autograd takes.

    Without `sequence_T` the tokens are `sequences` sequences of one length, one after the other.
    `index_KT` holds the chosen experts' numbers; without it all experts are chosen.
    """
    E, T = logits_ET.shape
    leaf_ET = logits_ET.detach().clone().requires_grad_()
    selected_TE = torch.zeros(T, E, dtype=torch.bool)
    for t in range(T):
        selected_TE[t, list(range(E)) if index_KT is None else index_KT[:, t].tolist()] = True
    if sequence_T is None:
        sequence_T = torch.tensor([t * sequences // T for t in range(T)], dtype=torch.long)
    p_TE = torch.softmax(leaf_ET.T, dim=1)
    losses = (
        load_balance_loss(p_TE, selected_TE, sequence_T=sequence_T, mask_T=mask_T),
        router_z_loss(leaf_ET.T, mask_T),
    )
    total = balance * losses[0] + z * losses[1] + 0 * leaf_ET.sum()
    (gradient_ET,) = torch.autograd.grad(total, leaf_ET)
    tokens = len(counted(T, mask_T))
    return BalanceGradient(gradient_ET, losses[0] * tokens, losses[1] * tokens, tokens)


def usage(selected_TE: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """Return each expert's share of the selections [E]; zeros if no token counts."""
    unpadded = counted(len(selected_TE), mask_T)
    times = [sum(bool(selected_TE[t, e]) for t in unpadded) for e in range(selected_TE.shape[1])]
    return torch.tensor([count / max(sum(times), 1) for count in times])


def expert_groups(experts: int, groups: int) -> list[int]:
    """Return the group of each expert: the last group g that begins at or before it, g E / G."""
    return [max(g for g in range(groups) if g * experts <= e * groups) for e in range(experts)]


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
    group_E = expert_groups(E, groups)
    values = []
    for n in range(len(group_N)):
        for e in range(E):
            tokens = [t for t in counted(T, mask_T) if sequence_T[t] == n]
            G = sum((weight_TE[t, e] for t in tokens), start=weight_TE.new_zeros(()))
            values.append(G * (1 - offset if group_E[e] == int(group_N[n]) else 1 + offset))
    mean = sum(values, start=weight_TE.new_zeros(())) / len(values)
    square = sum(((v - mean) ** 2 for v in values), start=weight_TE.new_zeros(()))
    return square / (len(values) - 1) / (mean**2 + 1e-10)
