"""Forward and backward pass of the whole adapter, without autograd: fused.py makes them one step.

Between the two passes only x (in its own type), one boolean mask of x under dropout, z, the gates'
values and the chosen experts' weights are kept; everything else is computed again (adjoint.py).

The routed experts are one bank, the shared expert another (banks.py). The banks have their products
in common: one reads x for the factors A and the gates of selection of both, and one writes y.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rotmole.ops.mixture.banks import Bank, Gradients, How, Parts, Rotated, Saved
from rotmole.ops.mixture.products import add_product, project, project_all, read_gate
from rotmole.ops.precision import at_least_float32
from rotmole.ops.rotation.adjoint import Adjoint, adjoint
from rotmole.ops.rotation.table import ROTATIONS, Gate
from rotmole.ops.routing.selection import choose, spread_chosen
from rotmole.ops.spec import Spec


def dropped(x_TD: Tensor, keep_TD: Tensor | None, how: How) -> Tensor:
    """Return x after dropout, in the type of the products."""
    x_TD = x_TD.to(how.dtype)
    return x_TD if keep_TD is None else x_TD * keep_TD * how.keep_scale


class Read(NamedTuple):
    """What the maps of one bank make of x, all in at least float32.

    Attributes:
        z_ERT: activations.
        logits_ET: of the router, if the weights are not given.
        vector_EVT, angle_EMT: values of gates that read x.
        few_NT: C x, or given logits: what small gates read, unless it is z.
    """

    z_ERT: Tensor
    logits_ET: Tensor | None
    vector_EVT: Tensor | None
    angle_EMT: Tensor | None
    few_NT: Tensor | None


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
            few_NT = parts.logits_TE.mT.to(z_ERT.dtype)
        logits_ET = None if logits_E1T is None else logits_E1T.squeeze(1)
        reads.append(Read(z_ERT, logits_ET, gates[i], gates[count + i], few_NT))
    return reads


def _apply(x_TD: Tensor, weights: list[Tensor | None]) -> list[Tensor | None]:
    """Apply maps to x in one product, in x's type; results are in at least float32.

    No result holds the memory of another.
    """
    there = [weight.to(x_TD.dtype) for weight in weights if weight is not None]
    if not there:
        return weights
    if len(there) == 1:
        results = [at_least_float32(project(x_TD, there[0]))]
    else:
        results = [_own(value) for value in project_all(x_TD, there)]
    if len(results) == len(weights):
        return [*results]
    values = iter(results)
    return [None if weight is None else next(values) for weight in weights]


def _own(value: Tensor) -> Tensor:
    wide = at_least_float32(value)
    return wide.clone() if wide is value else wide


def forward(how: How, parts: Parts) -> tuple[Tensor, Tensor | None, list[Saved]]:
    """Return y [T, O] (the base's output added), the logits [T, E] or None, and what to keep."""
    banks, reads = parts.banks(how.spec), _read(how, parts)
    m_NT, saved = [], []
    for (spec, bank), read in zip(banks, reads, strict=True):
        given = parts.weight_TE if bank is parts.routed else None
        m_ERT, kept = _weighted(how, spec, bank, read, given)
        m_NT.append(m_ERT.to(how.dtype).flatten(0, 1))
        saved.append(kept)
    B_NO = _stack([bank.B_ERO.flatten(0, 1) for _, bank in banks]).to(how.dtype)
    y_TO = add_product(parts.base_TO, _stack(m_NT).mT, B_NO)
    logits_ET = reads[0].logits_ET
    return y_TO, None if logits_ET is None else logits_ET.mT, saved


def _weighted(
    how: How, spec: Spec, bank: Bank, read: Read, weight_TE: Tensor | None
) -> tuple[Tensor, Saved]:
    """Return s g_e R_e(x)[z_e] of each expert of a bank, and what its way back needs."""
    z_ERT, logits_ET, vector, angle, few_NT = read
    weight_KT = index_KT = probability_ET = None
    if spec.rotation_input == "router" and few_NT is None:
        few_NT = logits_ET
    made_ET = None
    if logits_ET is not None and spec.scoring == "sigmoid":  # the shared expert's gate
        made_ET = weight_KT = torch.sigmoid(logits_ET)
    elif logits_ET is not None:
        weight_KT, index_KT, probability_ET = choose(
            logits_ET,
            top_k=spec.top_k,
            selection=spec.selection,
            norm_topk_prob=spec.norm_topk_prob,
        )
        made_ET = spread_chosen(weight_KT, index_KT, len(logits_ET))
        if index_KT is not None:
            index_KT = index_KT.to(torch.uint8 if len(logits_ET) <= 256 else torch.int32)
    rotate = ROTATIONS[spec.rotation].rotate
    assert rotate is not None
    each_ERT = z_ERT.expand(bank.B_ERO.shape[0], -1, -1)  # one A may serve all experts
    if spec.small_gates:
        vector, angle = _small(bank, few_NT, each_ERT)
    gate = Gate(vector, angle, _wide(bank.center_ER))
    turned_ERT = rotate(each_ERT, gate)
    if how.rotated is not None:
        how.rotated.append(Rotated(each_ERT, turned_ERT, gate, made_ET))
    weight_ET = made_ET if weight_TE is None else weight_TE.mT
    if weight_ET is None:
        m_ERT = spec.scale * turned_ERT
    else:
        m_ERT = (spec.scale * weight_ET).unsqueeze(1) * turned_ERT
    if spec.small_gates:
        vector = angle = None  # computed again
    kept_angle = angle if vector is None else None
    return m_ERT, Saved(z_ERT, vector, kept_angle, weight_KT, index_KT, probability_ET, few_NT)


def _small(bank: Bank, few_NT: Tensor | None, z_ERT: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the values of vector and angle gate, which read few_NT, or z if that is None."""
    source = z_ERT if few_NT is None else few_NT
    gates = (bank.vector_EVN, bank.angle_EMN)
    vector, angle = [None if gate is None else read_gate(gate, source) for gate in gates]
    return vector, angle


def _wide(center_ER: Tensor | None) -> Tensor | None:
    return None if center_ER is None else at_least_float32(center_ER)


def _gate_again(
    spec: Spec, bank: Bank, saved: Saved, z_ERT: Tensor, x_TD: Tensor, exact_TD: Tensor
) -> Gate:
    """Return what the rotation read besides z; x in the products' type and in its own."""
    vector, angle = saved.vector_EVT, saved.angle_EMT
    if spec.small_gates:
        vector, angle = _small(bank, saved.few_NT, z_ERT)
    elif angle is None and bank.angle_EMN is not None:
        wide_EMD = at_least_float32(bank.angle_EMN)
        angle = project((x_TD if x_TD.dtype == wide_EMD.dtype else exact_TD).to(wide_EMD), wide_EMD)
    return Gate(vector, angle, _wide(bank.center_ER))


class _Back(NamedTuple):
    """What small gates send back: to z [E, R, T] or few [N, T], and their own gradients."""

    z_ERT: Tensor | None = None
    few_NT: Tensor | None = None
    vector_EVN: Tensor | None = None
    angle_EMN: Tensor | None = None


def _small_back(bank: Bank, saved: Saved, z_ERT: Tensor, gradient: Adjoint) -> _Back:
    """Go back through gates that read z or few numbers."""
    dsource: Tensor | None = None
    grads: list[Tensor | None] = []
    pairs = (
        (bank.vector_EVN, gradient.vector_EVT),
        (bank.angle_EMN, gradient.angle_EMT),
    )
    for weight_EMN, value in pairs:
        if weight_EMN is None or value is None:
            grads.append(None)
            continue
        if saved.few_NT is None:
            grad_EMN = value @ z_ERT.mT
            back = weight_EMN.to(value.dtype).mT @ value
        else:
            flat_MT = value.flatten(0, 1)
            grad_EMN = (flat_MT @ saved.few_NT.mT).view(weight_EMN.shape)
            back = weight_EMN.to(value.dtype).flatten(0, 1).mT @ flat_MT
        grads.append(grad_EMN.to(weight_EMN.dtype))
        dsource = back if dsource is None else dsource + back
    in_z = saved.few_NT is None
    return _Back(dsource if in_z else None, None if in_z else dsource, *grads)


class _Turned(NamedTuple):
    """The way back of one bank, up to the maps that read x.

    Attributes:
        gradient: of what made its weighted activations.
        small: what its small gates send back.
        router_ET: gradient of its router's logits, None if the weights are given or one.
        weight_TE: gradient of given weights, else None.
    """

    gradient: Adjoint
    small: _Back
    router_ET: Tensor | None
    weight_TE: Tensor | None


def _turn_back(
    how: How, parts: Parts, spec: Spec, bank: Bank, saved: Saved, dm_ERT: Tensor, x_TD: Tensor
) -> _Turned:
    """Go back from the gradient of a bank's weighted activations to those of what made them."""
    given_TE = parts.weight_TE if bank is parts.routed else None
    if saved.weight_KT is not None:
        weight_ET = spread_chosen(saved.weight_KT, saved.index_KT, bank.B_ERO.shape[0])
    else:
        weight_ET = dm_ERT.new_ones(1, 1) if given_TE is None else given_TE.mT
    G_E1T = (spec.scale * weight_ET).unsqueeze(1)
    z_ERT = saved.z_ERT.expand(bank.B_ERO.shape[0], -1, -1)
    gate = _gate_again(spec, bank, saved, z_ERT, x_TD, parts.x_TD)
    gradient, small = adjoint(spec.rotation, z_ERT, gate, G_E1T, dm_ERT), _Back()
    if spec.small_gates:
        small = _small_back(bank, saved, z_ERT, gradient)
        z_grad = gradient.z_ERT if small.z_ERT is None else gradient.z_ERT + small.z_ERT
        gradient = gradient._replace(z_ERT=z_grad, vector_EVT=None, angle_EMT=None)
    if bank.router_ED is None:
        dweight = None if given_TE is None else spec.scale * gradient.weight_E1T.squeeze(1).mT
        return _Turned(gradient, small, None, dweight)
    moved_ET = (G_E1T * gradient.weight_E1T).squeeze(1)
    if spec.scoring == "sigmoid":
        return _Turned(gradient, small, moved_ET * (1 - weight_ET), None)
    p_ET = weight_ET if saved.probability_ET is None else saved.probability_ET
    # back through the softmax p: moved is p times p's gradient, 0 where not chosen
    drouter_ET = torch.addcmul(moved_ET, p_ET, moved_ET.sum(0), value=-1)
    if spec.rotation_input == "router" and small.few_NT is not None:
        drouter_ET = drouter_ET + small.few_NT
    return _Turned(gradient, small, drouter_ET, None)


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
    B_NO = _stack([bank.B_ERO.flatten(0, 1) for _, bank in banks]).to(dtype)
    dm_NT = at_least_float32(B_NO @ dy_TO.mT)
    sizes = [bank.B_ERO.shape[0] * bank.B_ERO.shape[1] for _, bank in banks]
    turned = [
        _turn_back(how, parts, spec, bank, kept, dm.view(*bank.B_ERO.shape[:2], -1), x_TD)
        for (spec, bank), kept, dm in zip(banks, saved, _split(dm_NT, sizes), strict=True)
    ]
    if dlogits_TE is not None and turned[0].router_ET is not None:
        turned[0] = turned[0]._replace(router_ET=turned[0].router_ET + dlogits_TE.mT)
    m_NT = _stack([back.gradient.m_ERT.to(dtype).flatten(0, 1) for back in turned])
    dB = _split(m_NT @ dy_TO, sizes)
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
    spec: Spec, bank: Bank, back: _Turned, dB_NO: Tensor, maps: Sequence[Tensor | None]
) -> Bank:
    """Put together the gradients of one bank; maps: of what reads x, as `_linear` gives them."""
    dA, dvector, ddown, drouter, dangle = maps
    assert dA is not None
    if spec.small_gates:
        dvector, dangle = back.small.vector_EVN, back.small.angle_EMN
    dcenter = None
    if bank.center_ER is not None and back.gradient.center_ER is not None:
        dcenter = back.gradient.center_ER.to(bank.center_ER.dtype)
    dB_ERO = dB_NO.view(bank.B_ERO.shape).to(bank.B_ERO.dtype)
    return Bank(dA, dB_ERO, drouter, dvector, dangle, dcenter, ddown)


def _linear(
    how: How, parts: Parts, x_TD: Tensor, turned: Sequence[_Turned], needs_x: bool
) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """Return the gradients of x, and for each bank those of what reads x.

    Returns:
        ([T, D] or None, [A, vector gate, C, router, angle gate] for each bank).
    """
    keep_TD, reads_dropped, reads_x = parts.keep_TD, [], []
    for (_, bank), (gradient, small, router_ET, _) in zip(
        parts.banks(how.spec), turned, strict=True
    ):
        A_ERD, dz = bank.A_ERD, gradient.z_ERT
        dz = dz if len(A_ERD) == len(dz) else dz.sum(0)
        reads_dropped += [(A_ERD, dz), (bank.vector_EVN, gradient.vector_EVT)]
        reads_dropped += [(bank.down_HD, small.few_NT)]
        reads_x += [(bank.router_ED, router_ET), (bank.angle_EMN, gradient.angle_EMT)]
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
    grad_NT = _stack(parts_NT).to(dtype)
    dx_TD = None
    if needs_x:
        dx_TD = grad_NT.mT @ _stack([w.flatten(0, -2).to(dtype) for w, _ in there])
    parts = iter(torch.split(grad_NT @ x_TD, rows))
    grads = [
        None if w is None or g is None else next(parts).view(w.shape).to(w.dtype) for w, g in pairs
    ]
    return dx_TD, grads


def _stack(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([*parts])


def _split(rows_NX: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    parts: Sequence[Tensor] = [rows_NX] if len(sizes) == 1 else torch.split(rows_NX, sizes)
    return parts
