"""The adapter as one autograd.Function: router, low-rank activations, rotation and mixing together.

It computes what `route` and `mixture` compute; passes.py says which steps differ. Given the base
layer's output, the last product adds to it as it goes, which saves a pass over [T, O].

`mixture` is its slow twin, and takes its place when autograd has to see every step: under
torch.compile, torch.export and torch.func, and for second derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rotmole.ops.mixture.dense import mixture
from rotmole.ops.mixture.passes import How, Parts, Saved, backward, dropped, forward
from rotmole.ops.precision import without_autocast
from rotmole.ops.rotation.table import ROTATIONS
from rotmole.ops.routing.route import route
from rotmole.ops.spec import Weights
from rotmole.ops.transforms import is_transformed

GATES = ("rotation_vector", "rotation_angle", "rotation_center", "rotation_down")


def can_fuse(rotation: str, rotation_metric: str = "rank") -> bool:
    """Say whether the function knows the rotation: it acts on z and needs no metric."""
    return ROTATIONS[rotation].kind != "output" and rotation_metric == "rank"


def _plain(how: How, parts: Parts) -> tuple[Tensor, Tensor | None]:
    """Compute the same by the slow twin, one autograd step at a time."""
    x_TD, weight_TE = parts.x_TD, parts.weight_TE
    logits_TE = parts.logits_TE
    gates = (parts.vector_EVN, parts.angle_EMN, parts.center_ER, parts.down_HD)
    named = {name: gate for name, gate in zip(GATES, gates, strict=True) if gate is not None}
    weights = Weights(parts.A_ERD, parts.B_ERO, named)
    if parts.router_ED is not None:
        weights = weights._replace(router={"router_weight": parts.router_ED})
        logits_TE, routing = route(how.spec, x_TD, weights)
        weight_TE = routing.weight_TE
    assert weight_TE is not None
    dropped_TD = dropped(x_TD, parts.keep_TD, how)
    cast = weights.cast(how.spec, how.dtype)
    y_TO = mixture(how.spec, x_TD, dropped_TD, cast, weight_TE, None, logits_TE)
    if parts.router_ED is None:
        logits_TE = None
    return y_TO if parts.base_TO is None else parts.base_TO + y_TO, logits_TE


class _Fused(torch.autograd.Function):
    """(how, *parts) -> (y, router's logits, numbers of the chosen experts)."""

    @staticmethod
    def forward(ctx: Any, how: How, *tensors: Tensor | None) -> Any:
        parts = Parts(*tensors)  # type: ignore[arg-type] # as fused_mixture gives them
        y_TO, logits_TE, saved = forward(how, parts)
        ctx.save_for_backward(*parts[1:], *saved)
        ctx.how = how
        ctx.base_dtype = None if parts.base_TO is None else parts.base_TO.dtype
        ctx.set_materialize_grads(False)
        if saved.index_KT is not None:
            ctx.mark_non_differentiable(saved.index_KT)
        return y_TO, logits_TE, saved.index_KT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy_TO, dlogits_TE, _ = grads
        tensors = ctx.saved_tensors
        count = len(Parts._fields) - 1
        parts, saved = Parts(None, *tensors[:count]), Saved(*tensors[count:])
        if torch.is_grad_enabled():  # second derivatives are wanted
            gradients = _differentiable(ctx, parts, dy_TO, dlogits_TE)
        else:
            needs_x = ctx.needs_input_grad[1 + Parts._fields.index("x_TD")]
            gradients = [*backward(ctx.how, parts, saved, dy_TO, dlogits_TE, needs_x=needs_x)]
        if ctx.needs_input_grad[1] and dy_TO is not None:
            gradients[0] = dy_TO.to(ctx.base_dtype)
        return None, *gradients


def _differentiable(
    ctx: Any, parts: Parts, dy_TO: Tensor | None, dlogits_TE: Tensor | None
) -> list[Tensor | None]:
    """Run the slow twin again and differentiate it, so that the result can be differentiated."""
    y_TO, logits_TE = _plain(ctx.how, parts)
    pairs = [(y_TO, dy_TO), (logits_TE, dlogits_TE)]
    outputs = [(y, dy) for y, dy in pairs if y is not None and dy is not None]
    needs = ctx.needs_input_grad[1:]
    wanted = {i: part for i, part in enumerate(parts) if needs[i] and part is not None}
    gradients = torch.autograd.grad(
        [y for y, _ in outputs],
        list(wanted.values()),
        [dy for _, dy in outputs],
        create_graph=True,
        materialize_grads=True,
    )
    result: list[Tensor | None] = [None] * len(parts)
    for i, grad in zip(wanted, gradients, strict=True):
        result[i] = grad
    return result


def fused_mixture(
    how: How,
    x_TD: Tensor,
    weights: Weights,
    *,
    weight_TE: Tensor | None = None,
    logits_TE: Tensor | None = None,
    keep_TD: Tensor | None = None,
    base_TO: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return what the adapter adds to W x, or its sum with W x, and the router's logits.

        logits = x W_router^T;  g = select(logits);  y = W x + s sum_e g_e R_e(x)[A_e drop(x)] B_e

    Args:
        how: the layer's spec, and the types of this call.
        x_TD: [T, D] layer input, of any floating type.
        weights: of the layer; its linear router is read only if no weight_TE is given.
        weight_TE: [T, E] the experts' weights, zero where not selected; None: by the router.
        logits_TE: [T, E] those behind weight_TE, for rotation_input "router".
        keep_TD: [T, D] bool, inputs that dropout keeps; None keeps all.
        base_TO: [T, O] W x, of any floating type; None leaves it out. It is not changed.

    Returns:
        [T, O] in how.dtype or base_TO's, whichever is wider; [T, E] logits or None, whose
        gradient, such as that of a balance loss, joins that of the weights; and [K, T] numbers of
        the chosen experts, None if all are, if weights were given, or under torch.compile or
        torch.func.

    >>> x, weights = torch.ones(5, 3), Weights(torch.ones(2, 4, 3), torch.ones(2, 4, 6))
    >>> weights = weights._replace(router={"router_weight": torch.ones(2, 3)})
    >>> fused_mixture(How(Spec(num_experts=2), torch.float32), x, weights)[0].shape
    torch.Size([5, 6])
    """
    router_ED = weights.router["router_weight"] if weight_TE is None else None
    named = [weights.gates.get(name) for name in GATES]
    A_ERD, B_ERO = weights.A_ERD, weights.B_ERO
    if how.spec.rotation_input != "router" or router_ED is not None:
        logits_TE = None
    parts = Parts(base_TO, x_TD, keep_TD, weight_TE, router_ED, A_ERD, B_ERO, *named)
    parts = parts._replace(logits_TE=logits_TE)
    with without_autocast(x_TD):
        if torch.compiler.is_compiling():
            # the very same steps can be traced if nobody differentiates and sort is known
            same = not (torch.is_grad_enabled() or torch.onnx.is_in_onnx_export())
            traced = forward(how, parts)[:2] if same else _plain(how, parts)
            return (*traced, None)
        if is_transformed():
            return (*_plain(how, parts), None)
        result: tuple[Tensor, Tensor | None, Tensor | None] = _Fused.apply(how, *parts)  # type: ignore[no-untyped-call] # torch's own types
    return result
