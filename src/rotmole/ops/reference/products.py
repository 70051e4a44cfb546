"""The sums that the ways of the mixture are made of, one number at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rotmole.ops.reference.method import wide


def dropped(x_TD: Tensor, keep_TD: Tensor | None, keep_scale: float) -> Tensor:
    """Return x after dropout: kept inputs times keep_scale, the others 0."""
    if keep_TD is None:
        return x_TD
    rows = zip(x_TD, keep_TD, strict=True)
    return torch.stack([torch.where(keep_D, keep_scale * x_D, 0) for x_D, keep_D in rows])


def project(x_TD: Tensor, weight_EMD: Tensor) -> Tensor:
    """Return <weight_em, x_t> as [E, M, T]."""
    return torch.stack(
        [
            torch.stack([torch.stack([torch.dot(w_D, x_D) for x_D in x_TD]) for w_D in weight_MD])
            for weight_MD in weight_EMD
        ]
    )


def project_all(x_TD: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return what `project` makes of each of the weights."""
    return [project(x_TD, weight_EMD) for weight_EMD in weights]


def stack(parts: Sequence[Tensor]) -> Tensor:
    """Return the rows of all parts, one below the other."""
    return torch.stack([row for part in parts for row in part])


def activations(dropped_TD: Tensor, A_ERD: Tensor, experts: int) -> Tensor:
    """Return z_e = A_e drop(x) as [E, R, T]; A of [1, R, D] serves all experts."""
    A = [A_ERD[e if len(A_ERD) > 1 else 0] for e in range(experts)]
    return wide(project(dropped_TD, torch.stack(A)))


def read_gate(weight_EMN: Tensor, source: Tensor) -> Tensor:
    """Return <weight_em, source_t> as [E, M, T]; the source is [N, T], or each expert's own."""
    E, T = len(weight_EMN), source.shape[-1]
    own = [source if source.dim() == 2 else source[e] for e in range(E)]
    return torch.stack(
        [torch.stack([weight_EMN[e] @ own[e][:, t] for t in range(T)], dim=1) for e in range(E)]
    )


def combine(weighted_ERT: Tensor, B_ERO: Tensor) -> Tensor:
    """Return sum over e and r of m_ert B_er as [T, O]."""
    E, R, T = weighted_ERT.shape
    rows = []
    for t in range(T):
        y_O = torch.zeros_like(B_ERO[0, 0])
        for e in range(E):
            for r in range(R):
                y_O = y_O + weighted_ERT[e, r, t] * B_ERO[e, r]
        rows.append(y_O)
    return torch.stack(rows)


def combine_all(weighted: Sequence[Tensor], factors: Sequence[Tensor]) -> Tensor:
    """Return the sum of what `combine` makes of each pair."""
    parts = [combine(m_ERT, B_ERO) for m_ERT, B_ERO in zip(weighted, factors, strict=True)]
    return torch.stack(parts).sum(0)


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


def add_product(base_TO: Tensor | None, m_TN: Tensor, B_NO: Tensor, scale: float = 1.0) -> Tensor:
    """Return base + scale m B."""
    rows = []
    for t, m_N in enumerate(m_TN):
        y_O = torch.zeros_like(B_NO[0]) if base_TO is None else base_TO[t]
        for m, B_O in zip(m_N, B_NO, strict=True):
            y_O = y_O + scale * m * B_O
        rows.append(y_O)
    return torch.stack(rows)


# rows_TM names rows of a table [N, D], M for each token.


def chosen_dots(x_TD: Tensor, table_ND: Tensor, rows_TM: Tensor) -> Tensor:
    """Return <x_t, table[rows_tm]> as [T, M]."""
    tokens = zip(x_TD, rows_TM.tolist(), strict=True)
    return torch.stack(
        [torch.stack([torch.dot(x, table_ND[n]) for n in rows]) for x, rows in tokens]
    )


def chosen_sum(w_TM: Tensor, table_ND: Tensor, rows_TM: Tensor) -> Tensor:
    """Return sum over m of w_tm table[rows_tm] as [T, D]."""
    sums = []
    for w_M, rows in zip(w_TM, rows_TM.tolist(), strict=True):
        weighted = (w * table_ND[n] for w, n in zip(w_M, rows, strict=True))
        sums.append(sum(weighted, start=torch.zeros_like(table_ND[0])))
    return torch.stack(sums)


def chosen_outer(w_TM: Tensor, x_TD: Tensor, rows_TM: Tensor, count: int) -> Tensor:
    """Return the table [count, D] whose row n is the sum of w_tm x_t over t, m with rows_tm = n."""
    table = [torch.zeros_like(x_TD[0]) for _ in range(count)]
    for w_M, x_D, rows in zip(w_TM, x_TD, rows_TM.tolist(), strict=True):
        for w, n in zip(w_M, rows, strict=True):
            table[n] = table[n] + w * x_D
    return torch.stack(table)
