"""The mixture for few tokens without gradients, as in cached decoding: one product reads x.

At one token a layer's time is the number of operations, not their size. The factors A, the vector
gates and, where types allow, router and angle gates are laid into one matrix once; each call then
makes one product with it, routes, rotates and mixes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from rotmole.ops.mixture import project
from rotmole.ops.passes import Settings, add_to
from rotmole.ops.precision import at_least_float32, without_autocast
from rotmole.ops.rotation import ROTATIONS, Gate
from rotmole.ops.routing import choose, spread_chosen


class Pack(NamedTuple):
    """Weights laid out for packed_mixture.

    Attributes:
        rows_ND: [N, D] A, vector gate, and what else is computed in the same type.
        B_ERO: [E, R, O] in that type.
        parts: name -> (first row, experts, rows of an expert) of what is in rows_ND.
        apart: name -> weight of what is computed in a wider type.
        center_ER: learned vectors, or None.
    """

    rows_ND: Tensor
    B_ERO: Tensor
    parts: dict[str, tuple[int, int, int]]
    apart: dict[str, Tensor]
    center_ER: Tensor | None


def pack(
    A_ERD: Tensor,
    B_ERO: Tensor,
    gates: Mapping[str, Tensor],
    router_ED: Tensor,
    dtype: torch.dtype,
) -> Pack:
    """Lay out the weights of a layer for packed_mixture.

    Args:
        A_ERD, B_ERO: [E, R, D] (or [1, R, D], shared) and [E, R, O] factors.
        gates: rotation-gate parameters by name, as in rotation.gate_shapes.
        router_ED: [E, D] router.
        dtype: type of the products.

    Returns:
        Copies; valid until a weight changes.
    """
    weights = {"A": A_ERD}
    apart: dict[str, Tensor] = {}
    if "rotation_vector" in gates:
        weights["vector"] = gates["rotation_vector"]
    same = weights if dtype in (torch.float32, torch.float64) else apart
    if "rotation_angle" in gates:
        same["angle"] = gates["rotation_angle"]
    same["router"] = router_ED.unsqueeze(1)
    parts, start = {}, 0
    for name, weight in weights.items():
        parts[name] = (start, weight.shape[0], weight.shape[1])
        start += weight.shape[0] * weight.shape[1]
    rows_ND = torch.cat([weight.detach().to(dtype).flatten(0, 1) for weight in weights.values()])
    center = gates.get("rotation_center")
    return Pack(
        rows_ND,
        B_ERO.detach().to(dtype),
        parts,
        {name: at_least_float32(weight.detach()) for name, weight in apart.items()},
        None if center is None else at_least_float32(center.detach()),
    )


def packed_mixture(
    settings: Settings, x_TD: Tensor, packed: Pack, base_TO: Tensor | None = None
) -> Tensor:
    """Return what the adapter adds to W x, or its sum with W x, without gradients.

    Args:
        settings: rotation, scale, routing ("top_k" or "dense" over a linear router) and type.
        x_TD: [T, D] layer input.
        packed: the layer's weights.
        base_TO: [T, O] W x; None leaves it out.

    Returns:
        [T, O] in settings.dtype or base_TO's, whichever is wider; differs from fused_mixture by
        rounding alone.

    Source: as `mixture`; the layout is our choice.

    >>> A, B, router = torch.ones(2, 4, 3), torch.ones(2, 4, 6), torch.ones(2, 3)
    >>> packed = pack(A, B, {}, router, torch.float32)
    >>> packed_mixture(Settings("none", 1.0), torch.ones(5, 3), packed).shape
    torch.Size([5, 6])
    """
    experts = packed.B_ERO.shape[0]
    with without_autocast(x_TD):
        rows_NT = linear(x_TD.to(settings.dtype), packed.rows_ND).mT

        def read(name: str) -> Tensor | None:
            if name in packed.parts:
                start, count, each = packed.parts[name]
                part = rows_NT[start : start + count * each].reshape(count, each, -1)
                part = at_least_float32(part)
                return part if count == experts else part.expand(experts, -1, -1)
            weight = packed.apart.get(name)
            return None if weight is None else project(x_TD.to(weight.dtype), weight)

        logits = read("router")
        z_ERT = read("A")
        assert logits is not None
        rotate = ROTATIONS[settings.rotation].rotate
        assert z_ERT is not None
        assert rotate is not None
        turned_ERT = rotate(z_ERT, Gate(read("vector"), read("angle"), packed.center_ER))
        chosen = choose(
            logits.squeeze(1),
            top_k=settings.top_k,
            selection=settings.selection,
            norm_topk_prob=settings.norm_topk_prob,
        )
        weight_ET = spread_chosen(chosen.weight_KT, chosen.index_KT, experts)
        m_ERT = (settings.scale * weight_ET).unsqueeze(1) * turned_ERT
        return add_to(base_TO, m_ERT, packed.B_ERO)
