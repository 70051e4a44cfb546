"""Backward passes of the rotations, by hand where speed matters: gradients from z and gates alone.

The forward pass is m = G z' with z' = rotate(z, gate) and G [E, 1, T] the experts' weights. Given
dm, each function computes z' again from z and the gate, and returns m itself (the gradient of B
needs it) and the gradients. Nothing but z, the gates and G has to be kept for it.

Every function here is tested against autograd through modes.py, which is the definition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rotmole.ops.precision import epsilon
from rotmole.ops.rotation.modes import FLOOR, floor_at, inner
from rotmole.ops.rotation.table import ROTATIONS, Gate


class Adjoint(NamedTuple):
    """m and the gradients of everything that made it; None if the rotation has no such input.

    Attributes:
        m_ERT: [E, R, T] G z'.
        z_ERT, weight_E1T: gradients of z and G.
        vector_EVT, angle_EMT, center_ER: gradients of the gate's parts.
    """

    m_ERT: Tensor
    z_ERT: Tensor
    weight_E1T: Tensor
    vector_EVT: Tensor | None = None
    angle_EMT: Tensor | None = None
    center_ER: Tensor | None = None


def _none(z: Tensor, gate: Gate, G: Tensor, dm: Tensor) -> Adjoint:
    return Adjoint(G * z, G * dm, inner(dm, z))


def _across(
    z: Tensor, q: Tensor, k: Tensor, n2: Tensor, dt: Tensor, dt_z: Tensor, twice_dn2: Tensor
) -> tuple[Tensor, Tensor]:
    """Go back through t = q - k z, k = <q,z>/n2, n2 = <z,z> + e: gradients of z and q.

    dt is t's gradient, dt_z = <dt, z>, and twice_dn2 twice what reaches n2 by other ways.
    """
    ratio = dt_z / n2
    along = torch.addcmul(twice_dn2, ratio, k, value=2)
    dz = torch.addcmul(along * z, ratio, q, value=-1).addcmul_(k, dt, value=-1)
    return dz, torch.addcmul(dt, ratio, z, value=-1)


def _tangent(z: Tensor, gate: Gate, G: Tensor, dm: Tensor) -> Adjoint:
    """z' = alpha z + beta t with h = 1/(1 + a/4), alpha = 2 h - 1, beta = sqrt(n2) h.

    Few operations matter: one on small tensors costs its fixed price, one with a number more.
    """
    q = gate.vector_EVT
    assert q is not None
    e = epsilon(z)
    n2 = inner(z, z) + e
    k = inner(q, z) / n2
    t = torch.addcmul(q, k, z, value=-1)
    h, root = torch.reciprocal(1 + inner(t, t) / 4), torch.sqrt(n2)
    alpha, beta = 2 * h - 1, root * h
    z_dm, t_dm = inner(dm, z), inner(dm, t)
    dweight = torch.addcmul(alpha * z_dm, beta, t_dm)
    z_dm, t_dm = G * z_dm, G * t_dm  # from here on <z, dz'> and <t, dz'>
    da = h * h * torch.addcmul(z_dm, root, t_dm, value=0.5)  # -2 times the gradient of a
    g_alpha, g_beta = G * alpha, G * beta
    dt = torch.addcmul(g_beta * dm, da, t, value=-1)
    dt_z = torch.addcmul(beta * z_dm, da, k, value=-e)  # <t, z> = k e
    dz, dq = _across(z, q, k, n2, dt, dt_z, t_dm * h / root)
    m = torch.addcmul(g_alpha * z, g_beta, t)
    return Adjoint(m, dz.addcmul_(g_alpha, dm), dweight, dq)


def _plane(z: Tensor, gate: Gate, G: Tensor, dm: Tensor) -> Adjoint:
    """z' = cos(theta) z + sin(theta) rho t, rho = sqrt(n2/t2), t2 = floor_at(<t,t>, f)."""
    q, angle = gate.vector_EVT, gate.angle_EMT
    assert q is not None
    assert angle is not None
    e = epsilon(z)
    n2 = inner(z, z) + e
    k = inner(q, z) / n2
    t = torch.addcmul(q, k, z, value=-1)
    s, f = inner(t, t), FLOOR**2 * (inner(q, q) + FLOOR**2 * n2) + e
    t2 = floor_at(s, f)
    rho = torch.sqrt(n2 / t2)
    turn = torch.tanh(angle)
    theta = math.pi * turn
    cos, sin = torch.cos(theta), torch.sin(theta)
    beta = sin * rho
    z_dm, t_dm = inner(dm, z), inner(dm, t)
    dweight = cos * z_dm + beta * t_dm
    z_dm, t_dm = G * z_dm, G * t_dm
    dangle = math.pi * (1 - turn * turn) * (cos * rho * t_dm - sin * z_dm)
    half = beta * t_dm / 2  # rho's gradient times rho / 2
    dt2 = -half / t2
    low = torch.relu(f - s) / f  # the k of floor_at
    df = dt2 * low * low * (1 - (2 / 3) * low)
    ds = dt2 * (1 - low * low)
    dn2 = half / n2 + FLOOR**4 * df
    g_cos, g_beta = G * cos, G * beta
    dt = torch.addcmul(g_beta * dm, 2 * ds, t)
    dt_z = beta * z_dm + (2 * e) * ds * k  # <t, z> = k e
    dz, dq = _across(z, q, k, n2, dt, dt_z, 2 * dn2)
    m = torch.addcmul(g_cos * z, g_beta, t)
    dq = dq.addcmul_(2 * FLOOR**2 * df, q)
    return Adjoint(m, dz.addcmul_(g_cos, dm), dweight, dq, dangle)


def _givens(z: Tensor, gate: Gate, G: Tensor, dm: Tensor) -> Adjoint:
    """Turn dz' back by -theta; theta's gradient is <dz', z' turned by a right angle>."""
    theta = gate.angle_EMT
    assert theta is not None
    planes = theta.shape[1]
    even, odd = slice(0, 2 * planes, 2), slice(1, 2 * planes, 2)
    cos, sin = torch.cos(theta), torch.sin(theta)
    turned = z.clone()
    turned[:, even] = cos * z[:, even] - sin * z[:, odd]
    turned[:, odd] = sin * z[:, even] + cos * z[:, odd]
    dturned = G * dm
    dz = dturned.clone()
    dz[:, even] = cos * dturned[:, even] + sin * dturned[:, odd]
    dz[:, odd] = cos * dturned[:, odd] - sin * dturned[:, even]
    dangle = dturned[:, odd] * turned[:, even] - dturned[:, even] * turned[:, odd]
    return Adjoint(G * turned, dz, inner(dm, turned), None, dangle)


BY_HAND: dict[str, Callable[[Tensor, Gate, Tensor, Tensor], Adjoint]] = {
    "none": _none,
    "tangent": _tangent,
    "plane": _plane,
    "givens": _givens,
}


def _by_autograd(rotation: str, z: Tensor, gate: Gate, G: Tensor, dm: Tensor) -> Adjoint:
    """Run the rotation again under autograd; right for every rotation that acts on z."""
    rotate = ROTATIONS[rotation].rotate
    assert rotate is not None
    with torch.enable_grad():
        given = [z, gate.vector_EVT, gate.angle_EMT, gate.center_ER]
        leaves = [None if t is None else t.detach().requires_grad_() for t in given]
        again, *parts = leaves
        assert again is not None
        turned = rotate(again, Gate(*parts))
    inputs = [leaf for leaf in leaves if leaf is not None]
    gradients = torch.autograd.grad(turned, inputs, G * dm, materialize_grads=True)
    grads = iter(gradients)
    dz, *dparts = [None if leaf is None else next(grads) for leaf in leaves]
    assert dz is not None
    turned = turned.detach()
    return Adjoint(G * turned, dz, inner(dm, turned), *dparts)


def adjoint(rotation: str, z_ERT: Tensor, gate: Gate, G_E1T: Tensor, dm_ERT: Tensor) -> Adjoint:
    """Return m = G z' and the gradients of z, G and the gate, given dm.

    Args:
        rotation: a name in ROTATIONS, not of kind "output"; the metric is the identity.
        z_ERT: [E, R, T] activations before the rotation.
        gate: what the rotation reads besides z.
        G_E1T: [E, 1, T] weights of the experts, the scale s included.
        dm_ERT: [E, R, T] gradient of m.

    Returns:
        Adjoint, in z's type.

    Derived from modes.py by hand for none, tangent, plane and givens, for the others by autograd.

    >>> z = torch.ones(2, 4, 5)
    >>> adjoint("none", z, Gate(), torch.ones(2, 1, 5), z).weight_E1T.shape
    torch.Size([2, 1, 5])
    """
    by_hand = BY_HAND.get(rotation)
    if by_hand is not None:
        return by_hand(z_ERT, gate, G_E1T, dm_ERT)
    return _by_autograd(rotation, z_ERT, gate, G_E1T, dm_ERT)
