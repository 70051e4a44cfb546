"""The modes of the rotation gate: how an expert's low-rank activation z is turned, per token.

Every mode is one function from z_ERT [E, R, T] to z' [E, R, T]; table.py lists them. Tokens
come last, so that sums over the few ranks run along whole vectors of tokens. Angles are in radians.
<a,b> is the inner product over the rank axis, or a M_e b^T where a metric is given
(`output_metric`), which keeps the length of the expert's output instead of that of z.

All modes are finite, with finite first and second derivatives, for every input in range: a small
epsilon e (precision.epsilon) is added to squared norms, and a norm that is divided by is floored
smoothly (`floor_at`). So z = 0 gives |z'| <= sqrt(e), not always an exact 0, and lengths are kept
to rounding wherever |z| is far above sqrt(e). Squares of numbers beyond 1e19 overflow float32.

At its zero start every mode returns z bit for bit; forms that are algebraically equal are not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rotmole.ops.precision import at_least_float32, epsilon, least_share

FLOOR = 0.01  # d of the formulas: where a direction counts as undefined, relative to its parent


def inner(a_ERT: Tensor, b_ERT: Tensor, metric_ERR: Tensor | None = None) -> Tensor:
    """Return <a,b> over the rank axis, kept as [E, 1, T]; with a metric, a M_e b^T."""
    if metric_ERR is not None:
        a_ERT = metric_ERR.mT @ a_ERT
    return (a_ERT * b_ERT).sum(-2, keepdim=True)


def square(a_ERT: Tensor, metric_ERR: Tensor | None = None) -> Tensor:
    """Return <a,a>, [E, 1, T]; with a metric at least the share u of a a^T that rounding leaves.

    So <a,a> is never negative, in whatever precision a device multiplies matrices; u is
    precision.least_share.
    """
    length_E1T = inner(a_ERT, a_ERT, metric_ERR)
    if metric_ERR is None:
        return length_E1T
    share = least_share(a_ERT.dtype, a_ERT.shape[-2])
    return torch.maximum(length_E1T, share * inner(a_ERT, a_ERT))


def floor_at(s: Tensor, b: Tensor) -> Tensor:
    """Raise s smoothly to at least b/3: s + b k^3/3 with k = relu(b - s)/b.

    Equals s for s >= b and is twice continuously differentiable. b must be positive.

    >>> floor_at(torch.tensor([0.0, 2.0]), torch.tensor(1.0))
    tensor([0.3333, 2.0000])
    """
    k = torch.relu(b - s) / b
    return s + b * (k * k * k) / 3


def angle_between(a_ERT: Tensor, b_ERT: Tensor, metric_ERR: Tensor | None = None) -> Tensor:
    """Return the angle between two vectors, [E, 1, T] in [0, pi] radians; 0 if one of them is 0.

        2 atan2(|u - v|, |u + v|),   u = a/|a|, v = b/|b|

    An arc cosine would lose half of the digits near 0 and pi. With a metric lengths are <a,a>.

    >>> angle_between(torch.ones(1, 2, 1), torch.tensor([[[1.0], [-1.0]]]))
    tensor([[[1.5708]]])
    """
    tiny = torch.finfo(a_ERT.dtype).tiny
    u, v = (w * torch.rsqrt(square(w, metric_ERR).clamp(min=tiny)) for w in (a_ERT, b_ERT))
    apart, along = (square(w, metric_ERR).sqrt() for w in (u - v, u + v))
    angle = 2 * torch.atan2(apart, along)
    empty = (a_ERT == 0).all(-2, keepdim=True) | (b_ERT == 0).all(-2, keepdim=True)
    return angle.masked_fill(empty, 0.0)


def output_metric(B_ERO: Tensor) -> Tensor:
    """Return the metric in which |z| is the length of the expert's output z B_e, up to a factor.

        M_e = (G_e + e I) / (tr(G_e)/R + e),   G_e = B_e B_e^T   (M_e = I exactly at B = 0)

    Args:
        B_ERO: [E, R, O] output factors; the Gram matrix is taken in at least float32.

    Returns:
        [E, R, R] symmetric positive definite.

    The output z B_e then turns in span(z B_e, q B_e) as an O x O rotation would
    turn it. Squared norms by a Gram matrix lose cond(B)^2 in precision (`square`).
    """
    B_ERO = at_least_float32(B_ERO)
    e, rank = epsilon(B_ERO), B_ERO.shape[1]
    gram_ERR = torch.einsum("ero,eso->ers", B_ERO, B_ERO)
    trace_E11 = gram_ERR.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    identity_RR = torch.eye(rank, dtype=B_ERO.dtype, device=B_ERO.device)
    return (gram_ERR + e * identity_RR) / (trace_E11 / rank + e)


def part_across(z: Tensor, q: Tensor, metric: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return n2 = <z,z> + e and the part of q across z, t = q - (<q,z>/n2) z."""
    n2 = square(z, metric) + epsilon(z)
    return n2, torch.addcmul(q, inner(q, z, metric) / n2, z, value=-1)


def tangent(z: Tensor, q: Tensor, metric: Tensor | None = None) -> Tensor:
    """Rotate z in span(z, q) by 2 atan(|t|/2), t the part of q across z.

        n2 = <z,z> + e;  t = q - (<q,z>/n2) z;  a = <t,t>
        z' = z + (sqrt(n2) t - (a/2) z) / (1 + a/4)
           = 8 v / (4 + a) - z, v = z + sqrt(n2) t / 2     z mirrored at v, as it is computed

    Changes an expert's direction per token, has no singular point, reaches every angle below pi.
    Source: the smooth form of RotMoLE's "pure rotation within a 2-dimensional plane" (arXiv
    2605.25565).
    """
    n2, t = part_across(z, q, metric)
    u = torch.reciprocal(square(t, metric) + 4)
    v = torch.addcmul(z, torch.sqrt(n2), t, value=0.5)
    return torch.addcmul(-z, u, v, value=8)


def bivector(z: Tensor, b: Tensor) -> Tensor:
    """Rotate z in span(e1, b) by 2 atan|b|, b in R^(R-1) across the first axis e1.

        z = (z1, zr);  y = (z1 - b.zr)/(1 + b.b);  z' = (2 y - z1, zr + 2 y b)

    A Cayley transform of a rank-2 skew matrix: rational, no epsilon, no root, no singular point.
    Changes an expert's direction per token.
    """
    z1, zr = z[..., :1, :], z[..., 1:, :]
    y = (z1 - inner(b, zr)) / (1 + inner(b, b))
    return torch.cat([2 * y - z1, zr + 2 * y * b], dim=-2)


def plane(z: Tensor, q: Tensor, angle: Tensor, metric: Tensor | None = None) -> Tensor:
    """Rotate z in span(z, q) by theta = pi tanh(angle), towards q for a positive angle.

        t = q - (<q,z>/n2) z;  t2 = floor_at(<t,t>, d^2 (<q,q> + d^2 n2) + e)
        z' = cos(theta) z + sin(theta) sqrt(n2/t2) t

    Plane and angle are learned apart. Keeps lengths where <t,t> is above its floor, that is where
    the part of q across z is at least d = 0.01 of |q| and |q| is not tiny beside |z|; elsewhere it
    shortens. Changes an expert's direction per token. R >= 3: at R = 2 there is one plane and only
    the sense of turning would be left.
    """
    n2, t = part_across(z, q, metric)
    floor = FLOOR**2 * (square(q, metric) + FLOOR**2 * n2) + epsilon(z)
    t2 = floor_at(square(t, metric), floor)
    theta = math.pi * torch.tanh(angle)
    return torch.addcmul(torch.cos(theta) * z, torch.sin(theta) * torch.sqrt(n2 / t2), t)


def givens(z: Tensor, theta: Tensor) -> Tensor:
    """Rotate the pairs (2m, 2m+1) of z by theta_m, for m < M; further pairs stay.

    The planes are fixed, but A and B absorb any change of basis, so these are general static
    planes; M = 1 is one plane for E D parameters. Changes an expert's direction per token. R even.
    Source: rotary planes as in RoFormer (arXiv 2104.09864).
    """
    planes = theta.shape[-2]
    first, second = z[..., 0 : 2 * planes : 2, :], z[..., 1 : 2 * planes : 2, :]
    cos, sin = torch.cos(theta), torch.sin(theta)
    turned = torch.stack([cos * first - sin * second, sin * first + cos * second], dim=-2)
    return torch.cat([turned.flatten(-3, -2), z[..., 2 * planes :, :]], dim=-2)


def cayley(z: Tensor, upper: Tensor) -> Tensor:
    """Rotate z by the Cayley transform of a skew matrix S: (I + S) y = z;  z' = 2 y - z.

    S has `upper` as its strict upper triangle, row by row. Where an entry exceeds 1/sqrt(e), all of
    S is scaled down until it does not: a plane is then turned by pi to rounding, and beyond it the
    system would be singular. Every rotation without an eigenvalue -1 is reached below that. Solved
    exactly: a Neumann series would not be orthogonal. R <= 16 (R x R per token
    and expert). Changes an expert's direction per token. Source: Cayley 1846.
    """
    z, upper = z.mT, upper.mT  # [E, T, R]: the solver wants its matrices last
    rank = z.shape[-1]
    rows, columns = torch.triu_indices(rank, rank, 1, device=z.device)
    empty = upper.new_zeros((*upper.shape[:-1], rank * rank))
    skew = empty.index_copy(-1, rows * rank + columns, upper)
    skew = skew.reshape(*z.shape, rank)
    skew = skew - skew.mT
    # beyond 1/sqrt(e) the identity would vanish beside S by rounding and odd ranks be singular
    largest = upper.abs().amax(-1)[..., None, None] * math.sqrt(epsilon(z))
    skew = skew / largest.clamp(min=1)
    identity = torch.eye(rank, dtype=z.dtype, device=z.device)
    y: Tensor = torch.linalg.solve(identity + skew, z.unsqueeze(-1)).squeeze(-1)
    return (2 * y - z).mT


def bias(z: Tensor, q: Tensor, metric: Tensor | None = None) -> Tensor:
    """Give z + q the length of z: z' = (z + q) sqrt(n2 / floor_at(s2, d^2 n2)).

        n2 = <z,z> + e;  s2 = <z+q,z+q> + e;  exact at q = 0 because it is one ratio in one root

    Keeps lengths where |z + q| >= d |z|. Adds no new direction: with q = Q x it is MoE-LoRA with
    A + Q in place of A, times a positive scalar |A x|/|(A+Q) x|; with q = Q z, B absorbs it.
    Source: the most literal reading of RotMoLE's "rotation bias" (arXiv 2605.25565).
    """
    e = epsilon(z)
    moved = z + q
    n2 = square(z, metric) + e
    s2 = square(moved, metric) + e
    return moved * torch.sqrt(n2 / floor_at(s2, FLOOR**2 * n2))


def scale(z: Tensor, angle: Tensor) -> Tensor:
    """Multiply z by the scalar cos(a) + sin(a): a control, no rotation.

    A signed, unnormalised scaling gate; what a rotation gains must beat this.
    """
    return (torch.cos(angle) + torch.sin(angle)) * z


def core(z: Tensor, matrix: Tensor) -> Tensor:
    """Return z + C_e(x) z, C_e any R x R matrix linear in x: a reference, no rotation, no bound."""
    experts, rank, tokens = z.shape
    core_ESRT = matrix.reshape(experts, rank, rank, tokens)
    return z + torch.einsum("esrt,ert->est", core_ESRT, z)
