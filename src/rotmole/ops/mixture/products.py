"""The matrix products that every way to compute the mixture is made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rotmole.ops.compiled import few
from rotmole.ops.precision import at_least_float32

# Inputs from which, and rows up to which, a CPU is faster at x W^T, as LoRA multiplies, than at
# W x^T, the copy that puts the result in place included: at 28 rows of 1024 inputs by 6 % on one
# thread and 21 % on two, of 1536 inputs by up to half, at 48 rows likewise; at 576 inputs or from
# 52 rows on it loses as often (float32, AVX-512). For few tokens the copy is one operation too
# many.
TURNED_FROM, TURNED_UP_TO = 768, 48


def tokens_last(x_TD: Tensor, weight_ND: Tensor, scale: float = 1.0) -> Tensor:
    """Return scale W x^T [N, T] by the faster of two products; its memory may be that of [T, N].

    >>> tokens_last(torch.ones(5, 3), torch.ones(8, 3), 2.0)[0, 0]
    tensor(6.)
    """
    if _turns(x_TD, weight_ND):
        return scaled_product(x_TD, weight_ND.mT, scale).mT
    return scaled_product(weight_ND, x_TD.mT, scale)


def _turns(x_TD: Tensor, weight_ND: Tensor) -> bool:
    if torch.compiler.is_compiling() or x_TD.device.type != "cpu" or x_TD.dtype.itemsize < 4:
        return False
    fits = x_TD.shape[1] >= TURNED_FROM and len(weight_ND) <= TURNED_UP_TO
    return fits and not few(x_TD)


def project(x_TD: Tensor, weight_EMD: Tensor) -> Tensor:
    """Apply every expert's [M, D] matrix to every token: [E, M, T], tokens last.

    One product for all experts, which writes its small result with tokens last.

    >>> project(torch.ones(5, 3), torch.ones(2, 4, 3)).shape
    torch.Size([2, 4, 5])
    """
    experts, rows = weight_EMD.shape[:2]
    value_NT = tokens_last(x_TD, weight_EMD.flatten(0, 1)).contiguous()
    return value_NT.view(experts, rows, x_TD.shape[0])


def project_all(x_TD: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Apply several experts' matrices, each [E, M, D], to every token in one product.

    Returns:
        What `project` returns for each of the weights; all share one memory, which may be that of
        [T, N].

    >>> z, gate = project_all(torch.ones(5, 3), [torch.ones(2, 4, 3), torch.ones(1, 6, 3)])
    >>> gate.shape
    torch.Size([1, 6, 5])
    """
    both_NT = tokens_last(x_TD, torch.cat([weight.flatten(0, 1) for weight in weights]))
    results, start = [], 0
    for weight in weights:
        experts, rows = weight.shape[:2]
        stop = start + experts * rows
        results.append(both_NT[start:stop].view(experts, rows, -1))
        start = stop
    return results


def stack(parts: Sequence[Tensor]) -> Tensor:
    """Return the rows of all parts, one below the other; a single part is not copied.

    >>> stack([torch.ones(1, 3), torch.ones(2, 3)]).shape
    torch.Size([3, 3])
    """
    return parts[0] if len(parts) == 1 else torch.cat([*parts])


def activations(dropped_TD: Tensor, A_ERD: Tensor, experts: int) -> Tensor:
    """Return z = A_e drop(x) [E, R, T] in at least float32; an A that all share is multiplied once.

    >>> activations(torch.ones(5, 3), torch.ones(1, 4, 3), 2).shape
    torch.Size([2, 4, 5])
    """
    return at_least_float32(project(dropped_TD, A_ERD)).expand(experts, -1, -1)


def read_gate(weight_EMN: Tensor, source: Tensor) -> Tensor:
    """Apply a gate of few inputs to them: [E, M, T] in the type of the source.

    Args:
        weight_EMN: [E, M, N] the gate of each expert.
        source: [N, T] inputs that the experts share, or [E, N, T] each expert's own.

    >>> read_gate(torch.ones(2, 4, 3), torch.ones(3, 5)).shape
    torch.Size([2, 4, 5])
    """
    weight_EMN = weight_EMN.to(source.dtype)
    if source.dim() == 3:
        return weight_EMN @ source
    return (weight_EMN.flatten(0, 1) @ source).view(*weight_EMN.shape[:2], -1)


def combine(weighted_ERT: Tensor, B_ERO: Tensor) -> Tensor:
    """Send weighted activations through all experts' B at once: [T, O] in the type of B.

    >>> combine(torch.ones(2, 4, 5), torch.ones(2, 4, 6)).shape
    torch.Size([5, 6])
    """
    return weighted_ERT.to(B_ERO.dtype).flatten(0, 1).mT @ B_ERO.flatten(0, 1)


def combine_all(weighted: Sequence[Tensor], factors: Sequence[Tensor]) -> Tensor:
    """Send several banks' weighted activations through their B in one product: [T, O].

    Args:
        weighted: [E, R, T] of each bank.
        factors: its B [E, R, O], all of one type.

    >>> m, B = torch.ones(2, 4, 5), torch.ones(2, 4, 6)
    >>> combine_all([m, m[:1]], [B, B[:1]]).shape
    torch.Size([5, 6])
    """
    if len(weighted) == 1:
        return combine(weighted[0], factors[0])
    B_NO = torch.cat([B_ERO.flatten(0, 1) for B_ERO in factors])
    m_NT = torch.cat([m_ERT.to(B_NO.dtype).flatten(0, 1) for m_ERT in weighted])
    return m_NT.mT @ B_NO


def scaled_product(m_XY: Tensor, n_YZ: Tensor, scale: float) -> Tensor:
    """Return scale m n in one operation.

    >>> scaled_product(torch.ones(5, 4), torch.ones(4, 6), 2.0)[0, 0]
    tensor(8.)
    """
    if scale == 1:
        return m_XY @ n_YZ
    return torch.addmm(m_XY.new_empty(()), m_XY, n_YZ, beta=0, alpha=scale)


def add_product(base_TO: Tensor | None, m_TN: Tensor, B_NO: Tensor, scale: float = 1.0) -> Tensor:
    """Return base + scale m B; if the types allow, the product adds to the base as it goes.

    >>> add_product(torch.ones(5, 6), torch.ones(5, 4), torch.ones(4, 6), 2.0)[0, 0]
    tensor(9.)
    """
    dtype = B_NO.dtype
    if base_TO is None or torch.promote_types(base_TO.dtype, dtype) != dtype:
        y_TO = scaled_product(m_TN, B_NO, scale)
        return y_TO if base_TO is None else base_TO + y_TO
    if base_TO.dtype == dtype:
        return torch.addmm(base_TO, m_TN, B_NO, alpha=scale)
    return base_TO.to(dtype).addmm_(m_TN, B_NO, alpha=scale)
