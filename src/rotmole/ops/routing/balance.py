"""How evenly the experts are used: losses that push towards balance, and the usage itself."""

from __future__ import annotations

from typing import NamedTuple

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


class BalanceGradient(NamedTuple):
    """Both losses and what they send to the router's logits.

    Attributes:
        logits_ET: [E, T] gradient of balance * load_balance_loss + z * router_z_loss.
        balance, z: the two losses, scalars without their coefficients.
        tokens: how many tokens count, a scalar.
    """

    logits_ET: Tensor
    balance: Tensor
    z: Tensor
    tokens: Tensor


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
    """Compute load_balance_loss, router_z_loss and their gradient by hand, without autograd.

        dloss/dp_te = E f_ne / tokens =: c_te  (n the sequence of t)
        dloss/dlogits_t = p_t (c_t - <p_t, c_t>) + 2 z logsumexp(logits_t) p_t / tokens

    It takes the selection that is already made. Without `sequence_T` the sequences are of one
    length and lie one after the other, so that sums over a sequence are sums over an axis.

    Args:
        logits_ET: [E, T] scores of a linear router in at least float32, tokens last.
        index_KT: [K, T] numbers of the chosen experts, of any integer type; None where all are.
        sequences: N, which divides T if there is no sequence_T; 1 for scope "micro_batch".
        balance, z: coefficients of the two losses.
        mask_T: [T] True (or 1) for tokens that count; None counts all.
        sequence_T: [T] sequence number 0..N-1 of each token, such as of packed rows, or None.

    Returns:
        BalanceGradient; zeros where no token counts.

    Source: derived by hand from the two functions.

    >>> logits_ET, index_KT = torch.zeros(3, 2), torch.tensor([[0, 0]])
    >>> balance_gradient(logits_ET, index_KT, sequences=1, balance=1.0, z=0.0).logits_ET[:, 0]
    tensor([ 0.3333, -0.1667, -0.1667])
    """
    tokens = logits_ET.shape[1]
    spread = _Sequences(sequences, sequence_T)
    experts = len(logits_ET)
    p_ET = torch.softmax(logits_ET, dim=0)
    lse_T = logits_ET.amax(0) - torch.log(p_ET.amax(0))  # the largest p is at least 1/E
    counted_ET, square_T = p_ET, lse_T.square()
    total = logits_ET.new_full((), tokens)
    weight_T = None if mask_T is None else mask_T.reshape(-1).to(logits_ET.dtype)
    if weight_T is not None:
        counted_ET, square_T, total = p_ET * weight_T, square_T * weight_T, weight_T.sum()
        lse_T = lse_T * weight_T
    share_EN = _shares(index_KT, spread, weight_T, like=p_ET)
    per_token = 1 / total.clamp(min=1)
    loss = experts * (share_EN * spread.sums(counted_ET)).sum() * per_token
    moved_ET = spread.scaled(counted_ET, balance * experts * per_token * share_EN)
    back_T = moved_ET.sum(0)
    if z:
        back_T = back_T - (2 * z * per_token) * lse_T
    grad_ET = torch.addcmul(moved_ET, p_ET, back_T, value=-1)
    return BalanceGradient(grad_ET, loss, square_T.sum() * per_token, total)


class _Sequences(NamedTuple):
    """N sequences of tokens: of one length, one after the other, or numbered by sequence_T."""

    number: int
    number_T: Tensor | None

    def sums(self, value_ET: Tensor) -> Tensor:
        """Return [E, N], the sum over the tokens of each sequence."""
        if self.number_T is None:
            return value_ET.view(self._apart(value_ET)).sum(-1)
        empty_EN = value_ET.new_zeros(len(value_ET), self.number)
        return empty_EN.index_add(1, self.number_T, value_ET)

    def scaled(self, value_ET: Tensor, factor_EN: Tensor) -> Tensor:
        """Multiply every token's [E] by the factors of its sequence."""
        if self.number_T is not None:
            return value_ET * factor_EN[:, self.number_T]
        value_ENS = value_ET.view(self._apart(value_ET))
        return (value_ENS * factor_EN.unsqueeze(-1)).view_as(value_ET)

    def _apart(self, value_ET: Tensor) -> tuple[int, int, int]:
        experts, tokens = value_ET.shape
        return experts, self.number, tokens // max(self.number, 1)


def _shares(
    index_KT: Tensor | None, spread: _Sequences, weight_T: Tensor | None, like: Tensor
) -> Tensor:
    """Return [E, N], each expert's share of the choices made in each sequence."""
    if index_KT is None:
        return like.new_full((len(like), spread.number), 1 / len(like))
    chosen_ET = torch.zeros_like(like).scatter_(0, index_KT.long(), 1.0)
    if weight_T is not None:
        chosen_ET = chosen_ET * weight_T
    chosen_EN = spread.sums(chosen_ET)
    return chosen_EN / chosen_EN.sum(0).clamp(min=1)


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
