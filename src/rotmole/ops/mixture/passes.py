"""Forward and backward pass of the whole adapter, without autograd: fused.py makes them one step.

Between the two passes only x (in its own type), one boolean mask of x under dropout, z, the gates'
values and the chosen experts' weights are kept; everything else is computed again (adjoint.py).

The routed experts are one bank, the shared expert another (banks.py). The banks have their products
in common: one reads x for the factors A and the gates of selection of both, and one writes y.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rotmole.ops.compiled import few
from rotmole.ops.mixture.banks import Bank, Gradients, How, Parts, Saved
from rotmole.ops.mixture.products import (
    add_product,
    project,
    project_all,
    scaled_product,
    stack,
    tokens_last,
)
from rotmole.ops.mixture.rank_space import Kind, Read, Small, Turned, turn_back, weigh
from rotmole.ops.precision import at_least_float32
from rotmole.ops.spec import Spec


def dropped(x_TD: Tensor, keep_TD: Tensor | None, how: How) -> Tensor:
    """Return x after dropout, in the type of the products."""
    x_TD = x_TD.to(how.dtype)
    return x_TD if keep_TD is None else x_TD * keep_TD * how.keep_scale


def _read(how: How, parts: Parts) -> list[Read]:
    """Apply all maps that read x, for each bank.

    The factors A and the routers are one product where types and dropout allow, vector and angle
    gates another; A is never in one product with a gate, so every mode finds the same z and logits
    to the bit.
    """
    x_TD, A_dtype = parts.x_TD, parts.routed.A_ERD.dtype
    factors: list[Tensor | None] = []
    routers: list[Tensor | None] = []
    vectors: list[Tensor | None] = []
    angles: list[Tensor | None] = []
    downs: list[Tensor | None] = []
    for spec, bank in parts.banks(how.spec):
        factors.append(bank.A_ERD)
        routers.append(None if bank.router_ED is None else bank.router_ED.unsqueeze(1))
        vectors.append(None if spec.small_gates else bank.vector_EVN)
        angles.append(None if spec.small_gates else bank.angle_EMN)
        downs.append(None if bank.down_HD is None else bank.down_HD.unsqueeze(0))
    wide_dtype = A_dtype if A_dtype.itemsize >= 4 else torch.float32
    together = parts.keep_TD is None and how.dtype == wide_dtype
    reads_wide = together or any(weight is not None for weight in [*routers, *angles])
    wide_TD = x_TD.to(wide_dtype) if reads_wide else x_TD  # one copy for all
    dropped_TD = dropped(wide_TD if how.dtype == wide_dtype else x_TD, parts.keep_TD, how)
    if together:
        z_and_logits = _apply(wide_TD, factors + routers)
        gates = _apply(wide_TD, vectors + angles)
    else:
        z_and_logits = _apply(dropped_TD, factors) + _apply(wide_TD, routers)
        gates = _apply(dropped_TD, vectors) + _apply(wide_TD, angles)
    few, count, reads = _apply(dropped_TD, downs), len(factors), []
    for i in range(count):
        z_ERT, logits_E1T, few_1HT = z_and_logits[i], z_and_logits[count + i], few[i]
        assert z_ERT is not None
        few_NT = None if few_1HT is None else few_1HT[0]
        if i == 0 and parts.logits_TE is not None:
            few_NT = parts.logits_TE.mT
        logits_ET = None if logits_E1T is None else logits_E1T.squeeze(1)
        reads.append(Read(z_ERT, logits_ET, gates[i], gates[count + i], few_NT))
    return reads


def _apply(x_TD: Tensor, weights: list[Tensor | None]) -> list[Tensor | None]:
    """Apply maps to x in one product, in x's type; results are in at least float32.

    No result holds the memory of another. Where tokens are few, each map has a product of its own:
    that is cheaper than to lay the maps together.
    """
    there = [weight.to(x_TD.dtype) for weight in weights if weight is not None]
    if not there:
        return weights
    if len(there) == 1 or few(x_TD):
        results = [at_least_float32(project(x_TD, weight)) for weight in there]
    else:
        results = [_own(value) for value in project_all(x_TD, there)]
    if len(results) == len(weights):
        return [*results]
    values = iter(results)
    return [None if weight is None else next(values) for weight in weights]


def _own(value: Tensor) -> Tensor:
    wide = at_least_float32(value)
    return wide.clone(memory_format=torch.contiguous_format) if wide is value else wide


def forward(how: How, parts: Parts) -> tuple[Tensor, Tensor | None, Tensor | None, list[Saved]]:
    """Return what fused_mixture returns, and what to keep for the way back, bank by bank."""
    kind, smalls = _kind(how, parts)
    weighed = weigh(kind, smalls, _read(how, parts), parts.weight_TE, how.rotated)
    B_NO = stack([bank.B_ERO.flatten(0, 1) for _, bank in parts.banks(how.spec)]).to(how.dtype)
    y_TO = add_product(parts.base_TO, weighed.m_NT.mT, B_NO, kind.scale)
    logits_ET = weighed.logits_ET
    logits_TE = None if logits_ET is None else logits_ET.mT
    return y_TO, logits_TE, weighed.index_KT, weighed.saved


def _kind(how: How, parts: Parts) -> tuple[Kind, list[Small]]:
    banks = parts.banks(how.spec)
    sizes = tuple((bank.B_ERO.shape[0], bank.B_ERO.shape[1]) for _, bank in banks)
    routes = tuple(bank.router_ED is not None for _, bank in banks)
    scales = {spec.scale for spec, _ in banks}
    alike = len(scales) == 1 and not torch.compiler.is_compiling()  # which joins it to its kernels
    scale = scales.pop() if alike else 1.0
    kind = Kind(tuple(spec for spec, _ in banks), sizes, routes, how.dtype, scale, few(parts.x_TD))
    return kind, [Small.of(spec, bank) for spec, bank in banks]


def _angle_again(
    spec: Spec, bank: Bank, saved: Saved, x_TD: Tensor, exact: Tensor
) -> Tensor | None:
    """Return the values of an angle gate that were not kept.

    Args:
        spec, bank, saved: of one bank.
        x_TD, exact: x in the type of the products, and in its own.
    """
    if spec.small_gates or saved.angle_EMT is not None or bank.angle_EMN is None:
        return None
    wide_EMD = at_least_float32(bank.angle_EMN)
    return project((x_TD if x_TD.dtype == wide_EMD.dtype else exact).to(wide_EMD), wide_EMD)


def backward(
    how: How,
    parts: Parts,
    saved: Sequence[Saved],
    dy_TO: Tensor | None,
    dlogits_TE: Tensor | None,
    *,
    needs_x: bool,
) -> Gradients:
    """Return the gradients of the parts, given those of y and of the logits; base_TO's is left."""
    banks, dtype = parts.banks(how.spec), how.dtype
    if dy_TO is None:
        dy_TO = parts.x_TD.new_zeros(parts.x_TD.shape[0], parts.routed.B_ERO.shape[-1])
    dy_TO, x_TD = dy_TO.to(dtype), parts.x_TD.to(dtype)
    B_NO = stack([bank.B_ERO.flatten(0, 1) for _, bank in banks]).to(dtype)
    kind, smalls = _kind(how, parts)
    angles = [
        _angle_again(spec, bank, kept, x_TD, parts.x_TD)
        for (spec, bank), kept in zip(banks, saved, strict=True)
    ]
    dm_NT = tokens_last(dy_TO, B_NO, kind.scale).contiguous()
    m_NT, turned = turn_back(kind, smalls, saved, angles, parts.weight_TE, dm_NT, dlogits_TE)
    sizes = [experts * rank for experts, rank in kind.sizes]
    dB = _split(scaled_product(m_NT, dy_TO, kind.scale), sizes)
    dx, maps = _linear(how, parts, x_TD, turned, needs_x)
    grads = [
        _bank_gradients(spec, bank, back, dB_NO, each)
        for (spec, bank), back, dB_NO, each in zip(banks, turned, dB, maps, strict=True)
    ]
    dlogits = None
    if parts.logits_TE is not None and turned[0].small.few_NT is not None:
        dlogits = turned[0].small.few_NT.mT.to(parts.logits_TE.dtype)
    shared = grads[1] if len(grads) > 1 else None
    return Gradients(None, dx, None, turned[0].weight_TE, dlogits, grads[0], shared)


def _bank_gradients(
    spec: Spec, bank: Bank, back: Turned, dB_NO: Tensor, maps: Sequence[Tensor | None]
) -> Bank:
    """Put together the gradients of one bank; maps: of what reads x, as `_linear` gives them."""
    dA, dvector, ddown, drouter, dangle = maps
    assert dA is not None
    if spec.small_gates:
        dvector, dangle = back.small.vector_EVN, back.small.angle_EMN
    dcenter = None
    if bank.center_ER is not None and back.center_ER is not None:
        dcenter = back.center_ER.to(bank.center_ER.dtype)
    dB_ERO = dB_NO.view(bank.B_ERO.shape).to(bank.B_ERO.dtype)
    return Bank(dA, dB_ERO, drouter, dvector, dangle, dcenter, ddown)


def _linear(
    how: How, parts: Parts, x_TD: Tensor, turned: Sequence[Turned], needs_x: bool
) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """Return the gradients of x, and for each bank those of what reads x.

    Returns:
        ([T, D] or None, [A, vector gate, C, router, angle gate] for each bank).
    """
    keep_TD, reads_dropped, reads_x = parts.keep_TD, [], []
    for (_, bank), back in zip(parts.banks(how.spec), turned, strict=True):
        reads_dropped += [(bank.A_ERD, back.z_ERT), (bank.vector_EVN, back.vector_EVT)]
        reads_dropped += [(bank.down_HD, back.small.few_NT)]
        reads_x += [(bank.router_ED, back.router_ET), (bank.angle_EMN, back.angle_EMT)]
    split = len(reads_dropped)
    if keep_TD is None:
        dx, grads = _into_x(x_TD, [*reads_dropped, *reads_x], needs_x)
    else:
        dx, grads = _into_x(dropped(x_TD, keep_TD, how), reads_dropped, needs_x)
        straight, more = _into_x(x_TD, reads_x, needs_x)
        grads += more
        if dx is not None:
            dx = dx * keep_TD * how.keep_scale
            dx = dx if straight is None else dx + straight
    maps = [
        [*grads[3 * i : 3 * i + 3], *grads[split + 2 * i : split + 2 * i + 2]]
        for i in range(len(turned))
    ]
    return None if dx is None else dx.to(parts.x_TD.dtype), maps


def _into_x(
    x_TD: Tensor, pairs: list[tuple[Tensor | None, Tensor | None]], needs_x: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Send gradients of linear maps of x to x and to the maps, in one product each.

    Args:
        x_TD: [T, D] what the maps read.
        pairs: (weight [..., D], gradient of its output [..., T]) of each map, None where absent.
        needs_x: whether x wants a gradient.

    Returns:
        ([T, D] or None, gradients of the weights).
    """
    there = [(w, g) for w, g in pairs if w is not None and g is not None]
    if not there:
        return None, [None for _ in pairs]
    dtype, width = x_TD.dtype, x_TD.shape[-1]
    rows = [w.numel() // width for w, _ in there]
    parts_NT = [g.reshape(n, x_TD.shape[0]) for n, (_, g) in zip(rows, there, strict=True)]
    grad_NT = stack(parts_NT).to(dtype)
    dx_TD = None
    if needs_x:
        dx_TD = grad_NT.mT @ stack([w.flatten(0, -2).to(dtype) for w, _ in there])
    parts = iter(torch.split(grad_NT @ x_TD, rows))
    grads = [
        None if w is None or g is None else next(parts).view(w.shape).to(w.dtype) for w, g in pairs
    ]
    return dx_TD, grads


def _split(rows_NX: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    parts: Sequence[Tensor] = [rows_NX] if len(sizes) == 1 else torch.split(rows_NX, sizes)
    return parts
