"""Feed-forward blocks as experts: each selected expert keeps its own activation in a slot.

Behind a non-linearity experts cannot be added in rank space, so a block's inner layers give one
output for each of a token's K selected experts, [K, T, F], what lies between acts on all of them,
and the outer layer weighs them. The base layers are computed once: the inner ones before the slots
part, the outer one on the weighted sum, because it is linear.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot


def slot_experts(selected_TE: Tensor, slots: int) -> Tensor:
    """Return which expert sits in each slot of a token: its selected experts, lowest index first.

    Args:
        selected_TE: [T, E] True where selected, at most `slots` of a row.
        slots: K; where a token selects fewer, the last slots hold experts of weight zero.

    Returns:
        [T, K] expert numbers.

    >>> slot_experts(torch.tensor([[False, True, True], [True, False, True]]), 2).tolist()
    [[1, 2], [0, 2]]
    """
    order_TE = torch.sort(selected_TE.to(torch.int8), dim=-1, descending=True, stable=True).indices
    return order_TE[:, :slots]


def slot_additions(turned_TER: Tensor, expert_TK: Tensor, B_ERO: Tensor, *, scale: float) -> Tensor:
    """Return what each slot's expert adds to an inner layer: s z'_e B_e for the e of the slot.

    All slots go through one product with B seen as [E R, O], other experts' activations put to
    zero: no row of B is gathered, and shapes are static.

    Args:
        turned_TER: [T, E, R] activations after their rotation.
        expert_TK: [T, K] which expert sits where.
        B_ERO: [E, R, O] output factors.
        scale: s.

    Returns:
        [K, T, O] in the type of B.

    >>> z, e = torch.ones(5, 3, 4), torch.zeros(5, 2, dtype=torch.long)
    >>> slot_additions(z, e, torch.ones(3, 4, 6), scale=1.0).shape
    torch.Size([2, 5, 6])
    """
    here_KTE = one_hot(expert_TK.T, turned_TER.shape[1])
    alone_KTER = (scale * here_KTE.to(turned_TER.dtype)).unsqueeze(-1) * turned_TER
    return alone_KTER.to(B_ERO.dtype).flatten(2) @ B_ERO.flatten(0, 1)


def slot_mean(hidden_KTF: Tensor, weight_TE: Tensor, expert_TK: Tensor) -> Tensor:
    """Return sum_k g_k h_k for weights that sum to one, exact where all h_k are equal.

        h_0 + sum over k >= 1 of g_k (h_k - h_0)

    Args:
        hidden_KTF: [K, T, F] what the outer layer would read in each slot.
        weight_TE: [T, E] weights of the experts.
        expert_TK: [T, K] which expert sits where.

    Returns:
        [T, F] in the type of hidden.

    >>> slot_mean(torch.ones(1, 5, 7), torch.ones(5, 1), torch.zeros(5, 1).long()).shape
    torch.Size([5, 7])
    """
    weight_TK = weight_TE.gather(1, expert_TK).to(hidden_KTF.dtype)
    first_TF, rest_KTF = hidden_KTF[0], hidden_KTF[1:]
    return first_TF + torch.einsum("tk,ktf->tf", weight_TK[:, 1:], rest_KTF - first_TF)


def weigh_slots(
    turned_KTER: Tensor, weight_TE: Tensor, expert_TK: Tensor, B_ERO: Tensor, *, scale: float
) -> Tensor:
    """Return what the experts add to the outer layer: s sum_k g_k z'_k B_e(k).

    The sum is made in rank space, so B is multiplied once.

    Args:
        turned_KTER: [K, T, E, R] every expert's activation of every slot.
        weight_TE: [T, E] weights of the experts.
        expert_TK: [T, K] which expert sits where.
        B_ERO: [E, R, O] output factors.
        scale: s.

    Returns:
        [T, O] in the type of B.

    >>> z, e = torch.ones(2, 5, 3, 4), torch.tensor([[0, 1]] * 5)
    >>> weigh_slots(z, torch.ones(5, 3), e, torch.ones(3, 4, 6), scale=1.0).shape
    torch.Size([5, 6])
    """
    here_KTE = one_hot(expert_TK.T, turned_KTER.shape[2]).to(turned_KTER.dtype)
    mixed_TER = ((scale * weight_TE * here_KTE).unsqueeze(-1) * turned_KTER).sum(0)
    return mixed_TER.to(B_ERO.dtype).flatten(1) @ B_ERO.flatten(0, 1)
