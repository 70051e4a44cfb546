"""The sqrt-gate gradient: experts learn with the square root of their weight, forward unchanged."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rotmole.ops.transforms import is_transformed


class _SqrtGate(torch.autograd.Function):
    """y = (s g z') B, with sqrt(g) in place of g in what z' and B receive."""

    @staticmethod
    def forward(
        ctx: Any, weight_TE: Tensor, turned_TER: Tensor, B_ERO: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(weight_TE, turned_TER, B_ERO)
        ctx.scale = scale
        mixed_TER = (scale * weight_TE).unsqueeze(-1) * turned_TER
        return mixed_TER.to(B_ERO.dtype).flatten(1) @ B_ERO.flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TO,) = grads
        weight_TE, turned_TER, B_ERO = ctx.saved_tensors
        return (*_gradients(dy_TO, weight_TE, turned_TER, B_ERO, ctx.scale, ctx), None)


class _Gradients(NamedTuple):
    weight_TE: Tensor | None
    turned_TER: Tensor | None
    B_ERO: Tensor | None


def _gradients(
    dy_TO: Tensor, weight_TE: Tensor, turned_TER: Tensor, B_ERO: Tensor, scale: float, ctx: Any
) -> _Gradients:
    needs_weight, needs_turned, needs_B, _ = ctx.needs_input_grad
    wide = turned_TER.dtype
    root_TE1 = (scale * weight_TE.sqrt()).unsqueeze(-1).to(wide)
    weight_grad = turned_grad = B_grad = None
    if needs_weight or needs_turned:
        flat_TM = dy_TO @ B_ERO.to(dy_TO.dtype).flatten(0, 1).mT
        dm_TER = flat_TM.reshape(turned_TER.shape).to(wide)
        if needs_weight:
            weight_grad = (scale * (dm_TER * turned_TER).sum(-1)).to(weight_TE.dtype)
        if needs_turned:
            turned_grad = root_TE1 * dm_TER
    if needs_B:
        rooted_TM = (root_TE1 * turned_TER).flatten(1).to(dy_TO.dtype)
        B_grad = (rooted_TM.mT @ dy_TO).reshape(B_ERO.shape).to(B_ERO.dtype)
    return _Gradients(weight_grad, turned_grad, B_grad)


def combine_sqrt_gate(
    weight_TE: Tensor, turned_TER: Tensor, B_ERO: Tensor, *, scale: float
) -> Tensor:
    """Mix experts so that they learn with sqrt(g): y = s sum_e g_e z'_e B_e.

        backward: dm = dy B^T;  dg = s <dm, z'>;  dz' = s sqrt(g) dm;  dB = (s sqrt(g) z')^T dy

    An expert's two factors each move with g, so the product moves with g^2; a square root in the
    backward pass takes one of them away. The gate's own gradient is the ordinary one.
    Second derivatives are refused: this is no function's gradient.

    Args:
        weight_TE: [T, E] g, not negative, zero where an expert is not selected.
        turned_TER: [T, E, R] activations after their rotation.
        B_ERO: [E, R, O] output factors.
        scale: s.

    Returns:
        [T, O] in the type of B.

    Source: Riemannian MoE-LoRA (arXiv 2502.15828, the rescaled gate of section 4).

    >>> z, B = torch.ones(5, 2, 4), torch.ones(2, 4, 6)
    >>> combine_sqrt_gate(torch.ones(5, 2), z, B, scale=1.0).shape
    torch.Size([5, 6])
    """
    if is_transformed():  # the same value and gradient, in steps that torch.func can follow
        root_TE = weight_TE.detach().sqrt()
        first_TER = root_TE.unsqueeze(-1) * turned_TER
        second_TER = (weight_TE - root_TE).unsqueeze(-1) * turned_TER.detach()
        B_NO = B_ERO.flatten(0, 1)
        first_TO = (scale * first_TER).to(B_ERO.dtype).flatten(1) @ B_NO
        return first_TO + (scale * second_TER).to(B_ERO.dtype).flatten(1) @ B_NO.detach()
    y_TO: Tensor = _SqrtGate.apply(weight_TE, turned_TER, B_ERO, scale)  # type: ignore[no-untyped-call] # torch's own
    return y_TO
