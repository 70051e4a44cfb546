"""The experts of a layer themselves: how large, how far from their start, how alike.

Everything is computed from the factors, in rank space: a product P_e = s A_e^T B_e [D, O] is never
made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rotmole.evaluation.choices import similarities
from rotmole.inspection.inspection import Experts as Geometry
from rotmole.inspection.probe import Found
from rotmole.tuner.experts.experts import Experts
from rotmole.tuner.experts.initial import base_weight
from rotmole.tuner.settings.settings import Settings

NEGLIGIBLE = 1e-6
"""A singular value of a product, relative to its largest, whose directions do not count."""


@torch.no_grad()
def geometry(found: Found, settings: Settings) -> Geometry:
    """Measure the experts of one layer.

    Args:
        found: the layer.
        settings: of the adapter; they say whether the start is known.
    """
    experts = found.experts
    weights, scale = experts.weights(), experts.spec.scale
    B_ERO = _double(weights.B_ERO)
    A_ERD = _double(weights.A_ERD).expand(len(B_ERO), -1, -1)
    inner_EE = _inner(A_ERD, B_ERO)
    norm_E = inner_EE.diagonal().clamp(min=0).sqrt()
    base = float(base_weight(found.layer.get_base_layer()).detach().double().norm()) or 1.0
    cosine_EE = inner_EE / (norm_E[:, None] * norm_E).clamp(min=1e-300)
    directions = [_directions(A, B) for A, B in zip(A_ERD, B_ERO, strict=True)]
    drift_E = _drift(experts, settings, A_ERD, B_ERO)
    drift: list[float | None] = [None] * len(norm_E)
    if drift_E is not None:
        drift = (scale * drift_E / base).tolist()
    return Geometry(
        norm=tuple((scale * norm_E / base).tolist()),
        drift=tuple(drift),
        cosine=_rows(cosine_EE.clamp(-1, 1)),
        alike=_rows(similarities(experts)),
        input_angle=_angles([read for read, _ in directions]),
        output_angle=_angles([write for _, write in directions]),
        router_drift=router_drift(experts),
    )


def _inner(A_ERD: Tensor, B_ERO: Tensor) -> Tensor:
    """Return [E, E], <A_i^T B_i, A_j^T B_j> = sum over r, s of (A_i A_j^T)_rs (B_i B_j^T)_rs."""
    AA = torch.einsum("erd,fsd->efrs", A_ERD, A_ERD)
    return (AA * torch.einsum("ero,fso->efrs", B_ERO, B_ERO)).sum((-1, -2))


def _drift(experts: Experts, settings: Settings, A_ERD: Tensor, B_ERO: Tensor) -> Tensor | None:
    """Return |A_e^T B_e - its start| [E]; None where the start is unknown.

    B starts at 0 but for imported experts, with init_weights "svd" (then the start is kept), and
    with init_weights false.
    """
    residual = experts.residual()
    if residual is not None:
        A = torch.cat([A_ERD, _double(residual.A_ERD).expand(len(B_ERO), -1, -1)], 1)
        B = torch.cat([B_ERO, -_double(residual.B_ERO)], 1)
        return _inner(A, B).diagonal().clamp(min=0).sqrt()
    if not settings.init_weights or settings.expert_names is not None:
        return None
    return _inner(A_ERD, B_ERO).diagonal().clamp(min=0).sqrt()


def _directions(A_RD: Tensor, B_RO: Tensor) -> tuple[Tensor, Tensor]:
    """Return orthonormal bases [D, r] and [O, r] of what A^T B reads and writes."""
    read_DR, left_RR = torch.linalg.qr(A_RD.T)
    write_OR, right_RR = torch.linalg.qr(B_RO.T)
    U, S, Vh = torch.linalg.svd(left_RR @ right_RR.T)
    kept = S / S[0].clamp(min=1e-300) > NEGLIGIBLE
    return read_DR @ U[:, kept], write_OR @ Vh.T[:, kept]


def _angles(bases: Sequence[Tensor]) -> tuple[tuple[float | None, ...], ...]:
    """Return [E, E] mean principal angles of subspaces; None for one without directions.

        cos(angle_k) = k-th singular value of U_i^T U_j

    Source: Bjorck and Golub (1973).
    """
    count = len(bases)
    table: list[list[float | None]] = [[0.0] * count for _ in range(count)]
    for i in range(count):
        for j in range(i):
            table[i][j] = table[j][i] = _mean_angle(bases[i], bases[j])
    return tuple(map(tuple, table))


def _mean_angle(U_Nr: Tensor, V_Nr: Tensor) -> float | None:
    if not (U_Nr.shape[1] and V_Nr.shape[1]):
        return None
    cosines = torch.linalg.svdvals(U_Nr.T @ V_Nr).clamp(max=1.0)
    return float(torch.arccos(cosines).mean())


def router_drift(experts: Experts) -> float | None:
    """Estimate how far the entries of a router moved, relative to the bound they started within.

    A linear router starts uniformly in [-b, b] with b = 1/sqrt(fan_in). If an entry then moves by
    d, it lies outside with probability |d| / (2 b). So the share of entries outside, times two,
    estimates mean |d| / b; it is 0 if nothing moved, and at most 2. No start has to be kept.

    Returns:
        The estimate over all parameters of the router that start so; None if there are none.
    """
    outside = entries = 0
    if not experts.has_router:
        return None
    for name, parameter in experts.named_parameters():
        whole = experts.whole_name(name)
        if whole not in experts.router_names or whole in ("router_key", "router_mix"):
            continue
        fan_in = parameter.shape[-1]
        if whole == "router_threshold_bias":
            continue
        bound = 1 / math.sqrt(fan_in)
        # a bound in a half type may be rounded up
        slack = 1 + torch.finfo(parameter.dtype).eps
        outside += int((parameter.detach().abs() > bound * slack).sum())
        entries += parameter.numel()
    return 2 * outside / entries if entries else None


def _rows(table_EE: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, table_EE.tolist()))


def _double(values: Tensor) -> Tensor:
    return values.detach().cpu().double()
