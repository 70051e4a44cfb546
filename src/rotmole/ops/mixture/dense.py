"""The whole adapter in rank space: y = s sum_e g_e R_e(x)[A_e drop(x)] B_e, without a loop.

All experts' low-rank activations come out of one product, are rotated elementwise, multiplied by
their weights (zero where not selected) and go back through one product with B seen as [E R, O].
Nothing of width O is held per expert, except by `radar`, which rotates outputs. Shapes are static,
so torch.compile and torch.export trace it whole. reference.py computes the same in slow loops.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rotmole.ops.mixture.sqrt_gate import combine_sqrt_gate
from rotmole.ops.precision import at_least_float32, epsilon, without_autocast
from rotmole.ops.rotation.modes import output_metric
from rotmole.ops.rotation.table import ROTATIONS, Gate


def project(x_TD: Tensor, weight_EMD: Tensor) -> Tensor:
    """Apply every expert's [M, D] matrix to every token: [E, M, T], tokens last.

    One product for all experts, which writes its small result with tokens last.

    >>> project(torch.ones(5, 3), torch.ones(2, 4, 3)).shape
    torch.Size([2, 4, 5])
    """
    experts, rows = weight_EMD.shape[:2]
    return (weight_EMD.flatten(0, 1) @ x_TD.mT).view(experts, rows, x_TD.shape[0])


def _activations(dropped_TD: Tensor, A_ERD: Tensor, experts: int) -> Tensor:
    """Return z [E, R, T] in at least float32; one A for all experts is multiplied once."""
    return at_least_float32(project(dropped_TD, A_ERD)).expand(experts, -1, -1)


def make_gate(
    x_TD: Tensor,
    dropped_TD: Tensor,
    z_ERT: Tensor,
    B_ERO: Tensor,
    gates: Mapping[str, Tensor],
    rotation_input: str,
    rotation_metric: str,
) -> Gate:
    """Compute what the rotation reads besides z, in at least float32; see `rotated`."""
    vector = angle = center = metric = None
    if "rotation_vector" in gates:
        weight = gates["rotation_vector"]
        if rotation_input == "z":
            with without_autocast(x_TD):
                vector = weight.to(z_ERT.dtype) @ z_ERT
        else:
            vector = at_least_float32(project(dropped_TD, weight))
    with without_autocast(x_TD):
        if "rotation_angle" in gates:
            weight = at_least_float32(gates["rotation_angle"])
            angle = project(x_TD.to(weight.dtype), weight)
        if "rotation_center" in gates:
            center = at_least_float32(gates["rotation_center"])
        if rotation_metric == "output":
            metric = output_metric(B_ERO)
    return Gate(vector, angle, center, metric)


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
) -> tuple[Tensor, Tensor]:
    """Return every expert's activation before and after its rotation.

        z_e = A_e drop(x);   z'_e = R_e(x)[z_e]

    Args:
        x_TD: [T, D] layer input; angle gates read it.
        dropped_TD: [T, D] the same after dropout; A and vector gates read it.
        A_ERD: [E, R, D] input factors, or [1, R, D]: one for all experts.
        B_ERO: [E, R, O] output factors; only the output metric reads them.
        gates: rotation-gate parameters by name, as in rotation.gate_shapes.
        rotation: a name in ROTATIONS, not of kind "output".
        rotation_input: "x", or "z" (bias only).
        rotation_metric: "rank" keeps |z|; "output" keeps the length of z B_e.

    Returns:
        (z_TER, z'_TER), both [T, E, R] in at least float32.

    Raises:
        ValueError: a rotation that acts on outputs (radar, radar_pairs).

    >>> x, A, B = torch.ones(5, 3), torch.ones(2, 4, 3), torch.ones(2, 4, 6)
    >>> rotated(x, x, A, B, {}, rotation="none")[1].shape
    torch.Size([5, 2, 4])
    """
    z_ERT, turned_ERT = _rotated(
        x_TD, dropped_TD, A_ERD, B_ERO, gates, rotation, rotation_input, rotation_metric
    )
    return z_ERT.permute(2, 0, 1), turned_ERT.permute(2, 0, 1)


def _rotated(
    x_TD: Tensor,
    dropped_TD: Tensor,
    A_ERD: Tensor,
    B_ERO: Tensor,
    gates: Mapping[str, Tensor],
    rotation: str,
    rotation_input: str,
    rotation_metric: str,
) -> tuple[Tensor, Tensor]:
    rotate = ROTATIONS[rotation].rotate
    if rotate is None:
        raise ValueError(f"rotation {rotation!r} turns experts' outputs, not their activations")
    z_ERT = _activations(dropped_TD, A_ERD, B_ERO.shape[0])
    if rotation == "none":
        return z_ERT, z_ERT
    gate = make_gate(x_TD, dropped_TD, z_ERT, B_ERO, gates, rotation_input, rotation_metric)
    with without_autocast(x_TD):
        return z_ERT, rotate(z_ERT, gate)


def combine(weighted_ERT: Tensor, B_ERO: Tensor) -> Tensor:
    """Send weighted activations through all experts' B at once: [T, O] in the type of B.

    >>> combine(torch.ones(2, 4, 5), torch.ones(2, 4, 6)).shape
    torch.Size([5, 6])
    """
    return weighted_ERT.to(B_ERO.dtype).flatten(0, 1).mT @ B_ERO.flatten(0, 1)


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
    sqrt_gate: bool = False,
) -> Tensor:
    """Return what the adapter adds to W x: s sum_e g_e R_e(x)[A_e drop(x)] B_e.

    Args:
        x_TD: [T, D] layer input.
        dropped_TD: [T, D] the same after dropout.
        weight_TE: [T, E] g, zero where an expert is not selected.
        A_ERD: [E, R, D] input factors, or [1, R, D]: one for all experts (HydraLoRA).
        B_ERO: [E, R, O] output factors.
        gates: rotation-gate parameters by name, as in rotation.gate_shapes.
        rotation: a name in ROTATIONS.
        scale: s, lora_alpha / R (rsLoRA: lora_alpha / sqrt(R)).
        selected_TE: [T, E] which experts are selected; None means where weight_TE is not 0. Only
            radar and radar_pairs read it.
        rotation_input, rotation_metric: see `rotated`.
        radar_normalize: divide radar's features by their root mean square.
        sqrt_gate: A, B and rotation learn with sqrt(g) in place of g, see `combine_sqrt_gate`;
            radar and radar_pairs ignore it.

    Returns:
        [T, O] in the type of B.

    Source: MoE-LoRA with the rotation gate of RotMoLE (arXiv 2605.25565); radar: 2505.23184. What
    of it is published, deduced or our choice stands in docs/method.md.

    >>> x, A, B = torch.ones(5, 3), torch.ones(2, 4, 3), torch.ones(2, 4, 6)
    >>> mixture(x, x, torch.ones(5, 2), A, B, {}, rotation="none", scale=1.0).shape
    torch.Size([5, 6])
    """
    if selected_TE is None:
        selected_TE = weight_TE != 0
    if ROTATIONS[rotation].kind != "output":
        _, turned_ERT = _rotated(
            x_TD, dropped_TD, A_ERD, B_ERO, gates, rotation, rotation_input, rotation_metric
        )
        if sqrt_gate:
            return combine_sqrt_gate(weight_TE, turned_ERT.permute(2, 0, 1), B_ERO, scale=scale)
        return combine((scale * weight_TE).mT.unsqueeze(1) * turned_ERT, B_ERO)
    z_TER = _activations(dropped_TD, A_ERD, B_ERO.shape[0]).permute(2, 0, 1)
    with without_autocast(x_TD):
        if rotation == "radar":
            y_TO = _radar(z_TER, weight_TE, selected_TE, B_ERO, gates, radar_normalize)
            return (scale * y_TO).to(B_ERO.dtype)
        mixed_TE = _radar_pairs(x_TD, z_TER, weight_TE, selected_TE, B_ERO, gates)
    weighted_TER = (scale * mixed_TE).unsqueeze(-1) * z_TER
    return combine(weighted_TER.permute(1, 2, 0), B_ERO)


def _radar(
    z_TER: Tensor,
    weight_TE: Tensor,
    selected_TE: Tensor,
    B_ERO: Tensor,
    gates: Mapping[str, Tensor],
    normalize: bool,
) -> Tensor:
    """Rotate each selected expert's output by what the other selected experts say.

    v_e = z_e B_e;  f_e = [v_e ; sum of the other selected v_j], divided by its rms
    theta_e = (f_e U) V;  v'_e = v_e turned by theta_e in the planes (m, m + O/2)
    returns sum_e g_e v'_e
    """
    v_TEO = torch.einsum("ter,ero->teo", z_TER, B_ERO.to(z_TER.dtype))
    sum_T1O = (v_TEO * selected_TE.unsqueeze(-1)).sum(1, keepdim=True)
    others_TEO = sum_T1O - v_TEO  # read only where the expert itself is selected
    down, up = gates["radar_down"].to(z_TER.dtype), gates["radar_up"].to(z_TER.dtype)
    width = v_TEO.shape[-1]
    hidden = v_TEO @ down[:width] + others_TEO @ down[width:]
    if normalize:
        square = v_TEO.square().sum(-1, keepdim=True) + others_TEO.square().sum(-1, keepdim=True)
        hidden = hidden / torch.sqrt(square / (2 * width) + epsilon(z_TER))
    theta = hidden @ up
    cos, sin = torch.cos(theta), torch.sin(theta)
    first, second = v_TEO.chunk(2, dim=-1)
    turned = torch.cat([cos * first - sin * second, sin * first + cos * second], dim=-1)
    return (weight_TE.unsqueeze(-1) * turned).sum(1)


def _radar_pairs(
    x_TD: Tensor,
    z_TER: Tensor,
    weight_TE: Tensor,
    selected_TE: Tensor,
    B_ERO: Tensor,
    gates: Mapping[str, Tensor],
) -> Tensor:
    """Return the mixing weights m_j that equal turning each output towards the others.

        phi_ej = Phi_ej + ((x C) F)_ej for j != e, both selected; c_e = sum_j phi_ej v_j/|v_j|
        v'_e = v_e turned in span(v_e, c_e) by 2 atan(|part of c_e across v_e| / 2)
             = sum_j C_ej v_j,  hence  sum_e g_e v'_e = sum_j m_j v_j  with  m_j = sum_e g_e C_ej

    All of it follows from H_ej = <v_e, v_j> = z_e (B_e B_j^T) z_j: nothing of width O per token.
    """
    B_ERO = B_ERO.to(z_TER.dtype)
    gram_ERFS = torch.einsum("ero,fso->erfs", B_ERO, B_ERO)
    half_TEFS = torch.einsum("ter,erfs->tefs", z_TER, gram_ERFS)
    H_TEF = torch.einsum("tefs,tfs->tef", half_TEFS, z_TER)
    norm_TE = torch.sqrt(H_TEF.diagonal(dim1=-2, dim2=-1) + epsilon(z_TER))
    cos_TEF = H_TEF / norm_TE.unsqueeze(-1) / norm_TE.unsqueeze(-2)
    phi_TEF = gates["radar_pair_angle"].to(z_TER.dtype)
    if "radar_pair_down" in gates:
        down = gates["radar_pair_down"].to(z_TER.dtype)
        up = gates["radar_pair_up"].to(z_TER.dtype)
        experts = weight_TE.shape[-1]
        read_TM = x_TD.to(z_TER.dtype) @ down @ up
        phi_TEF = phi_TEF + read_TM.reshape(-1, experts, experts)
    identity_EE = torch.eye(weight_TE.shape[-1], dtype=z_TER.dtype, device=z_TER.device)
    selected = selected_TE.to(z_TER.dtype)
    pair_TEF = selected.unsqueeze(-1) * selected.unsqueeze(-2) * (1 - identity_EE)
    phi_TEF = phi_TEF * pair_TEF
    mu_TE = (phi_TEF * cos_TEF).sum(-1)
    square_TE = ((phi_TEF @ cos_TEF) * phi_TEF).sum(-1) - mu_TE.square()
    d_TE = 1 / (1 + square_TE / 4)
    ratio_TEF = norm_TE.unsqueeze(-1) / norm_TE.unsqueeze(-2)
    own_TE = 1 - d_TE * (square_TE / 2 + mu_TE)
    C_TEF = d_TE.unsqueeze(-1) * phi_TEF * ratio_TEF + own_TE.unsqueeze(-1) * identity_EE
    return torch.einsum("te,tef->tf", weight_TE.to(C_TEF.dtype), C_TEF)
