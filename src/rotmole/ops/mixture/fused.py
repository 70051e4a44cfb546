"""The adapter as one autograd.Function: router, low-rank activations, rotation and mixing together.

It computes what router_logits, route and mixture compute, and differs in what it keeps and does:
passes.py says which. Given the base layer's output, the last product adds to it as it goes, which
saves a pass over [T, O].

mixture.py is its slow twin, and takes its place where autograd has to see every step: under
torch.compile and torch.export, and for second derivatives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rotmole.ops.mixture.dense import mixture
from rotmole.ops.mixture.passes import Kept, Parts, Settings, backward, dropped, forward
from rotmole.ops.precision import without_autocast
from rotmole.ops.rotation.table import ROTATIONS
from rotmole.ops.routing.plain import route, router_logits

GATES = ("rotation_vector", "rotation_angle", "rotation_center")


def can_fuse(rotation: str, rotation_input: str = "x", rotation_metric: str = "rank") -> bool:
    """Say whether the function knows the rotation: it acts on z, reads x, and needs no metric."""
    known = ROTATIONS[rotation].kind != "output"
    return known and rotation_input == "x" and rotation_metric == "rank"


def _plain(settings: Settings, parts: Parts) -> tuple[Tensor, Tensor | None]:
    """Compute the same by the slow twin, one autograd step at a time."""
    dtype, x_TD, weight_TE, logits_TE = settings.dtype, parts.x_TD, parts.weight_TE, None
    if parts.router_ED is not None:
        logits_TE = router_logits(x_TD, parts.router_ED)
        weight_TE = route(
            logits_TE,
            top_k=settings.top_k,
            selection=settings.selection,
            norm_topk_prob=settings.norm_topk_prob,
        ).weight_TE
    assert weight_TE is not None
    gates = (parts.vector_EVD, parts.angle_EMD, parts.center_ER)
    named = {name: gate for name, gate in zip(GATES, gates, strict=True) if gate is not None}
    if "rotation_vector" in named:
        named["rotation_vector"] = named["rotation_vector"].to(dtype)
    y_TO = mixture(
        x_TD,
        dropped(x_TD, parts.keep_TD, settings),
        weight_TE,
        parts.A_ERD.to(dtype),
        parts.B_ERO.to(dtype),
        named,
        rotation=settings.rotation,
        scale=settings.scale,
    )
    return y_TO if parts.base_TO is None else parts.base_TO + y_TO, logits_TE


class _Fused(torch.autograd.Function):
    """(settings, *parts) -> (y, router's logits, numbers of the chosen experts)."""

    @staticmethod
    def forward(ctx: Any, settings: Settings, *tensors: Tensor | None) -> Any:
        parts = Parts(*tensors)  # type: ignore[arg-type] # as fused_mixture gives them
        y_TO, logits_TE, kept = forward(settings, parts)
        ctx.save_for_backward(*parts[1:], *kept)
        ctx.settings = settings
        ctx.base_dtype = None if parts.base_TO is None else parts.base_TO.dtype
        ctx.set_materialize_grads(False)
        if kept.index_KT is not None:
            ctx.mark_non_differentiable(kept.index_KT)
        return y_TO, logits_TE, kept.index_KT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy_TO, dlogits_TE, _ = grads
        saved = ctx.saved_tensors
        count = len(Parts._fields) - 1
        parts, kept = Parts(None, *saved[:count]), Kept(*saved[count:])
        if torch.is_grad_enabled():  # somebody wants second derivatives
            found = _differentiable(ctx, parts, dy_TO, dlogits_TE)
        else:
            needs_x = ctx.needs_input_grad[1 + Parts._fields.index("x_TD")]
            found = [*backward(ctx.settings, parts, kept, dy_TO, dlogits_TE, needs_x=needs_x)]
        if ctx.needs_input_grad[1] and dy_TO is not None:
            found[0] = dy_TO.to(ctx.base_dtype)
        return None, *found


def _differentiable(
    ctx: Any, parts: Parts, dy_TO: Tensor | None, dlogits_TE: Tensor | None
) -> list[Tensor | None]:
    """Run the slow twin again and differentiate it, so that the result can be differentiated."""
    y_TO, logits_TE = _plain(ctx.settings, parts)
    pairs = [(y_TO, dy_TO), (logits_TE, dlogits_TE)]
    outputs = [(y, dy) for y, dy in pairs if y is not None and dy is not None]
    needs = ctx.needs_input_grad[1:]
    wanted = {i: part for i, part in enumerate(parts) if needs[i] and part is not None}
    found = torch.autograd.grad(
        [y for y, _ in outputs],
        list(wanted.values()),
        [dy for _, dy in outputs],
        create_graph=True,
        materialize_grads=True,
    )
    result: list[Tensor | None] = [None] * len(parts)
    for i, grad in zip(wanted, found, strict=True):
        result[i] = grad
    return result


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
    base_TO: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return what the adapter adds to W x, or its sum with W x, and the router's logits.

        logits = x W_router^T;  g = route(logits);  y = W x + s sum_e g_e R_e(x)[A_e drop(x)] B_e

    Args:
        settings: rotation, scale, routing and types.
        x_TD: [T, D] layer input, of any floating type.
        A_ERD: [E, R, D] input factors, or [1, R, D]: one for all experts.
        B_ERO: [E, R, O] output factors.
        gates: rotation-gate parameters by name, as in rotation.gate_shapes.
        router_ED: [E, D] router, or None where weight_TE [T, E] is given.
        weight_TE: the experts' weights, zero where not selected.
        keep_TD: [T, D] bool, inputs that dropout keeps; None keeps all.
        base_TO: [T, O] W x, of any floating type; None leaves it out. It is not changed.

    Returns:
        [T, O] in settings.dtype or base_TO's, whichever is wider; [T, E] logits or None, whose
        gradient, such as that of a balance loss, joins that of the weights; and [K, T] numbers of
        the chosen experts, None where all are, where weights were given, or under torch.compile.

    Source: as `mixture`; which steps are kept and computed again is our choice.

    >>> x, A, B = torch.ones(5, 3), torch.ones(2, 4, 3), torch.ones(2, 4, 6)
    >>> fused_mixture(Settings("none", 1.0), x, A, B, {}, router_ED=torch.ones(2, 3))[0].shape
    torch.Size([5, 6])
    """
    named = [gates.get(name) for name in GATES]
    parts = Parts(base_TO, x_TD, keep_TD, weight_TE, router_ED, A_ERD, B_ERO, *named)
    with without_autocast(x_TD):
        if torch.compiler.is_compiling():
            # the very same steps can be traced where nobody differentiates and sort is known
            same = not (torch.is_grad_enabled() or torch.onnx.is_in_onnx_export())
            y_TO, logits_TE = forward(settings, parts)[:2] if same else _plain(settings, parts)
            return y_TO, logits_TE, None
        result: tuple[Tensor, Tensor | None, Tensor | None] = _Fused.apply(settings, *parts)  # type: ignore[no-untyped-call] # torch's own types
    return result
