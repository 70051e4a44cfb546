"""What surrounds the modes of the rotation gate, as loops: inner product, gradients, checks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rotmole.ops.reference.method import RANK_MODES, wide


def inner(a_ERT: Tensor, b_ERT: Tensor, metric_ERR: Tensor | None = None) -> Tensor:
    """Return <a, b> = a M b^T of every expert and token, [E, 1, T]; without a metric M = I."""
    E, R, T = a_ERT.shape
    value_E1T = a_ERT.new_zeros(E, 1, T)
    for e in range(E):
        for t in range(T):
            M_RR = torch.eye(R).to(a_ERT) if metric_ERR is None else metric_ERR[e]
            value_E1T[e, 0, t] = a_ERT[e, :, t] @ M_RR @ b_ERT[e, :, t]
    return value_E1T


def square(a_ERT: Tensor, metric_ERR: Tensor | None = None) -> Tensor:
    """Return <a, a>, with a metric at least 2 R eps a a^T (eps of the number format)."""
    value_E1T = inner(a_ERT, a_ERT, metric_ERR)
    E, R, T = a_ERT.shape
    for e in range(E):
        for t in range(T):
            least = 2 * R * torch.finfo(a_ERT.dtype).eps * (a_ERT[e, :, t] @ a_ERT[e, :, t])
            if metric_ERR is not None and value_E1T[e, 0, t] < least:
                value_E1T[e, 0, t] = least
    return value_E1T


class Adjoint(NamedTuple):
    """m = G z', and the gradients of what made it; None if the rotation has no such input."""

    m_ERT: Tensor
    z_ERT: Tensor
    weight_E1T: Tensor
    vector_EVT: Tensor | None
    angle_EMT: Tensor | None
    center_ER: Tensor | None


def adjoint(
    rotation: str,
    z_ERT: Tensor,
    G_E1T: Tensor,
    dm_ERT: Tensor,
    *,
    vector_EVT: Tensor | None = None,
    angle_EMT: Tensor | None = None,
    center_ER: Tensor | None = None,
) -> Adjoint:
    """Return m = G z', and the gradients of z, G and the gate's values, which autograd takes."""
    tensors = (z_ERT, G_E1T, vector_EVT, angle_EMT, center_ER)
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
    z, G, vector, angle, center = leaves
    assert z is not None
    assert G is not None
    E, R, T = z.shape
    none, eye_RR = z.new_zeros(0), torch.eye(R).to(z)
    experts = []
    for e in range(E):
        rows = []
        for t in range(T):
            q = none if vector is None else vector[e, :, t]
            q = q if center is None else center[e]
            theta = none if angle is None else angle[e, :, t]
            rows.append(G[e, 0, t] * RANK_MODES[rotation](z[e, :, t], q, theta, eye_RR))
        experts.append(torch.stack(rows, dim=1))
    m_ERT = torch.stack(experts)
    inputs = [leaf for leaf in leaves if leaf is not None]
    gradients = iter(torch.autograd.grad(m_ERT, inputs, dm_ERT, materialize_grads=True))
    dz, dG, *dgate = [None if leaf is None else next(gradients) for leaf in leaves]
    assert dz is not None
    assert dG is not None
    return Adjoint(m_ERT.detach(), dz, dG, *dgate)


def determinant(matrix: list[list[float]]) -> float:
    """Return det M, expanded along the first row."""
    if not matrix:
        return 1.0
    total = 0.0
    for column, value in enumerate(matrix[0]):
        minor = [row[:column] + row[column + 1 :] for row in matrix[1:]]
        total += (-1) ** column * value * determinant(minor)
    return total


def is_rotation(matrix_RR: Tensor, tolerance: float = 1e-9) -> bool:
    """Say whether rows are of length 1 and across one another, and the determinant is +1."""
    rows = wide(matrix_RR).tolist()
    for i, row in enumerate(rows):
        for j, other in enumerate(rows):
            dot = sum(a * b for a, b in zip(row, other, strict=True))
            if not abs(dot - (i == j)) <= tolerance:
                return False
    return abs(determinant(rows) - 1) <= tolerance


def can_fuse(rotation: str, rotation_metric: str = "rank") -> bool:
    """Say whether each expert is rotated by itself, with M = I."""
    return (rotation in RANK_MODES, rotation_metric) == (True, "rank")


def can_compile(rotation: str) -> bool:
    """Say whether the way back is written out."""
    return rotation in ("none", "tangent", "plane", "givens")
