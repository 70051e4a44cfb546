"""How evenly the experts are used: losses that push towards balance, and the usage itself."""

from __future__ import annotations

import torch
from torch import Tensor


def _token_weight(reference_TE: Tensor, mask_T: Tensor | None) -> Tensor:
    if mask_T is None:
        return reference_TE.new_ones(reference_TE.shape[0])
    return mask_T.reshape(-1).to(reference_TE.dtype)


def load_balance_loss(
    probability_TE: Tensor,
    selected_TE: Tensor,
    *,
    sequence_T: Tensor | None = None,
    sequences: int | None = None,
    mask_T: Tensor | None = None,
) -> Tensor:
    """Return the load-balance loss; 1 when every expert is used alike, for every K.

        loss_n = E sum_e f_ne P_ne
        f_ne = (tokens of sequence n that chose e) / (choices made in n), no gradient; sums to 1
        P_ne = mean over the tokens of n of p_e
        loss = sum_n (tokens of n / all tokens) loss_n

    Without `sequence_T` all tokens are one sequence (scope "micro_batch"). That loss is not linear
    in the batch: its gradient depends on how a batch is split into micro-batches. Per sequence it
    does not, which is why scope "sequence" is the default of the layer.

    Args:
        probability_TE: [T, E] softmax over all experts.
        selected_TE: [T, E] True where selected.
        sequence_T: [T] sequence number 0..N-1 of each token, or None.
        sequences: N; counted from sequence_T if None (which waits for a GPU).
        mask_T: [T] True (or 1) for tokens that count, False for padding; None counts all.

    Returns:
        Scalar, differentiable in probability_TE; 0 where no token counts.

    Source: Fedus et al. 2021 (arXiv 2101.03961, eq. 4), normalised to 1 for every K (our choice).

    >>> p = torch.full((6, 3), 1 / 3)
    >>> load_balance_loss(p, torch.eye(3, dtype=torch.bool).repeat(2, 1))
    tensor(1.)
    """
    tokens, experts = probability_TE.shape
    weight_T = _token_weight(probability_TE, mask_T)
    if sequence_T is None:
        sequence_T = torch.zeros(tokens, dtype=torch.long, device=probability_TE.device)
        sequences = 1
    if sequences is None:
        sequences = int(sequence_T.max()) + 1 if tokens else 1
    zero_NE = probability_TE.new_zeros(sequences, experts)
    chosen_TE = selected_TE.to(probability_TE.dtype) * weight_T[:, None]
    chosen_NE = zero_NE.index_add(0, sequence_T, chosen_TE)
    mass_NE = zero_NE.index_add(0, sequence_T, probability_TE * weight_T[:, None])
    tokens_N = probability_TE.new_zeros(sequences).index_add(0, sequence_T, weight_T)
    share_NE = chosen_NE / chosen_NE.sum(-1, keepdim=True).clamp(min=1)
    # tokens_N * loss_n: the division by tokens_N inside P and the weighting by it cancel
    weighted_N = experts * (share_NE.detach() * mass_NE).sum(-1)
    return weighted_N.sum() / tokens_N.sum().clamp(min=1)


def router_z_loss(logits_TE: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """Return the mean squared log-partition of the router: mean_t logsumexp(logits_t)^2.

    Args:
        logits_TE: [T, E] router scores.
        mask_T: [T] True for tokens that count; None counts all.

    Returns:
        Scalar; 0 where no token counts.

    Source: Zoph et al. 2022, ST-MoE (arXiv 2202.08906, eq. 5).

    >>> router_z_loss(torch.zeros(2, 1))
    tensor(0.)
    """
    weight_T = _token_weight(logits_TE, mask_T)
    square_T = torch.logsumexp(logits_TE, dim=-1).square()
    return (square_T * weight_T).sum() / weight_T.sum().clamp(min=1)


def usage(selected_TE: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """Return each expert's share of the choices made: sums to 1 (all zeros if none was made).

    Args:
        selected_TE: [T, E] True where selected.
        mask_T: [T] True for tokens that count; None counts all.

    Returns:
        [E] shares in float32.

    >>> usage(torch.tensor([[True, False], [True, False]]))
    tensor([1., 0.])
    """
    chosen_TE = selected_TE.float()
    chosen_E = (chosen_TE * _token_weight(chosen_TE, mask_T)[:, None]).sum(0)
    return chosen_E / chosen_E.sum().clamp(min=1)
