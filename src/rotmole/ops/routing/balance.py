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
        balance, z: the two losses times the tokens that count, scalars without their coefficients.
        tokens: how many tokens count; a tensor where a mask says so.
    """

    logits_ET: Tensor
    balance: Tensor
    z: Tensor
    tokens: int | Tensor


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
        logsumexp(logits_t) = logits_te - log p_te, for any e

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
    log_ET = torch.log_softmax(logits_ET, dim=0)
    p_ET, lse_T = log_ET.exp(), logits_ET[0] - log_ET[0]
    counted_ET, counted_T = p_ET, lse_T
    weight_T: Tensor | None = None
    total: int | Tensor = tokens
    per_token: float | Tensor = 1 / max(tokens, 1)
    if torch.compiler.is_compiling():  # a kernel has no fraction of a number that is not known yet
        per_token = logits_ET.new_ones(()) / max(tokens, 1)
    if mask_T is not None:
        weight_T = mask_T.reshape(-1).to(logits_ET.dtype)
        counted_ET, counted_T = p_ET * weight_T, lse_T * weight_T
        total = weight_T.sum()
        per_token = 1 / total.clamp(min=1)
    load_EN = _loads(index_KT, spread, weight_T, like=p_ET)
    loss = torch.vdot(load_EN.flatten(), spread.sums(counted_ET).flatten())
    c_ET = spread.each(load_EN, balance * per_token, tokens)
    if weight_T is not None:
        c_ET = c_ET * weight_T
    grad_ET = torch._softmax_backward_data(c_ET, p_ET, 0, p_ET.dtype)
    if z:
        grad_ET = torch.addcmul(grad_ET, p_ET, counted_T * per_token, value=2 * z)
    return BalanceGradient(grad_ET, loss, torch.vdot(lse_T, counted_T), total)


class _Sequences(NamedTuple):
    """N sequences of tokens: of one length, one after the other, or numbered by sequence_T."""

    number: int
    number_T: Tensor | None

    def sums(self, value_ET: Tensor) -> Tensor:
        """Return [E, N], the sum over the tokens of each sequence."""
        experts, tokens = value_ET.shape
        if self.number_T is None:
            return value_ET.view(experts, self.number, tokens // max(self.number, 1)).sum(-1)
        empty_EN = value_ET.new_zeros(experts, self.number)
        return empty_EN.index_add(1, self.number_T, value_ET)

    def each(self, value_EN: Tensor, factor: float | Tensor, tokens: int) -> Tensor:
        """Return [E, T], for every token the value of its sequence, times the factor."""
        if self.number_T is not None:
            return value_EN[:, self.number_T] * factor
        length = tokens // max(self.number, 1)
        value_ENS = value_EN.unsqueeze(-1).expand(-1, -1, length) * factor
        return value_ENS.reshape(len(value_EN), tokens)


def _loads(
    index_KT: Tensor | None, spread: _Sequences, weight_T: Tensor | None, like: Tensor
) -> Tensor:
    """Return [E, N], E times each expert's share of the choices made in each sequence."""
    experts, tokens = like.shape
    if index_KT is None:
        return like.new_ones(experts, spread.number)
    index_KT, chosen_ET = index_KT.long(), torch.zeros_like(like)
    of_one_length = weight_T is None and spread.number_T is None  # as many choices in each
    if of_one_length and not torch.compiler.is_compiling():
        choices = len(index_KT) * tokens / max(spread.number, 1)
        return spread.sums(chosen_ET.scatter_(0, index_KT, experts / max(choices, 1)))
    chosen_ET = chosen_ET.scatter_(0, index_KT, 1.0)
    chosen_EN = spread.sums(chosen_ET if weight_T is None else chosen_ET * weight_T)
    return chosen_EN * (experts / chosen_EN.sum(0).clamp(min=1))


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
