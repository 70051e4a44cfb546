"""LoRAMoE's localised balance: experts of a group are used alike, groups lean to their own task."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-10  # added to the squared mean, as in LoRAMoE's code, so that no token gives 0


def expert_groups(experts: int, groups: int, device: torch.device | None = None) -> Tensor:
    """Split experts evenly, in order, into groups: expert e is in group floor(e * groups / E).

    Args:
        experts: E.
        groups: how many groups, 1..E.
        device: where the result lies.

    Returns:
        [E] group of each expert.

    Source: LoRAMoE's code for two groups; more groups are our choice.

    >>> expert_groups(4, 2).tolist()
    [0, 0, 1, 1]
    """
    return torch.arange(experts, device=device) * groups // experts


def task_balance_loss(
    weight_TE: Tensor,
    sequence_T: Tensor,
    group_N: Tensor,
    *,
    groups: int,
    offset: float,
    mask_T: Tensor | None = None,
) -> Tensor:
    """Return the localised balancing loss: CV^2(I * G) over all (sequence, expert) pairs.

        G[n,e] = sum over the tokens of sequence n of g_e
        I[n,e] = 1 - a where expert e is in the group of sequence n, 1 + a elsewhere
        loss   = variance(I * G) / mean(I * G)^2        unbiased, flattened over n and e

    Its least value 0 gives the experts of a sequence's own group the share (1 + a)/2 (two groups
    of equal size), and uses the experts within a group alike. It is not linear in the batch: it
    depends on how a batch is split into micro-batches.

    Args:
        weight_TE: [T, E] weights of the experts.
        sequence_T: [T] sequence number 0..N-1 of each token.
        group_N: [N] group of each sequence's task, 0..groups-1.
        groups: into how many groups the experts are split.
        offset: a in 0 <= a < 1.
        mask_T: [T] True for tokens that count; None counts all.

    Returns:
        Scalar, differentiable in weight_TE; 0 where no token counts.

    Source: LoRAMoE (arXiv 2312.09979, eq. 7 and 8); variance and 1e-10 as in its code.

    >>> g = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    >>> task_balance_loss(g, torch.tensor([0, 1]), torch.tensor([0, 1]), groups=2, offset=0.0)
    tensor(0.)
    """
    experts = weight_TE.shape[1]
    counted_TE = weight_TE if mask_T is None else weight_TE * mask_T.to(weight_TE.dtype)[:, None]
    used_NE = weight_TE.new_zeros(len(group_N), experts).index_add(0, sequence_T, counted_TE)
    if used_NE.numel() < 2:
        return used_NE.sum() * 0
    own_NE = group_N[:, None] == expert_groups(experts, groups, group_N.device)
    weighed_NE = used_NE * (1 + offset - 2 * offset * own_NE.to(used_NE.dtype))
    return weighed_NE.var() / (weighed_NE.mean().square() + EPSILON)
