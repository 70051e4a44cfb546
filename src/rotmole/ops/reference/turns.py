"""By which angles experts are turned, as loops over tokens and experts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rotmole.ops.reference.method import (
    gate_values,
    metric_matrix,
    radar,
    radar_pairs,
    rotated,
    wide,
)


def angle_between(a_N: Tensor, b_N: Tensor, M_NN: Tensor | None = None) -> float:
    """Return acos(<a, b> / (|a| |b|)), <a, b> = a M b^T; 0 if one of them is 0."""
    M_NN = torch.eye(len(a_N)).to(a_N) if M_NN is None else M_NN
    lengths = math.sqrt(float(a_N @ M_NN @ a_N) * float(b_N @ M_NN @ b_N))
    if lengths == 0:
        return 0.0
    return math.acos(max(-1.0, min(1.0, float(a_N @ M_NN @ b_N) / lengths)))


def turns(
    x_TD: Tensor,
    dropped_TD: Tensor,
    A_ERD: Tensor,
    B_ERO: Tensor,
    gates: Mapping[str, Tensor],
    selected_TE: Tensor,
    *,
    rotation: str,
    rotation_input: str = "x",
    rotation_metric: str = "rank",
    radar_normalize: bool = True,
    logits_TE: Tensor | None = None,
) -> list[list[list[float]]]:
    """Return the angles of token t and expert e as [t][e]; [] if the expert is not selected."""
    crosses = rotation in ("radar", "radar_pairs")
    settings: dict[str, Any] = {"rotation_input": rotation_input, "logits_TE": logits_TE}
    before_TER, after_TER = rotated(
        x_TD,
        dropped_TD,
        A_ERD,
        B_ERO,
        {} if crosses else gates,
        rotation="none" if crosses else rotation,
        rotation_metric=rotation_metric,
        **settings,
    )
    experts = range(len(B_ERO))
    angles = []
    for t in range(len(x_TD)):
        v = {e: before_TER[t, e] @ wide(B_ERO[e]) for e in experts if selected_TE[t, e]}
        turned = v
        if crosses:
            turned = (
                radar(v, gates, radar_normalize)
                if rotation == "radar"
                else radar_pairs(v, gates, x_TD[t])
            )
        of_token: list[list[float]] = []
        for e in experts:
            z_R = before_TER[t, e]
            if not selected_TE[t, e]:
                of_token.append([])
            elif crosses:
                of_token.append([angle_between(v[e], turned[e])])
            else:
                logits_E = None if logits_TE is None else logits_TE[t]
                read = (x_TD[t], dropped_TD[t], z_R, logits_E)
                q, theta = gate_values(e, read, gates, rotation_input)
                M_RR = metric_matrix(B_ERO[e], rotation_metric)
                of_token.append(of_expert(rotation, z_R, after_TER[t, e], q, theta, M_RR))
        angles.append(of_token)
    return angles


def of_expert(
    rotation: str, z_R: Tensor, turned_R: Tensor, q: Tensor, theta: Tensor, M_RR: Tensor
) -> list[float]:
    """Return the angles of one expert that is turned by itself."""
    if rotation == "none":
        return [0.0]
    if rotation in ("plane", "centroid"):
        return [math.pi * math.tanh(float(theta[0]))]
    if rotation == "bivector":
        return [2 * math.atan(math.sqrt(sum(float(b) ** 2 for b in q)))]
    if rotation == "givens":
        return [math.atan2(math.sin(float(a)), math.cos(float(a))) for a in theta]
    return [angle_between(z_R, turned_R, M_RR)]
