"""The adapter as one autograd.Function: router, low-rank activations, rotation and mixing together.

It computes what `route` and `mixture` compute; passes.py says which steps differ. Given the base
layer's output, the last product adds to it as it goes, which saves a pass over [T, O].

`mixture` is its slow twin, and takes its place when autograd has to see every step: under
torch.compile, torch.export and torch.func, and for second derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rotmole.ops.compiled import compiled, may_compile
from rotmole.ops.mixture.banks import (
    Bank,
    How,
    Parts,
    Saved,
    letters_backward,
    letters_forward,
)
from rotmole.ops.mixture.dense import mixture
from rotmole.ops.mixture.passes import backward, dropped, forward
from rotmole.ops.precision import without_autocast
from rotmole.ops.rotation.adjoint import BY_HAND
from rotmole.ops.rotation.table import ROTATIONS
from rotmole.ops.routing.route import route
from rotmole.ops.spec import Weights
from rotmole.ops.transforms import is_transformed

GATES = ("rotation_vector", "rotation_angle", "rotation_center", "rotation_down")


def can_fuse(rotation: str, rotation_metric: str = "rank") -> bool:
    """Say whether the function knows the rotation: it acts on z and needs no metric."""
    return ROTATIONS[rotation].kind != "output" and rotation_metric == "rank"


def can_compile(rotation: str) -> bool:
    """Say whether the function can run as kernels: the way back must be written by hand."""
    return rotation in BY_HAND


def _bank(weights: Weights, router_ED: Tensor | None) -> Bank:
    gates = [weights.gates.get(name) for name in GATES]
    return Bank(weights.A_ERD, weights.B_ERO, router_ED, *gates)


def _weights(bank: Bank) -> Weights:
    named = {name: gate for name, gate in zip(GATES, bank[3:], strict=True) if gate is not None}
    router = {} if bank.router_ED is None else {"router_weight": bank.router_ED}
    return Weights(bank.A_ERD, bank.B_ERO, named, router)


def _plain(how: How, parts: Parts) -> tuple[Tensor, Tensor | None]:
    """Compute the same by the slow twin, one autograd step at a time."""
    x_TD, weight_TE, logits_TE = parts.x_TD, parts.weight_TE, parts.logits_TE
    weights = _weights(parts.routed)
    if parts.shared is not None:
        weights = weights._replace(shared=_weights(parts.shared))
    routes = parts.routed.router_ED is not None
    if routes:
        logits_TE, routing = route(how.spec, x_TD, weights)
        weight_TE = routing.weight_TE
    if weight_TE is None:
        weight_TE = x_TD.new_ones(x_TD.shape[0], 1)
    dropped_TD = dropped(x_TD, parts.keep_TD, how)
    cast = weights.cast(how.spec, how.dtype)
    y_TO = mixture(how.spec, x_TD, dropped_TD, cast, weight_TE, None, logits_TE)
    y_TO = y_TO if parts.base_TO is None else parts.base_TO + y_TO
    return y_TO, logits_TE if routes else None


def _forward(how: How, tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Return y, the router's logits, the chosen experts' numbers, and what to keep."""
    *made, saved = forward(how, Parts.of(tensors))
    return (*made, *(tensor for bank in saved for tensor in bank))


def _backward(
    kind: tuple[How, bool, int], tensors: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Return the gradients in the order of Parts.flat.

    Args:
        kind: how, whether x wants a gradient, and how many tensors there are in Parts.flat.
        tensors: those, what is saved of each bank, and the gradients of y and of the logits.
    """
    (how, needs_x, count), each = kind, len(Saved._fields)
    *kept, dy_TO, dlogits_TE = tensors[count:]
    saved = [Saved(*kept[i : i + each]) for i in range(0, len(kept), each)]  # type: ignore[arg-type] # z is there
    parts = Parts.of(tensors[:count])
    return backward(how, parts, saved, dy_TO, dlogits_TE, needs_x=needs_x).flat()


class _Fused(torch.autograd.Function):
    """(how, *parts) -> (y, router's logits, numbers of the chosen experts)."""

    @staticmethod
    def forward(ctx: Any, how: How, *tensors: Tensor | None) -> Any:
        parts = Parts.of(tensors)
        ctx.how, ctx.count = how, len(tensors) - 1
        ctx.banks = 1 if parts.shared is None else 2
        if how.rotated is None and may_compile(how.spec, parts.x_TD):
            y_TO, logits_TE, index_KT, *kept = compiled(
                _forward, how, tensors, letters_forward(ctx.banks)
            )
        else:
            y_TO, logits_TE, index_KT, *kept = _forward(how, tensors)
        ctx.save_for_backward(*tensors[1:], *kept)
        ctx.base_dtype = None if parts.base_TO is None else parts.base_TO.dtype
        ctx.set_materialize_grads(False)
        if index_KT is not None:
            ctx.mark_non_differentiable(index_KT)
        return y_TO, logits_TE, index_KT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy_TO, dlogits_TE, _ = grads
        _, needs_base, needs_x, *_ = ctx.needs_input_grad  # in the order of forward: how, Parts
        tensors, count = (None, *ctx.saved_tensors), ctx.count + 1
        gradients: list[Tensor | None]
        if torch.is_grad_enabled():  # second derivatives are wanted
            gradients = _differentiable(ctx, Parts.of(tensors[:count]), dy_TO, dlogits_TE)
        else:
            how, tensors = ctx.how._replace(rotated=None), (*tensors, dy_TO, dlogits_TE)
            if may_compile(how.spec, tensors[1]):
                # one package for all layers, though the first one's input wants no gradient
                kind, letters = (how, True, count), letters_backward(ctx.banks)
                gradients = [*compiled(_backward, kind, tensors, letters)]
            else:
                gradients = [*_backward((how, needs_x, count), tensors)]
        if needs_base and dy_TO is not None:
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
    inputs = parts.flat()
    wanted = {i: part for i, part in enumerate(inputs) if needs[i] and part is not None}
    gradients = torch.autograd.grad(
        [y for y, _ in outputs],
        list(wanted.values()),
        [dy for _, dy in outputs],
        create_graph=True,
        materialize_grads=True,
    )
    result: list[Tensor | None] = [None] * len(inputs)
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

    and the shared expert's part, if the weights have one.

    Args:
        how: the layer's spec, and the types of this call.
        x_TD: [T, D] layer input, of any floating type.
        weights: of the layer; its linear router is read only if no weight_TE is given.
        weight_TE: [T, E] the experts' weights, zero where not selected; None: by the router, or one
            where there is a single expert without a router.
        logits_TE: [T, E] those behind weight_TE, for rotation_input "router".
        keep_TD: [T, D] bool, inputs that dropout keeps; None keeps all.
        base_TO: [T, O] W x, of any floating type; None leaves it out. It is not changed.

    Returns:
        [T, O] in how.dtype or base_TO's, whichever is wider; [T, E] logits or None, whose
        gradient, such as that of a balance loss, joins that of the weights; and [K, T] numbers of
        the chosen experts, of any integer type, None if all are, if weights were given, or under
        torch.compile or torch.func.

    >>> x, weights = torch.ones(5, 3), Weights(torch.ones(2, 4, 3), torch.ones(2, 4, 6))
    >>> weights = weights._replace(router={"router_weight": torch.ones(2, 3)})
    >>> fused_mixture(How(Spec(num_experts=2), torch.float32), x, weights)[0].shape
    torch.Size([5, 6])
    """
    router_ED = weights.router.get("router_weight") if weight_TE is None else None
    if how.spec.rotation_input != "router" or router_ED is not None:
        logits_TE = None
    shared = None
    if weights.shared is not None:
        shared = _bank(weights.shared, weights.shared.router.get("router_weight"))
    parts = Parts(base_TO, x_TD, keep_TD, weight_TE, logits_TE, _bank(weights, router_ED), shared)
    with without_autocast(x_TD):
        if torch.compiler.is_compiling():
            # the very same steps can be traced if nobody differentiates and sort is known
            same = not (torch.is_grad_enabled() or torch.onnx.is_in_onnx_export())
            traced = forward(how, parts)[:2] if same else _plain(how, parts)
            return (*traced, None)
        if is_transformed():
            return (*_plain(how, parts), None)
        result: tuple[Tensor, Tensor | None, Tensor | None] = _Fused.apply(how, *parts.flat())  # type: ignore[no-untyped-call] # torch's own types
    return result
