"""RadarGate: experts' outputs rotated by what the other selected experts say.

`radar` needs the experts' outputs, of width O; `radar_pairs` follows from the Gram matrices of B.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rotmole.ops.precision import epsilon, least_share


def radar_sum(
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
    _, turned_TEO = radar_outputs(z_TER, selected_TE, B_ERO, gates, normalize)
    return (weight_TE.unsqueeze(-1) * turned_TEO).sum(1)


def radar_outputs(
    z_TER: Tensor, selected_TE: Tensor, B_ERO: Tensor, gates: Mapping[str, Tensor], normalize: bool
) -> tuple[Tensor, Tensor]:
    """Return v_e and v'_e of `radar_sum`, both [T, E, O]; v'_e counts for selected experts only."""
    v_TEO = torch.einsum("ter,ero->teo", z_TER, B_ERO.to(z_TER.dtype))
    sum_T1O = (v_TEO * selected_TE.unsqueeze(-1)).sum(1, keepdim=True)
    others_TEO = sum_T1O - v_TEO  # read only if the expert itself is selected
    down, up = gates["radar_down"].to(z_TER.dtype), gates["radar_up"].to(z_TER.dtype)
    width = v_TEO.shape[-1]
    hidden = v_TEO @ down[:width] + others_TEO @ down[width:]
    if normalize:
        square = v_TEO.square().sum(-1, keepdim=True) + others_TEO.square().sum(-1, keepdim=True)
        hidden = hidden / torch.sqrt(square / (2 * width) + epsilon(z_TER))
    theta = hidden @ up
    cos, sin = torch.cos(theta), torch.sin(theta)
    first, second = v_TEO.chunk(2, dim=-1)
    return v_TEO, torch.cat([cos * first - sin * second, sin * first + cos * second], dim=-1)


def radar_pairs_weights(
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
    An output that cancels to rounding counts as zero (precision.least_share).
    """
    across = _pairs(x_TD, z_TER, selected_TE, B_ERO, gates)
    square_TE, norm_TE = across.square_TE, across.norm_TE
    identity_EE = torch.eye(weight_TE.shape[-1], dtype=z_TER.dtype, device=z_TER.device)
    d_TE = 1 / (1 + square_TE / 4)
    ratio_TEF = norm_TE.unsqueeze(-1) / norm_TE.unsqueeze(-2)
    itself_TE = 1 - d_TE * (square_TE / 2 + across.mu_TE)
    C_TEF = d_TE.unsqueeze(-1) * across.phi_TEF * ratio_TEF
    C_TEF = C_TEF + itself_TE.unsqueeze(-1) * identity_EE
    return torch.einsum("te,tef->tf", weight_TE.to(C_TEF.dtype), C_TEF)


def radar_pairs_angles(
    x_TD: Tensor,
    z_TER: Tensor,
    selected_TE: Tensor,
    B_ERO: Tensor,
    gates: Mapping[str, Tensor],
) -> Tensor:
    """Return 2 atan(|part of c_e across v_e| / 2) [T, E], by which `radar_pairs` turns v_e."""
    square_TE = _pairs(x_TD, z_TER, selected_TE, B_ERO, gates).square_TE
    return 2 * torch.atan(square_TE.sqrt() / 2)


class _Pairs(NamedTuple):
    """What `radar_pairs_weights` needs of the outputs v_e.

    Attributes:
        phi_TEF: phi_ej, zero unless both are selected and differ.
        mu_TE: <c_e, v_e> / |v_e|.
        square_TE: |part of c_e across v_e|^2.
        norm_TE: |v_e|.
    """

    phi_TEF: Tensor
    mu_TE: Tensor
    square_TE: Tensor
    norm_TE: Tensor


def _pairs(
    x_TD: Tensor,
    z_TER: Tensor,
    selected_TE: Tensor,
    B_ERO: Tensor,
    gates: Mapping[str, Tensor],
) -> _Pairs:
    B_ERO = B_ERO.to(z_TER.dtype)
    gram_ERFS = torch.einsum("ero,fso->erfs", B_ERO, B_ERO)
    half_TEFS = torch.einsum("ter,erfs->tefs", z_TER, gram_ERFS)
    H_TEF = torch.einsum("tefs,tfs->tef", half_TEFS, z_TER)
    mean_E = B_ERO.square().sum(-1).mean(-1)  # tr(B_e B_e^T)/R
    least_TE = least_share(z_TER.dtype, z_TER.shape[-1]) * mean_E * z_TER.square().sum(-1)
    length_TE = torch.maximum(H_TEF.diagonal(dim1=-2, dim2=-1), least_TE)
    norm_TE = torch.sqrt(length_TE + epsilon(z_TER))
    cos_TEF = (H_TEF / norm_TE.unsqueeze(-1) / norm_TE.unsqueeze(-2)).clamp(-1, 1)
    phi_TEF = gates["radar_pair_angle"].to(z_TER.dtype)
    if "radar_pair_down" in gates:
        down = gates["radar_pair_down"].to(z_TER.dtype)
        up = gates["radar_pair_up"].to(z_TER.dtype)
        experts = selected_TE.shape[-1]
        read_TM = x_TD.to(z_TER.dtype) @ down @ up
        phi_TEF = phi_TEF + read_TM.reshape(-1, experts, experts)
    identity_EE = torch.eye(selected_TE.shape[-1], dtype=z_TER.dtype, device=z_TER.device)
    selected = selected_TE.to(z_TER.dtype)
    pair_TEF = selected.unsqueeze(-1) * selected.unsqueeze(-2) * (1 - identity_EE)
    phi_TEF = phi_TEF * pair_TEF
    mu_TE = (phi_TEF * cos_TEF).sum(-1)
    square_TE = (((phi_TEF @ cos_TEF) * phi_TEF).sum(-1) - mu_TE.square()).clamp(min=0)
    return _Pairs(phi_TEF, mu_TE, square_TE, norm_TE)
