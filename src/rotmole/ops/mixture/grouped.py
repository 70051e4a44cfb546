"""The mixture for many experts: only the K chosen experts of a token are computed.

Every product is one of three sums over chosen rows of a table (A, B or a gate, seen as [E M, D]),
each the derivative of the others, so derivatives of every order are exact:

    dots_TM  = <x_T, table[rows_TM]>        sum_TD = sum_M w_TM table[rows_TM]
    table_ND = sum over T, M of w_TM x_T where rows_TM = N

They are torch's embedding-bag kernels: no row is copied per token, and cost grows with T K R and no
longer with E. The dense path is faster while K is not far below E; tuner/experts/ways.py chooses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, linear

from rotmole.ops.mixture.dense import mixture, shared_weight
from rotmole.ops.precision import at_least_float32, without_autocast
from rotmole.ops.rotation.table import ROTATIONS, Gate
from rotmole.ops.spec import Spec, Weights


def _bags(rows_TM: Tensor) -> tuple[Tensor, Tensor]:
    """Return where each token's rows begin, and each row's token."""
    tokens, count = rows_TM.shape
    each_T = torch.arange(tokens, device=rows_TM.device)
    return each_T * count, each_T.repeat_interleave(count)


def _dots_dtype(x_TD: Tensor) -> torch.dtype:
    """Return the format that torch's kernel of the dots can multiply: on CUDA not bfloat16."""
    no_kernel = x_TD.is_cuda and x_TD.dtype == torch.bfloat16
    return torch.float32 if no_kernel else x_TD.dtype


class _Dots(torch.autograd.Function):
    """(x, table, rows) -> <x_T, table[rows_TM]>."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, table_ND: Tensor, rows_TM: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, table_ND, rows_TM)
        starts_T, token_M = _bags(rows_TM)
        dtype = _dots_dtype(x_TD)
        dots: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            x_TD.to(dtype).contiguous(), table_ND.to(dtype), rows_TM.reshape(-1), starts_T,
            token_M, 0,
        )  # fmt: skip
        return dots.view(rows_TM.shape).to(x_TD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, table_ND, rows_TM = ctx.saved_tensors
        dx = chosen_sum(grads[0], table_ND, rows_TM) if ctx.needs_input_grad[0] else None
        dtable = None
        if ctx.needs_input_grad[1]:
            dtable = chosen_outer(grads[0], x_TD, rows_TM, table_ND.shape[0])
        return dx, dtable, None


class _Sum(torch.autograd.Function):
    """(w, table, rows) -> sum_M w_TM table[rows_TM]."""

    @staticmethod
    def forward(ctx: Any, w_TM: Tensor, table_ND: Tensor, rows_TM: Tensor) -> Tensor:
        ctx.save_for_backward(w_TM, table_ND, rows_TM)
        return embedding_bag(rows_TM, table_ND, per_sample_weights=w_TM.contiguous(), mode="sum")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        w_TM, table_ND, rows_TM = ctx.saved_tensors
        dw = chosen_dots(grads[0], table_ND, rows_TM) if ctx.needs_input_grad[0] else None
        dtable = None
        if ctx.needs_input_grad[1]:
            dtable = chosen_outer(w_TM, grads[0], rows_TM, table_ND.shape[0])
        return dw, dtable, None


class _Outer(torch.autograd.Function):
    """(w, x, rows, N) -> table with sum of w_TM x_T at row rows_TM."""

    @staticmethod
    def forward(ctx: Any, w_TM: Tensor, x_TD: Tensor, rows_TM: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(w_TM, x_TD, rows_TM)
        empty = torch.empty(0, dtype=torch.long, device=x_TD.device)
        _, token_M = _bags(rows_TM)
        table_ND: Tensor = torch.ops.aten._embedding_bag_dense_backward(
            x_TD.contiguous(), rows_TM.reshape(-1), token_M, empty, empty,
            count, False, 0, w_TM.reshape(-1),
        )  # fmt: skip
        return table_ND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        w_TM, x_TD, rows_TM = ctx.saved_tensors
        dw = chosen_dots(x_TD, grads[0], rows_TM) if ctx.needs_input_grad[0] else None
        dx = chosen_sum(w_TM, grads[0], rows_TM) if ctx.needs_input_grad[1] else None
        return dw, dx, None, None


def chosen_dots(x_TD: Tensor, table_ND: Tensor, rows_TM: Tensor) -> Tensor:
    """Return <x_T, table[rows_TM]> [T, M].

    >>> chosen_dots(torch.ones(2, 3), torch.eye(3), torch.tensor([[0], [2]])).shape
    torch.Size([2, 1])
    """
    result: Tensor = _Dots.apply(x_TD, table_ND, rows_TM)  # type: ignore[no-untyped-call] # torch's own types
    return result


def chosen_sum(w_TM: Tensor, table_ND: Tensor, rows_TM: Tensor) -> Tensor:
    """Return sum_M w_TM table[rows_TM] [T, D].

    >>> chosen_sum(torch.ones(2, 1), torch.eye(3), torch.tensor([[0], [2]]))
    tensor([[1., 0., 0.],
            [0., 0., 1.]])
    """
    result: Tensor = _Sum.apply(w_TM, table_ND, rows_TM)  # type: ignore[no-untyped-call] # torch's own types
    return result


def chosen_outer(w_TM: Tensor, x_TD: Tensor, rows_TM: Tensor, count: int) -> Tensor:
    """Return [count, D]: at each row the sum of w_TM x_T over the T, M whose rows_TM is that row.

    >>> chosen_outer(torch.ones(2, 1), torch.eye(2), torch.tensor([[0], [0]]), 2)
    tensor([[1., 1.],
            [0., 0.]])
    """
    result: Tensor = _Outer.apply(w_TM, x_TD, rows_TM, count)  # type: ignore[no-untyped-call] # torch's own types
    return result


def _rows(expert_TK: Tensor, width: int) -> Tensor:
    """Return the rows [T, K width] of the chosen experts in a table of `width` rows an expert."""
    each = torch.arange(width, device=expert_TK.device)
    return (expert_TK.unsqueeze(-1) * width + each).flatten(1)


def _chosen(x_TD: Tensor, weight_EMD: Tensor, expert_TK: Tensor) -> Tensor:
    """Apply the chosen experts' [M, D] matrices to each token: [K, M, T]."""
    width = weight_EMD.shape[1]
    dots_TM = chosen_dots(x_TD, weight_EMD.flatten(0, 1), _rows(expert_TK, width))
    return dots_TM.mT.reshape(expert_TK.shape[1], width, x_TD.shape[0])


def grouped_mixture(
    spec: Spec,
    x_TD: Tensor,
    dropped_TD: Tensor,
    weights: Weights,
    weight_TE: Tensor,
    selected_TE: Tensor,
    logits_TE: Tensor | None = None,
) -> Tensor:
    """Return s sum_e g_e R_e(x)[A_e drop(x)] B_e over the K selected experts of each token.

    The shared expert, which every token selects, is added by `mixture`.

    Args:
        spec: scale, top_k, and a rotation that fused.can_fuse accepts; its gates do not read z.
        x_TD: [T, D] layer input; angle gates read it.
        dropped_TD: [T, D] the same after dropout, in the type of A.
        weights: of the layer, A and B of one type.
        weight_TE: [T, E] g.
        selected_TE: [T, E] bool, spec.chosen (K, if nothing was grown) of them in each row.
        logits_TE: [T, E] the router's; only rotation_input "router" reads them.

    Returns:
        [T, O] in the type of B.

    >>> x, weights = torch.ones(5, 3), Weights(torch.ones(9, 4, 3), torch.ones(9, 4, 6))
    >>> weight = torch.eye(9)[:5]
    >>> grouped_mixture(Spec(num_experts=9), x, x, weights, weight, weight > 0).shape
    torch.Size([5, 6])
    """
    B_ERO, gates, rotation = weights.B_ERO, weights.gates, spec.rotation
    expert_TK = torch.topk(selected_TE.to(weight_TE.dtype), spec.chosen, dim=-1).indices
    weight_K1T = weight_TE.gather(1, expert_TK).mT.unsqueeze(1)
    z_KRT = at_least_float32(_chosen(dropped_TD, weights.A_ERD, expert_TK))
    vector = angle = few_TN = None
    if spec.small_gates and ROTATIONS[rotation].linear_gates:
        few_TN = logits_TE
        if "rotation_down" in gates:
            few_TN = linear(dropped_TD, gates["rotation_down"])
        assert few_TN is not None, "rotation_input 'router' needs the router's logits"
        few_TN = at_least_float32(few_TN)
    if "rotation_vector" in gates and few_TN is None:
        vector = at_least_float32(_chosen(dropped_TD, gates["rotation_vector"], expert_TK))
    with without_autocast(x_TD):
        if "rotation_vector" in gates and few_TN is not None:
            vector = _chosen(few_TN, gates["rotation_vector"].to(few_TN.dtype), expert_TK)
        if "rotation_angle" in gates:
            wide_EMN = at_least_float32(gates["rotation_angle"])
            source_TN = (x_TD if few_TN is None else few_TN).to(wide_EMN.dtype)
            angle = _chosen(source_TN, wide_EMN, expert_TK)
        if "rotation_center" in gates:  # centroid is plane with a learned vector
            rotation = "plane"
            vector = at_least_float32(gates["rotation_center"])[expert_TK].permute(1, 2, 0)
        rotate = ROTATIONS[rotation].rotate
        assert rotate is not None
        turned_KRT = rotate(z_KRT, Gate(vector, angle))
        m_KRT = (spec.scale * weight_K1T) * turned_KRT
        w_TM = m_KRT.to(B_ERO.dtype).permute(2, 0, 1).flatten(1)
        y_TO = chosen_sum(w_TM, B_ERO.flatten(0, 1), _rows(expert_TK, B_ERO.shape[1]))
    if spec.shared is None or weights.shared is None:
        return y_TO
    g_T1 = shared_weight(x_TD, weights.shared)
    return y_TO + mixture(spec.shared, x_TD, dropped_TD, weights.shared, g_T1)
