"""The whole method as slow loops over tokens and experts, straight from the equations.

The tests compare the fast side with these functions, which share no function with it. If an
equation can be written as an explicit matrix or vector of the output space, it is. A new mode needs
its twin here.

    y = W x + s * sum over e in S(x) of g_e(x) * R_e(x)[A_e drop(x)] B_e       (W x is left out)
          + s_0 * g_0(x) * R_0(x)[A_0 drop(x)] B_0                with a shared expert

Letters, as name suffixes: T tokens, D in_features, O out_features, E experts, K selected per token,
R rank, P planes. Angles are in radians. Everything is differentiable by autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

FLOOR = 0.01  # d: how small the moving vector may be, relative to z, before its length is floored


class Routing(NamedTuple):
    """What the scaling gate decided; weight_TE is zero if selected_TE (bool) is false."""

    weight_TE: Tensor
    selected_TE: Tensor
    probability_TE: Tensor


def wide(tensor: Tensor) -> Tensor:
    """Raise half types to float32; float32 and float64 stay."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def epsilon(tensor: Tensor) -> float:
    """Return e, the constant added to squared norms: 1e-24 in float64, 1e-12 in float32."""
    return 1e-24 if tensor.dtype == torch.float64 else 1e-12


def floor_at(s: Tensor, b: Tensor) -> Tensor:
    """Return s + b k^3 / 3 with k = relu(b - s) / b: s if s >= b, and never below b/3."""
    k = torch.relu(b - s) / b
    return s + b * k * k * k / 3


def rotation_matrix(u_N: Tensor, v_N: Tensor, theta: Tensor) -> Tensor:
    """Return the N x N matrix that turns u towards v by theta and leaves vectors across both.

    I + sin(theta) (v u^T - u v^T) + (cos(theta) - 1) (u u^T + v v^T)

    Args:
        u_N: unit vector.
        v_N: unit vector across u_N.
        theta: angle in radians, a scalar.

    Returns:
        Matrix [N, N] with determinant +1, to be applied to column vectors.

    Source: textbook (Rodrigues' formula in a plane of N-space).
    """
    eye = torch.eye(u_N.shape[0], dtype=u_N.dtype, device=u_N.device)
    turn = torch.outer(v_N, u_N) - torch.outer(u_N, v_N)
    plane = torch.outer(u_N, u_N) + torch.outer(v_N, v_N)
    return eye + torch.sin(theta) * turn + (torch.cos(theta) - 1) * plane


def axis_rotation(N: int, planes: list[tuple[int, int]], angle_P: Tensor) -> Tensor:
    """Return the [N, N] product of rotations of axis i towards axis j by angle, one per plane."""
    eye = torch.eye(N, dtype=angle_P.dtype, device=angle_P.device)
    matrix = eye
    for (i, j), theta in zip(planes, angle_P, strict=True):
        matrix = rotation_matrix(eye[i], eye[j], theta) @ matrix
    return matrix


def cayley_matrix(S_RR: Tensor) -> Tensor:
    """Return (I - S) (I + S)^-1, a rotation for every skew S; it equals 2 (I + S)^-1 - I."""
    eye = torch.eye(S_RR.shape[0], dtype=S_RR.dtype, device=S_RR.device)
    inverse: Tensor = torch.linalg.inv(eye + S_RR)
    return (eye - S_RR) @ inverse


# One function for each mode that acts on one expert's z, in RANK_MODES below. All take the same
# four arguments and use some: z_R; q, the vector gate's value; angle, the angle gate's values;
# M_RR, the matrix of the inner product <a, b> = a M b^T.


def across(z_R: Tensor, q_R: Tensor, M_RR: Tensor) -> tuple[Tensor, Tensor]:
    """Return n2 = <z, z> + e and t = q - (<q, z> / n2) z, the part of q across z."""
    n2 = z_R @ M_RR @ z_R + epsilon(z_R)
    return n2, q_R - (q_R @ M_RR @ z_R / n2) * z_R


def tangent(z_R: Tensor, q: Tensor, angle: Tensor, M_RR: Tensor) -> Tensor:
    """z' = z + (sqrt(n2) t - (a/2) z) / (1 + a/4), a = <t, t>: span(z, q), 2 atan(|t|/2)."""
    n2, t_R = across(z_R, q, M_RR)
    a = t_R @ M_RR @ t_R
    return z_R + (torch.sqrt(n2) * t_R - (a / 2) * z_R) / (1 + a / 4)


def bivector(z_R: Tensor, q: Tensor, angle: Tensor, M_RR: Tensor) -> Tensor:
    """Rotate in span(e_1, b) by 2 atan|b|, b = q: the Cayley matrix of S = e_1 b^T - b e_1^T."""
    e_R = torch.zeros_like(z_R)
    e_R[0] = 1
    b_R = torch.cat([torch.zeros_like(z_R[:1]), q])
    return cayley_matrix(torch.outer(e_R, b_R) - torch.outer(b_R, e_R)) @ z_R


def plane(z_R: Tensor, q: Tensor, angle: Tensor, M_RR: Tensor) -> Tensor:
    """z' = cos(theta) z + sin(theta) sqrt(n2/t2) t with theta = pi tanh(angle) (also centroid)."""
    n2, t_R = across(z_R, q, M_RR)
    least = FLOOR**2 * (q @ M_RR @ q + FLOOR**2 * n2) + epsilon(z_R)
    t2 = floor_at(t_R @ M_RR @ t_R, least)
    theta = math.pi * torch.tanh(angle[0])
    return torch.cos(theta) * z_R + torch.sin(theta) * torch.sqrt(n2 / t2) * t_R


def givens(z_R: Tensor, q: Tensor, angle: Tensor, M_RR: Tensor) -> Tensor:
    """Rotate axis 2m towards axis 2m + 1 by theta_m, for every angle there is."""
    planes = [(2 * m, 2 * m + 1) for m in range(angle.shape[0])]
    return axis_rotation(z_R.shape[0], planes, angle) @ z_R


def cayley(z_R: Tensor, q: Tensor, angle: Tensor, M_RR: Tensor) -> Tensor:
    """z' = (I - S) (I + S)^-1 z, S skew; its strict upper triangle is the angles, row by row."""
    R = z_R.shape[0]
    S_RR = torch.zeros(R, R, dtype=z_R.dtype, device=z_R.device)
    row, column = torch.triu_indices(R, R, 1)
    S_RR[row, column] = angle
    return cayley_matrix(S_RR - S_RR.T) @ z_R


def bias(z_R: Tensor, q: Tensor, angle: Tensor, M_RR: Tensor) -> Tensor:
    """z' = (z + q) sqrt(n2 / floor_at(s2, d^2 n2)), s2 = <z + q, z + q> + e."""
    n2 = z_R @ M_RR @ z_R + epsilon(z_R)
    moved_R = z_R + q
    s2 = moved_R @ M_RR @ moved_R + epsilon(z_R)
    return moved_R * torch.sqrt(n2 / floor_at(s2, FLOOR**2 * n2))


def offset(z_R: Tensor, q: Tensor, angle: Tensor, M_RR: Tensor) -> Tensor:
    """z' = z + q: a control, no rotation; A + Q in place of A."""
    return z_R + q


def scale(z_R: Tensor, q: Tensor, angle: Tensor, M_RR: Tensor) -> Tensor:
    """z' = (cos(a) + sin(a)) z: a control, no rotation; a signed scalar."""
    return (torch.cos(angle[0]) + torch.sin(angle[0])) * z_R


def core(z_R: Tensor, q: Tensor, angle: Tensor, M_RR: Tensor) -> Tensor:
    """z' = z + C z, C any R x R matrix, whose rows are the angles: a control, no rotation."""
    return z_R + angle.reshape(len(z_R), len(z_R)) @ z_R


RANK_MODES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "none": lambda z_R, q, angle, M_RR: z_R,
    "tangent": tangent,
    "bivector": bivector,
    "plane": plane,
    "centroid": plane,
    "givens": givens,
    "cayley": cayley,
    "bias": bias,
    "offset": offset,
    "scale": scale,
    "core": core,
}


def metric_matrix(B_RO: Tensor, rotation_metric: str) -> Tensor:
    """Return M of <a, b> = a M b^T: I, or (G + e I) / (tr(G)/R + e) with G = B B^T ("output")."""
    B = wide(B_RO)
    eye = torch.eye(B.shape[0], dtype=B.dtype, device=B.device)
    if rotation_metric == "rank":
        return eye
    G_RR = B @ B.T
    return (G_RR + epsilon(B) * eye) / (torch.trace(G_RR) / B.shape[0] + epsilon(B))


def gate_values(
    e: int,
    read: tuple[Tensor, Tensor, Tensor, Tensor | None],
    gates: Mapping[str, Tensor],
    rotation_input: str,
) -> tuple[Tensor, Tensor]:
    """Return what the vector and the angle gates of expert e say of one token, empty without one.

    Args:
        e: number of the expert.
        read: x, drop(x), z and the router's logits of the token.
        gates: of all experts.
        rotation_input: "x", "z" or "router".
    """
    x_D, dropped_D, z_R, logits_E = read
    q = angle = z_R.new_zeros(0)
    few = None  # what gates read in place of x
    if rotation_input == "z":
        few = z_R
    elif rotation_input == "router":
        assert logits_E is not None
        few = wide(logits_E)
    elif "rotation_down" in gates:
        few = wide(gates["rotation_down"] @ dropped_D)
    if "rotation_vector" in gates:
        Q = gates["rotation_vector"][e]
        q = wide(Q @ dropped_D) if few is None else wide(Q) @ few
    if "rotation_center" in gates:
        q = wide(gates["rotation_center"][e])
    if "rotation_angle" in gates:
        W = wide(gates["rotation_angle"][e])
        angle = W @ (wide(x_D) if few is None else few)
    return q, angle


def rotated(
    x_TD: Tensor,
    dropped_TD: Tensor,
    A_ERD: Tensor,
    B_ERO: Tensor,
    gates: Mapping[str, Tensor],
    *,
    rotation: str,
    rotation_input: str = "x",
    rotation_metric: str = "rank",
    logits_TE: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return every expert's z = A_e drop(x) and z' = R_e(x) z, both [T, E, R].

    Vector gates read drop(x) as A does, angle gates read x. With rotation_input "z" or "router"
    both read z itself or the router's logits, and with a map C (rotation_down) both read
    C drop(x). Only for modes that act within one expert's rank space (not radar, radar_pairs). A of
    [1, R, D] serves all experts.
    """
    T, (E, R) = x_TD.shape[0], B_ERO.shape[:2]
    before, after = [], []
    for t in range(T):
        for e in range(E):
            z_R = wide(A_ERD[e if len(A_ERD) > 1 else 0] @ dropped_TD[t])
            logits_E = None if logits_TE is None else logits_TE[t]
            read = (x_TD[t], dropped_TD[t], z_R, logits_E)
            q, angle = gate_values(e, read, gates, rotation_input)
            M_RR = metric_matrix(B_ERO[e], rotation_metric)
            before.append(z_R)
            after.append(RANK_MODES[rotation](z_R, q, angle, M_RR))
    return torch.stack(before).reshape(T, E, R), torch.stack(after).reshape(T, E, R)


def radar(
    v: Mapping[int, Tensor], gates: Mapping[str, Tensor], normalize: bool
) -> dict[int, Tensor]:
    """Rotate each selected output v_e in the planes (m, m + O/2) by theta_e = (f_e U) V.

    f_e = [v_e ; sum of the other selected v_j], divided by sqrt(mean(f_e^2) + e).
    """
    turned = {}
    for e, v_O in v.items():
        half = v_O.shape[0] // 2
        others_O = sum((v[j] for j in v if j != e), start=torch.zeros_like(v_O))
        f = torch.cat([v_O, others_O])
        if normalize:
            f = f / torch.sqrt((f**2).mean() + epsilon(f))
        theta = (f @ wide(gates["radar_down"])) @ wide(gates["radar_up"])
        planes = [(m, m + half) for m in range(half)]
        turned[e] = axis_rotation(2 * half, planes, theta) @ v_O
    return turned


def radar_pairs(
    v: Mapping[int, Tensor], gates: Mapping[str, Tensor], x_D: Tensor
) -> dict[int, Tensor]:
    """Rotate each selected output v_e towards the other selected outputs by learned angles.

    phi = Phi + ((x C) F); c_e = sum over the others of phi_ej v_j/|v_j|; t_e is its part across
    v_e; v'_e = cos(theta) v_e + |v_e| sin(theta) t_e/|t_e| with theta = 2 atan(|t_e|/2), written
    as `tangent` is so that t_e = 0 is no singular point; |v|^2 stands for |v|^2 + e.
    """
    phi_EE = wide(gates["radar_pair_angle"])
    if "radar_pair_down" in gates:
        low = wide(x_D) @ wide(gates["radar_pair_down"])
        phi_EE = phi_EE + (low @ wide(gates["radar_pair_up"])).reshape(phi_EE.shape)
    direction = {j: v_O / torch.sqrt(v_O @ v_O + epsilon(v_O)) for j, v_O in v.items()}
    turned = {}
    for e, v_O in v.items():
        towards = (phi_EE[e, j] * direction[j] for j in v if j != e)
        c_O = sum(towards, start=torch.zeros_like(v_O))
        eye = torch.eye(v_O.shape[0], dtype=v_O.dtype, device=v_O.device)
        turned[e] = tangent(v_O, c_O, c_O, eye)
    return turned


def mixture(
    x_TD: Tensor,
    dropped_TD: Tensor,
    weight_TE: Tensor,
    A_ERD: Tensor,
    B_ERO: Tensor,
    gates: Mapping[str, Tensor],
    *,
    rotation: str,
    scale: float,
    selected_TE: Tensor | None = None,
    rotation_input: str = "x",
    rotation_metric: str = "rank",
    radar_normalize: bool = True,
    logits_TE: Tensor | None = None,
) -> Tensor:
    """Return s * sum over the selected experts of g_e R_e(x)[A_e drop(x)] B_e, [T, O].

    Without `selected_TE` an expert counts as selected if its weight is not zero.
    """
    crosses = rotation in ("radar", "radar_pairs")  # experts act on one another's outputs
    _, turned_TER = rotated(
        x_TD,
        dropped_TD,
        A_ERD,
        B_ERO,
        {} if crosses else gates,
        rotation="none" if crosses else rotation,
        rotation_input=rotation_input,
        rotation_metric=rotation_metric,
        logits_TE=logits_TE,
    )
    rows = []
    for t in range(x_TD.shape[0]):
        selected_E = weight_TE[t] != 0 if selected_TE is None else selected_TE[t]
        v = {e: turned_TER[t, e] @ wide(B_ERO[e]) for e in range(len(B_ERO)) if selected_E[e]}
        if rotation == "radar":
            v = radar(v, gates, radar_normalize)
        if rotation == "radar_pairs":
            v = radar_pairs(v, gates, x_TD[t])
        weighted = (scale * weight_TE[t, e] * v_O for e, v_O in v.items())
        rows.append(sum(weighted, start=turned_TER.new_zeros(B_ERO.shape[2])))
    return torch.stack(rows).to(B_ERO.dtype)


def shared_weight(x_TD: Tensor, gate_1D: Tensor | None = None) -> Tensor:
    """Return g_0, the weight of the shared expert: 1 / (1 + exp(-w x)), or one without a gate.

    Returns:
        [T, 1].
    """
    one = wide(x_TD).new_ones(())
    if gate_1D is None:
        return torch.stack([one for _ in x_TD]).reshape(-1, 1)
    w_D = wide(gate_1D[0])
    weights = [one / (one + torch.exp(-torch.dot(w_D, x_D.to(w_D.dtype)))) for x_D in x_TD]
    return torch.stack(weights).reshape(-1, 1)


def best(values: list[float], count: int) -> list[int]:
    """Return the indices of the `count` largest values; of equal ones the lower index is first."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def route(
    logits_TE: Tensor, *, top_k: int, selection: str = "top_k", norm_topk_prob: bool = True
) -> Routing:
    """Select experts and weigh them.

    g = softmax of the K largest logits (or of all: "dense"); without `norm_topk_prob` g = p, the
    softmax over all experts. Of equal logits the expert with the lower number comes first.
    """
    T, E = logits_TE.shape
    logits_TE = wide(logits_TE)
    weight_TE = torch.zeros_like(logits_TE)
    selected_TE = torch.zeros(T, E, dtype=torch.bool, device=logits_TE.device)
    probability_TE = torch.softmax(logits_TE, dim=1)
    for t in range(T):
        chosen = best(logits_TE[t].tolist(), E if selection == "dense" else top_k)
        weights = torch.softmax(torch.stack([logits_TE[t, e] for e in chosen]), dim=0)
        for e, weight in zip(chosen, weights, strict=True):
            selected_TE[t, e] = True
            weight_TE[t, e] = weight if norm_topk_prob else probability_TE[t, e]
    return Routing(weight_TE, selected_TE, probability_TE)
