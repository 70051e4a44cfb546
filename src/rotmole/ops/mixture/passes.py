"""Forward and backward pass of the whole adapter, without autograd: fused.py makes them one step.

Between the two passes only x (in its own type), one boolean mask of x under dropout, z, the gates'
values and the chosen experts' weights are kept; everything else is computed again (adjoint.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rotmole.ops.mixture.products import add_product, project, read_gate
from rotmole.ops.precision import at_least_float32
from rotmole.ops.rotation.adjoint import Adjoint, adjoint
from rotmole.ops.rotation.table import ROTATIONS, Gate
from rotmole.ops.routing.selection import choose, spread_chosen
from rotmole.ops.spec import Spec


class How(NamedTuple):
    """What one call of the function needs besides tensors.

    Attributes:
        spec: of the layer; its rotation is not of kind "output", and its routing is read only if
            no weights are given.
        dtype: type of the products with A, B and the vector gate; gates, routing and rotation are
            computed in at least float32.
        keep_scale: what kept inputs are multiplied by under dropout, 1 / (1 - p).
    """

    spec: Spec
    dtype: torch.dtype
    keep_scale: float = 1.0


class Parts(NamedTuple):
    """The tensors, in the order in which autograd sees them; shapes: fused.fused_mixture."""

    base_TO: Tensor | None
    x_TD: Tensor
    keep_TD: Tensor | None
    weight_TE: Tensor | None
    router_ED: Tensor | None
    A_ERD: Tensor
    B_ERO: Tensor
    vector_EVN: Tensor | None
    angle_EMN: Tensor | None
    center_ER: Tensor | None
    down_HD: Tensor | None = None
    logits_TE: Tensor | None = None


class Saved(NamedTuple):
    """What the backward pass needs besides the parts that are not the base's output.

    Attributes:
        z_ERT, vector_EVT, angle_EMT: activations and gates' values; the angle is computed again
            where there is a vector gate too, and both are if they are small.
        few_NT: what small gates read, C x or the router's own logits; None if they read z, or x.
        weight_KT, index_KT: weights and numbers of the chosen experts; or all weights and None;
            or None, None where weights were given.
        probability_ET: softmax over all, where weights are not normalised over the chosen.
    """

    z_ERT: Tensor
    vector_EVT: Tensor | None
    angle_EMT: Tensor | None
    weight_KT: Tensor | None
    index_KT: Tensor | None
    probability_ET: Tensor | None
    few_NT: Tensor | None


class Gradients(NamedTuple):
    """Gradients of Parts, None where there is no such part or nobody wants one."""

    base_TO: Tensor | None
    x_TD: Tensor | None
    keep_TD: None
    weight_TE: Tensor | None
    router_ED: Tensor | None
    A_ERD: Tensor | None
    B_ERO: Tensor
    vector_EVN: Tensor | None
    angle_EMN: Tensor | None
    center_ER: Tensor | None
    down_HD: Tensor | None
    logits_TE: Tensor | None


def dropped(x_TD: Tensor, keep_TD: Tensor | None, how: How) -> Tensor:
    """Return x after dropout, in the type of the products."""
    x_TD = x_TD.to(how.dtype)
    return x_TD if keep_TD is None else x_TD * keep_TD * how.keep_scale


class Read(NamedTuple):
    """What the maps make of x, all in at least float32.

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


def _read(how: How, parts: Parts) -> Read:
    """Apply all maps that read x.

    A and the router are one product where types and dropout allow, vector and angle gate another;
    A is never in one product with a gate, so every mode finds the same z and logits to the bit.
    """
    x_TD, A, router = parts.x_TD, parts.A_ERD, parts.router_ED
    vector_EVD = angle_EMD = None
    if not how.spec.small_gates:
        vector_EVD, angle_EMD = parts.vector_EVN, parts.angle_EMN
    wide_dtype = torch.promote_types(A.dtype, torch.float32)
    together = parts.keep_TD is None and how.dtype == wide_dtype
    reads_wide = together or router is not None or angle_EMD is not None
    wide_TD = x_TD.to(wide_dtype) if reads_wide else x_TD  # one copy for all
    dropped_TD = dropped(wide_TD if how.dtype == wide_dtype else x_TD, parts.keep_TD, how)
    logits = vector = angle = None
    if together and router is not None:
        z, logits = _products(x_TD=wide_TD, weights=[A, router.unsqueeze(1)])
    else:
        z = at_least_float32(project(dropped_TD, A.to(how.dtype)))
        if router is not None:
            logits = project(wide_TD, router.to(wide_dtype).unsqueeze(1))
    if together and vector_EVD is not None and angle_EMD is not None:
        vector, angle = _products(x_TD=wide_TD, weights=[vector_EVD, angle_EMD])
    else:
        if vector_EVD is not None:
            vector = at_least_float32(project(dropped_TD, vector_EVD.to(how.dtype)))
        if angle_EMD is not None:
            angle = project(wide_TD, angle_EMD.to(wide_dtype))
    few = None
    if parts.down_HD is not None:
        few = at_least_float32(project(dropped_TD, parts.down_HD.to(how.dtype).unsqueeze(0))[0])
    elif parts.logits_TE is not None:
        few = parts.logits_TE.mT.to(z.dtype)
    logits_ET = None if logits is None else logits.squeeze(1)
    return Read(z, logits_ET, vector, angle, few)


def _products(x_TD: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """Apply two maps to x in one product; no result holds the memory of both."""
    first, second = weights
    rows = torch.cat([weight.flatten(0, 1).to(x_TD.dtype) for weight in weights])
    both_NT = rows @ x_TD.mT
    count = first.shape[0] * first.shape[1]
    return [
        both_NT[:count].view(*first.shape[:2], -1).clone(),
        both_NT[count:].view(*second.shape[:2], -1).clone(),
    ]


def forward(how: How, parts: Parts) -> tuple[Tensor, Tensor | None, Saved]:
    """Return y [T, O] (the base's output added), the logits [T, E] or None, and what to keep."""
    z_ERT, logits_ET, vector, angle, few_NT = _read(how, parts)
    weight_KT = index_KT = probability_ET = None
    if how.spec.rotation_input == "router" and few_NT is None:
        few_NT = logits_ET
    if logits_ET is not None:
        chosen = choose(
            logits_ET,
            top_k=how.spec.top_k,
            selection=how.spec.selection,
            norm_topk_prob=how.spec.norm_topk_prob,
        )
        weight_KT, index_KT, probability_ET = chosen
        weight_ET = spread_chosen(weight_KT, index_KT, len(logits_ET))
        if index_KT is not None:
            index_KT = index_KT.to(torch.uint8 if len(logits_ET) <= 256 else torch.int32)
    else:
        assert parts.weight_TE is not None
        weight_ET = parts.weight_TE.mT
    rotate = ROTATIONS[how.spec.rotation].rotate
    assert rotate is not None
    experts = parts.B_ERO.shape[0]
    each_ERT = z_ERT.expand(experts, -1, -1)  # one A may serve all experts
    if how.spec.small_gates:
        vector, angle = _small(parts, few_NT, each_ERT)
    gate = Gate(vector, angle, _wide(parts.center_ER))
    turned_ERT = rotate(each_ERT, gate)
    m_ERT = (how.spec.scale * weight_ET).unsqueeze(1) * turned_ERT
    m_TN, B_NO = m_ERT.to(how.dtype).flatten(0, 1).mT, parts.B_ERO.flatten(0, 1)
    y_TO = add_product(parts.base_TO, m_TN, B_NO.to(how.dtype))
    if how.spec.small_gates:
        vector = angle = None  # computed again
    saved_angle = angle if vector is None else None
    saved = Saved(z_ERT, vector, saved_angle, weight_KT, index_KT, probability_ET, few_NT)
    return y_TO, None if logits_ET is None else logits_ET.mT, saved


def _small(
    parts: Parts, few_NT: Tensor | None, z_ERT: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Return the values of vector and angle gate, which read few_NT, or z if that is None."""
    source = z_ERT if few_NT is None else few_NT
    gates = (parts.vector_EVN, parts.angle_EMN)
    vector, angle = [None if gate is None else read_gate(gate, source) for gate in gates]
    return vector, angle


def _wide(center_ER: Tensor | None) -> Tensor | None:
    return None if center_ER is None else at_least_float32(center_ER)


def _weights(parts: Parts, saved: Saved) -> Tensor:
    """Return all experts' weights [E, T]."""
    if saved.weight_KT is not None:
        return spread_chosen(saved.weight_KT, saved.index_KT, parts.B_ERO.shape[0])
    assert parts.weight_TE is not None
    return parts.weight_TE.mT


def _gate_again(how: How, x_TD: Tensor, z_ERT: Tensor, parts: Parts, saved: Saved) -> Gate:
    """Return what the rotation read besides z; x in any type."""
    vector, angle = saved.vector_EVT, saved.angle_EMT
    if how.spec.small_gates:
        vector, angle = _small(parts, saved.few_NT, z_ERT)
    elif angle is None and parts.angle_EMN is not None:
        wide_EMD = at_least_float32(parts.angle_EMN)
        angle = project(
            (x_TD if x_TD.dtype == wide_EMD.dtype else parts.x_TD).to(wide_EMD), wide_EMD
        )
    return Gate(vector, angle, _wide(parts.center_ER))


class _Back(NamedTuple):
    """What small gates send back: to z [E, R, T] or few [N, T], and their own gradients."""

    z_ERT: Tensor | None
    few_NT: Tensor | None
    vector_EVN: Tensor | None
    angle_EMN: Tensor | None


def _small_back(parts: Parts, saved: Saved, z_ERT: Tensor, gradient: Adjoint) -> _Back:
    """Go back through gates that read z or few numbers."""
    dsource: Tensor | None = None
    grads: list[Tensor | None] = []
    pairs = (
        (parts.vector_EVN, gradient.vector_EVT),
        (parts.angle_EMN, gradient.angle_EMT),
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


def _router_gradient(moved_ET: Tensor, p_ET: Tensor, dlogits_TE: Tensor | None) -> Tensor:
    """Go back through the softmax p; moved is p times p's gradient, 0 where not chosen."""
    drouter_ET = torch.addcmul(moved_ET, p_ET, moved_ET.sum(0), value=-1)
    return drouter_ET if dlogits_TE is None else drouter_ET + dlogits_TE.mT


def backward(
    how: How,
    parts: Parts,
    saved: Saved,
    dy_TO: Tensor | None,
    dlogits_TE: Tensor | None,
    *,
    needs_x: bool,
) -> Gradients:
    """Return the gradients of the parts, given those of y and of the logits; base_TO's is left."""
    B_ERO, router, dtype = parts.B_ERO, parts.router_ED, how.dtype
    if dy_TO is None:
        dy_TO = parts.x_TD.new_zeros(parts.x_TD.shape[0], B_ERO.shape[-1])
    dy_TO, x_TD = dy_TO.to(dtype), parts.x_TD.to(dtype)
    dm_ERT = at_least_float32(project(dy_TO, B_ERO.to(dtype)))
    weight_ET = _weights(parts, saved)
    G_E1T = (how.spec.scale * weight_ET).unsqueeze(1)
    z_ERT = saved.z_ERT.expand(B_ERO.shape[0], -1, -1)
    gate = _gate_again(how, x_TD, z_ERT, parts, saved)
    gradient = adjoint(how.spec.rotation, z_ERT, gate, G_E1T, dm_ERT)
    small = _Back(None, None, None, None)
    if how.spec.small_gates:
        small = _small_back(parts, saved, z_ERT, gradient)
        z_grad = gradient.z_ERT if small.z_ERT is None else gradient.z_ERT + small.z_ERT
        gradient = gradient._replace(z_ERT=z_grad, vector_EVT=None, angle_EMT=None)
    dB = (gradient.m_ERT.to(dtype).flatten(0, 1) @ dy_TO).view(B_ERO.shape).to(B_ERO.dtype)
    dweight = drouter_ET = dcenter = None
    if router is None:
        dweight = how.spec.scale * gradient.weight_E1T.squeeze(1).mT
    else:
        p_ET = weight_ET if saved.probability_ET is None else saved.probability_ET
        moved_ET = (G_E1T * gradient.weight_E1T).squeeze(1)
        drouter_ET = _router_gradient(moved_ET, p_ET, dlogits_TE)
        if how.spec.rotation_input == "router" and small.few_NT is not None:
            drouter_ET = drouter_ET + small.few_NT
    if parts.center_ER is not None and gradient.center_ER is not None:
        dcenter = gradient.center_ER.to(parts.center_ER.dtype)
    maps = _linear(how, parts, x_TD, gradient, drouter_ET, small, needs_x)
    dx, dA, dvector, ddown, drouter, dangle = maps
    dlogits = None
    if how.spec.small_gates:
        dvector, dangle = small.vector_EVN, small.angle_EMN
        if parts.logits_TE is not None and small.few_NT is not None:
            dlogits = small.few_NT.mT.to(parts.logits_TE.dtype)
    return Gradients(
        None, dx, None, dweight, drouter, dA, dB, dvector, dangle, dcenter, ddown, dlogits
    )


def _linear(
    how: How,
    parts: Parts,
    x_TD: Tensor,
    gradient: Adjoint,
    drouter_ET: Tensor | None,
    small: _Back,
    needs_x: bool,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, A, vector gate, C, router and angle gate: what reads x."""
    A_ERD, keep_TD = parts.A_ERD, parts.keep_TD
    dz = gradient.z_ERT if len(A_ERD) == len(gradient.z_ERT) else gradient.z_ERT.sum(0)
    reads_dropped = [
        (A_ERD, dz),
        (parts.vector_EVN, gradient.vector_EVT),
        (parts.down_HD, small.few_NT),
    ]
    reads_x = [(parts.router_ED, drouter_ET), (parts.angle_EMN, gradient.angle_EMT)]
    if keep_TD is None:
        dx, grads = _into_x(x_TD, [*reads_dropped, *reads_x], needs_x)
    else:
        dx, grads = _into_x(dropped(x_TD, keep_TD, how), reads_dropped, needs_x)
        straight, more = _into_x(x_TD, reads_x, needs_x)
        grads += more
        if dx is not None:
            dx = dx * keep_TD * how.keep_scale
            dx = dx if straight is None else dx + straight
    return (None if dx is None else dx.to(parts.x_TD.dtype), *grads)


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


def _stack(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
