"""The adapter as one autograd.Function: router, low-rank activations, rotation and mixing together.

It computes what router_logits, route and mixture compute, and differs in what it keeps and does:

- For the backward pass only x (in its own type), one boolean mask of x under dropout, z, the
  gates' values and the experts' weights are kept; everything else is computed again (adjoint.py).
- The gradients of A, the gates and the router are one product, and that of x is another.

mixture.py is its slow twin, and takes its place where autograd has to see every step: under
torch.compile and torch.export, and for second derivatives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotmole.ops.adjoint import adjoint
from rotmole.ops.mixture import combine, mixture, project
from rotmole.ops.precision import at_least_float32, without_autocast
from rotmole.ops.rotation import ROTATIONS, Gate
from rotmole.ops.routing import route, router_logits


@dataclass(frozen=True)
class Settings:
    """What the function needs besides tensors.

    Attributes:
        rotation: a name in ROTATIONS, not of kind "output".
        scale: s of the formula.
        top_k, selection, norm_topk_prob: see routing.route; not read where weights are given.
        dtype: type of the products with A, B and the vector gate; gates, routing and rotation are
            computed in at least float32.
        keep_scale: what kept inputs are multiplied by under dropout, 1 / (1 - p).
    """

    rotation: str
    scale: float
    top_k: int = 1
    selection: str = "top_k"
    norm_topk_prob: bool = True
    dtype: torch.dtype = torch.float32
    keep_scale: float = 1.0


GATES = ("rotation_vector", "rotation_angle", "rotation_center")


def can_fuse(rotation: str, rotation_input: str = "x", rotation_metric: str = "rank") -> bool:
    """Say whether the function knows the rotation: it acts on z, reads x, and needs no metric."""
    known = ROTATIONS[rotation].kind != "output"
    return known and rotation_input == "x" and rotation_metric == "rank"


def _dropped(x_TD: Tensor, keep_TD: Tensor | None, settings: Settings) -> Tensor:
    x_TD = x_TD.to(settings.dtype)
    return x_TD if keep_TD is None else x_TD * keep_TD * settings.keep_scale


def _plain(
    settings: Settings,
    x_TD: Tensor,
    keep_TD: Tensor | None,
    weight_TE: Tensor | None,
    router_ED: Tensor | None,
    A_ERD: Tensor,
    B_ERO: Tensor,
    *gates: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Compute the same by the slow twin, one autograd step at a time."""
    dtype = settings.dtype
    logits_TE = None
    if router_ED is not None:
        logits_TE = router_logits(x_TD, router_ED)
        weight_TE = route(
            logits_TE,
            top_k=settings.top_k,
            selection=settings.selection,
            norm_topk_prob=settings.norm_topk_prob,
        ).weight_TE
    assert weight_TE is not None
    named = {name: gate for name, gate in zip(GATES, gates, strict=True) if gate is not None}
    if "rotation_vector" in named:
        named["rotation_vector"] = named["rotation_vector"].to(dtype)
    y_TO = mixture(
        x_TD,
        _dropped(x_TD, keep_TD, settings),
        weight_TE,
        A_ERD.to(dtype),
        B_ERO.to(dtype),
        named,
        rotation=settings.rotation,
        scale=settings.scale,
    )
    return y_TO, logits_TE


def _rotate(z_ERT: Tensor, gate: Gate, settings: Settings) -> Tensor:
    rotate = ROTATIONS[settings.rotation].rotate
    assert rotate is not None
    return rotate(z_ERT, gate)


class _Fused(torch.autograd.Function):
    """(settings, x, keep, weight, router, A, B, vector, angle, center) -> (y, router's logits)."""

    @staticmethod
    def forward(ctx: Any, settings: Settings, *tensors: Tensor | None) -> Any:
        x_TD, keep_TD, weight_TE, router_ED, A_ERD, B_ERO, vector_EVD, angle_EMD, center_ER = (
            tensors
        )
        assert x_TD is not None
        assert A_ERD is not None
        assert B_ERO is not None
        dtype = settings.dtype
        dropped_TD = _dropped(x_TD, keep_TD, settings)
        z_ERT = at_least_float32(project(dropped_TD, A_ERD.to(dtype)))
        vector = angle = None
        if vector_EVD is not None:
            vector = at_least_float32(project(dropped_TD, vector_EVD.to(dtype)))
        if angle_EMD is not None:
            wide_EMD = at_least_float32(angle_EMD)
            angle = project(x_TD.to(wide_EMD.dtype), wide_EMD)
        gate = Gate(vector, angle, None if center_ER is None else at_least_float32(center_ER))
        logits_TE = probability_TE = None
        if router_ED is not None:
            logits_TE = router_logits(x_TD, router_ED)
            routing = route(
                logits_TE,
                top_k=settings.top_k,
                selection=settings.selection,
                norm_topk_prob=settings.norm_topk_prob,
            )
            weight_TE = routing.weight_TE
            if settings.selection == "top_k" and not settings.norm_topk_prob:
                probability_TE = routing.probability_TE
        assert weight_TE is not None
        turned_ERT = _rotate(z_ERT.expand(B_ERO.shape[0], -1, -1), gate, settings)
        G_E1T = (settings.scale * weight_TE).mT.unsqueeze(1)
        y_TO = combine(G_E1T * turned_ERT, B_ERO.to(dtype))
        ctx.save_for_backward(
            x_TD, keep_TD, weight_TE, router_ED, A_ERD, B_ERO, vector_EVD, angle_EMD, center_ER,
            z_ERT, vector, angle, probability_TE,
        )  # fmt: skip
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return y_TO, logits_TE

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        y_TO, logits_TE = grads
        if torch.is_grad_enabled():  # somebody wants second derivatives
            return _differentiable(ctx, y_TO, logits_TE)
        return _backward(ctx, y_TO, logits_TE)


def _differentiable(
    ctx: Any, dy_TO: Tensor | None, dlogits_TE: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Run the slow twin again and differentiate it, so that the result can be differentiated."""
    x_TD, keep_TD, weight_TE, router_ED, *rest = ctx.saved_tensors[:9]
    given = [x_TD, keep_TD, None if router_ED is not None else weight_TE, router_ED, *rest]
    y_TO, logits_TE = _plain(ctx.settings, *given)
    pairs = [(y_TO, dy_TO), (logits_TE, dlogits_TE)]
    outputs = [(y, dy) for y, dy in pairs if y is not None and dy is not None]
    wanted = [i for i, needs in enumerate(ctx.needs_input_grad[1:]) if needs]
    found = torch.autograd.grad(
        [y for y, _ in outputs],
        [given[i] for i in wanted],
        [dy for _, dy in outputs],
        create_graph=True,
        materialize_grads=True,
    )
    result: list[Tensor | None] = [None] * 10
    for i, grad in zip(wanted, found, strict=True):
        result[i + 1] = grad
    return tuple(result)


def _router_gradient(
    ctx: Any, dweight_ET: Tensor, weight_TE: Tensor, probability_TE: Tensor | None
) -> Tensor:
    """Go back through the softmax of the selected (or all) logits: [E, T]."""
    if probability_TE is None:
        p_ET, dp_ET = weight_TE.mT, dweight_ET
    else:  # weights are probabilities where selected, 0 elsewhere
        p_ET, dp_ET = probability_TE.mT, dweight_ET * (weight_TE.mT > 0)
    moved_ET = p_ET * dp_ET
    return torch.addcmul(moved_ET, p_ET, moved_ET.sum(0), value=-1)


def _backward(
    ctx: Any, dy_TO: Tensor | None, dlogits_TE: Tensor | None
) -> tuple[Tensor | None, ...]:
    (
        x_TD, keep_TD, weight_TE, router_ED, A_ERD, B_ERO, vector_EVD, angle_EMD, center_ER,
        z_ERT, vector, angle, probability_TE,
    ) = ctx.saved_tensors  # fmt: skip
    settings: Settings = ctx.settings
    dtype = settings.dtype
    if dy_TO is None:
        dy_TO = x_TD.new_zeros(x_TD.shape[0], B_ERO.shape[-1])
    dy_TO = dy_TO.to(dtype)
    dm_ERT = at_least_float32(project(dy_TO, B_ERO.to(dtype)))
    G_E1T = (settings.scale * weight_TE).mT.unsqueeze(1)
    center = None if center_ER is None else at_least_float32(center_ER)
    z_ERT = z_ERT.expand(B_ERO.shape[0], -1, -1)
    found = adjoint(settings.rotation, z_ERT, Gate(vector, angle, center), G_E1T, dm_ERT)
    dB = (found.m_ERT.to(dtype).flatten(0, 1) @ dy_TO).view(B_ERO.shape).to(B_ERO.dtype)
    dweight_ET = settings.scale * found.weight_E1T.squeeze(1)
    drouter_ET = None
    if router_ED is not None:
        drouter_ET = _router_gradient(ctx, dweight_ET, weight_TE, probability_TE)
        if dlogits_TE is not None:
            drouter_ET = drouter_ET + dlogits_TE.mT
    dz = found.z_ERT if A_ERD.shape[0] > 1 or B_ERO.shape[0] == 1 else found.z_ERT.sum(0)
    reads_dropped = [(A_ERD, dz), (vector_EVD, found.vector_EVT)]
    reads_x = [(router_ED, drouter_ET), (angle_EMD, found.angle_EMT)]
    needs_x = ctx.needs_input_grad[1]
    if keep_TD is None:
        dx, (dA, dvector, drouter, dangle) = _into_x(
            x_TD.to(dtype), [*reads_dropped, *reads_x], needs_x
        )
    else:
        dx, (dA, dvector) = _into_x(_dropped(x_TD, keep_TD, settings), reads_dropped, needs_x)
        straight, (drouter, dangle) = _into_x(x_TD.to(dtype), reads_x, needs_x)
        if dx is not None:
            dx = dx * keep_TD * settings.keep_scale
            dx = dx if straight is None else dx + straight
    dcenter = None if found.center_ER is None else found.center_ER.to(center_ER.dtype)
    dweight = dweight_ET.mT if router_ED is None else None
    dx = None if dx is None else dx.to(x_TD.dtype)
    return None, dx, None, dweight, drouter, dA, dB, dvector, dangle, dcenter


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


def fused_mixture(
    settings: Settings,
    x_TD: Tensor,
    A_ERD: Tensor,
    B_ERO: Tensor,
    gates: Mapping[str, Tensor],
    *,
    router_ED: Tensor | None = None,
    weight_TE: Tensor | None = None,
    keep_TD: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return what the adapter adds to W x, and the router's logits.

        logits = x W_router^T;  g = route(logits);  y = s sum_e g_e R_e(x)[A_e drop(x)] B_e

    Args:
        settings: rotation, scale, routing and types.
        x_TD: [T, D] layer input, of any floating type.
        A_ERD: [E, R, D] input factors, or [1, R, D]: one for all experts.
        B_ERO: [E, R, O] output factors.
        gates: rotation-gate parameters by name, as in rotation.gate_shapes.
        router_ED: [E, D] router, or None where weight_TE [T, E] is given.
        weight_TE: the experts' weights, zero where not selected.
        keep_TD: [T, D] bool, inputs that dropout keeps; None keeps all.

    Returns:
        ([T, O] in settings.dtype, [T, E] logits or None). A gradient of the logits, such as that of
        a balance loss, joins that of the weights.

    Source: as `mixture`; which steps are kept and computed again is our choice.

    >>> x, A, B = torch.ones(5, 3), torch.ones(2, 4, 3), torch.ones(2, 4, 6)
    >>> fused_mixture(Settings("none", 1.0), x, A, B, {}, router_ED=torch.ones(2, 3))[0].shape
    torch.Size([5, 6])
    """
    named = [gates.get(name) for name in GATES]
    with without_autocast(x_TD):
        if torch.compiler.is_compiling():
            return _plain(settings, x_TD, keep_TD, weight_TE, router_ED, A_ERD, B_ERO, *named)
        result: tuple[Tensor, Tensor | None] = _Fused.apply(  # type: ignore[no-untyped-call] # torch's own types
            settings, x_TD, keep_TD, weight_TE, router_ED, A_ERD, B_ERO, *named
        )
    return result
