"""The mixture in rank space: y = s sum_e g_e R_e(x)[A_e drop(x)] B_e, without a loop.

All experts' low-rank activations come out of one product, are rotated elementwise, multiplied by
their weights (zero where not selected) and go back through one product with B seen as [E R, O].
Nothing of width O is held per expert, except by `radar`, which rotates outputs. Shapes are static,
so torch.compile and torch.export trace it whole.
"""

from __future__ import annotations

from torch import Tensor

from rotmole.ops.mixture.products import activations, combine, project
from rotmole.ops.mixture.radar import radar_pairs_weights, radar_sum
from rotmole.ops.mixture.sqrt_gate import combine_sqrt_gate
from rotmole.ops.precision import at_least_float32, without_autocast
from rotmole.ops.rotation.modes import output_metric
from rotmole.ops.rotation.table import ROTATIONS, Gate
from rotmole.ops.spec import Spec, Weights


def _gate(spec: Spec, x_TD: Tensor, dropped_TD: Tensor, z_ERT: Tensor, weights: Weights) -> Gate:
    """Compute what the rotation reads besides z, in at least float32; see `rotated`."""
    vector = angle = center = metric = None
    gates = weights.gates
    if "rotation_vector" in gates:
        weight = gates["rotation_vector"]
        if spec.rotation_input == "z":
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
        if spec.rotation_metric == "output":
            metric = output_metric(weights.B_ERO)
    return Gate(vector, angle, center, metric)


def rotated(
    spec: Spec, x_TD: Tensor, dropped_TD: Tensor, weights: Weights
) -> tuple[Tensor, Tensor]:
    """Return every expert's activation before and after its rotation.

        z_e = A_e drop(x);   z'_e = R_e(x)[z_e]

    Args:
        spec: its rotation, not of kind "output"; rotation_input ("x", or "z" for bias);
            rotation_metric ("rank" keeps |z|, "output" the length of z B_e).
        x_TD: [T, D] layer input; angle gates read it.
        dropped_TD: [T, D] the same after dropout; A and vector gates read it.
        weights: of the layer; B is read by the output metric alone.

    Returns:
        (z_TER, z'_TER), both [T, E, R] in at least float32.

    Raises:
        ValueError: a rotation that acts on outputs (radar, radar_pairs).

    >>> import torch
    >>> x, weights = torch.ones(5, 3), Weights(torch.ones(2, 4, 3), torch.ones(2, 4, 6))
    >>> rotated(Spec(num_experts=2), x, x, weights)[1].shape
    torch.Size([5, 2, 4])
    """
    z_ERT, turned_ERT = _rotated(spec, x_TD, dropped_TD, weights)
    return z_ERT.permute(2, 0, 1), turned_ERT.permute(2, 0, 1)


def _rotated(
    spec: Spec, x_TD: Tensor, dropped_TD: Tensor, weights: Weights
) -> tuple[Tensor, Tensor]:
    rotate = ROTATIONS[spec.rotation].rotate
    if rotate is None:
        raise ValueError(f"rotation {spec.rotation!r} turns experts' outputs, not activations")
    z_ERT = activations(dropped_TD, weights.A_ERD, weights.B_ERO.shape[0])
    if spec.rotation == "none":
        return z_ERT, z_ERT
    gate = _gate(spec, x_TD, dropped_TD, z_ERT, weights)
    with without_autocast(x_TD):
        return z_ERT, rotate(z_ERT, gate)


def mixture(
    spec: Spec,
    x_TD: Tensor,
    dropped_TD: Tensor,
    weights: Weights,
    weight_TE: Tensor,
    selected_TE: Tensor | None = None,
) -> Tensor:
    """Return what the adapter adds to W x: s sum_e g_e R_e(x)[A_e drop(x)] B_e.

    Args:
        spec: scale, rotation and its switches; router_sqrt_gate: A, B and rotation learn with
            sqrt(g) in place of g, see `combine_sqrt_gate` (radar and radar_pairs ignore it).
        x_TD: [T, D] layer input.
        dropped_TD: [T, D] the same after dropout.
        weights: of the layer.
        weight_TE: [T, E] g, zero where an expert is not selected.
        selected_TE: [T, E] which experts are selected; None means where weight_TE is not 0. Only
            radar and radar_pairs read it.

    Returns:
        [T, O] in the type of B.

    Source: MoE-LoRA with the rotation gate of RotMoLE (arXiv 2605.25565); radar: 2505.23184.
    docs/method.md says what of it is published, deduced or our choice.

    >>> import torch
    >>> x, weights = torch.ones(5, 3), Weights(torch.ones(2, 4, 3), torch.ones(2, 4, 6))
    >>> mixture(Spec(num_experts=2), x, x, weights, torch.ones(5, 2)).shape
    torch.Size([5, 6])
    """
    B_ERO, scale = weights.B_ERO, spec.scale
    if selected_TE is None:
        selected_TE = weight_TE != 0
    if ROTATIONS[spec.rotation].kind != "output":
        _, turned_ERT = _rotated(spec, x_TD, dropped_TD, weights)
        if spec.router_sqrt_gate:
            return combine_sqrt_gate(weight_TE, turned_ERT.permute(2, 0, 1), B_ERO, scale=scale)
        return combine((scale * weight_TE).mT.unsqueeze(1) * turned_ERT, B_ERO)
    z_TER = activations(dropped_TD, weights.A_ERD, B_ERO.shape[0]).permute(2, 0, 1)
    with without_autocast(x_TD):
        if spec.rotation == "radar":
            normalize = spec.radar_normalize
            y_TO = radar_sum(z_TER, weight_TE, selected_TE, B_ERO, weights.gates, normalize)
            return (scale * y_TO).to(B_ERO.dtype)
        mixed_TE = radar_pairs_weights(x_TD, z_TER, weight_TE, selected_TE, B_ERO, weights.gates)
    weighted_TER = (scale * mixed_TE).unsqueeze(-1) * z_TER
    return combine(weighted_TER.permute(1, 2, 0), B_ERO)
