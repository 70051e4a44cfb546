"""The mixture in rank space: y = s sum_e g_e R_e(x)[A_e drop(x)] B_e, without a loop.

All experts' low-rank activations come out of one product, are rotated elementwise, multiplied by
their weights (zero where not selected) and go back through one product with B seen as [E R, O]. The
shared expert, if there is one, takes part in both products.
Nothing of width O is held per expert, except by `radar`, which rotates outputs. Shapes are static,
so torch.compile and torch.export trace it whole.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rotmole.ops.mixture.products import (
    activations,
    combine_all,
    project,
    project_all,
    read_gate,
)
from rotmole.ops.mixture.radar import (
    radar_outputs,
    radar_pairs_angles,
    radar_pairs_weights,
    radar_sum,
)
from rotmole.ops.mixture.sqrt_gate import combine_sqrt_gate
from rotmole.ops.precision import at_least_float32, without_autocast
from rotmole.ops.rotation.modes import angle_between, output_metric
from rotmole.ops.rotation.table import ROTATIONS, Gate
from rotmole.ops.spec import Spec, Weights


def _small_source(
    spec: Spec, dropped_TD: Tensor, z_ERT: Tensor, weights: Weights, logits_TE: Tensor | None
) -> Tensor:
    """Return what small gates read, in at least float32: z [E, R, T], logits [E, T], C x [H, T]."""
    if spec.rotation_input == "z":
        return z_ERT
    if spec.rotation_input == "router":
        assert logits_TE is not None, "rotation_input 'router' needs the router's logits"
        return at_least_float32(logits_TE).mT.to(z_ERT.dtype)
    return at_least_float32(project(dropped_TD, weights.gates["rotation_down"].unsqueeze(0))[0])


def _gate(
    spec: Spec,
    x_TD: Tensor,
    dropped_TD: Tensor,
    z_ERT: Tensor,
    weights: Weights,
    logits_TE: Tensor | None,
    vector: Tensor | None = None,
) -> Gate:
    """Compute what the rotation reads besides z, in at least float32; see `rotated`.

    The vector gate's values may be given, if it reads x.
    """
    angle = center = metric = source = None
    gates = weights.gates
    if spec.small_gates and ROTATIONS[spec.rotation].linear_gates:
        source = _small_source(spec, dropped_TD, z_ERT, weights, logits_TE)
    if "rotation_vector" in gates and source is None and vector is None:
        vector = at_least_float32(project(dropped_TD, gates["rotation_vector"]))
    with without_autocast(x_TD):
        if "rotation_vector" in gates and source is not None:
            vector = read_gate(gates["rotation_vector"], source)
        if "rotation_angle" in gates and source is not None:
            angle = read_gate(gates["rotation_angle"], source)
        elif "rotation_angle" in gates:
            weight = at_least_float32(gates["rotation_angle"])
            angle = project(x_TD.to(weight.dtype), weight)
        if "rotation_center" in gates:
            center = at_least_float32(gates["rotation_center"])
        if spec.rotation_metric == "output":
            metric = output_metric(weights.B_ERO)
    return Gate(vector, angle, center, metric)


def rotated(
    spec: Spec,
    x_TD: Tensor,
    dropped_TD: Tensor,
    weights: Weights,
    logits_TE: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return every expert's activation before and after its rotation.

        z_e = A_e drop(x);   z'_e = R_e(x)[z_e]

    Args:
        spec: its rotation, not of kind "output"; what its gates read (rotation_input,
            rotation_dim); rotation_metric ("rank" keeps |z|, "output" the length of z B_e).
        x_TD: [T, D] layer input; angle gates read it.
        dropped_TD: [T, D] the same after dropout; A, vector gates and C read it.
        weights: of the layer; B is read by the output metric alone.
        logits_TE: [T, E] the router's; only rotation_input "router" reads them.

    Returns:
        (z_TER, z'_TER), both [T, E, R] in at least float32.

    Raises:
        ValueError: a rotation that acts on outputs (radar, radar_pairs).

    >>> import torch
    >>> x, weights = torch.ones(5, 3), Weights(torch.ones(2, 4, 3), torch.ones(2, 4, 6))
    >>> rotated(Spec(num_experts=2), x, x, weights)[1].shape
    torch.Size([5, 2, 4])
    """
    if ROTATIONS[spec.rotation].rotate is None:
        raise ValueError(f"rotation {spec.rotation!r} turns experts' outputs, not activations")
    z_ERT = activations(dropped_TD, weights.A_ERD, weights.B_ERO.shape[0])
    turned_ERT = _turned(spec, x_TD, dropped_TD, z_ERT, weights, logits_TE)
    return z_ERT.permute(2, 0, 1), turned_ERT.permute(2, 0, 1)


def _turned(
    spec: Spec,
    x_TD: Tensor,
    dropped_TD: Tensor,
    z_ERT: Tensor,
    weights: Weights,
    logits_TE: Tensor | None,
) -> Tensor:
    """Return z' [E, R, T] of a rotation that acts on z."""
    rotate = ROTATIONS[spec.rotation].rotate
    assert rotate is not None
    if spec.rotation == "none":
        return z_ERT
    gate = _gate(spec, x_TD, dropped_TD, z_ERT, weights, logits_TE)
    with without_autocast(x_TD):
        return rotate(z_ERT, gate)


class Turns(NamedTuple):
    """What the rotations of a layer did to the activations.

    Attributes:
        angle_EMT: [E, M, T] angles in radians, in [-pi, pi]; M is 1, with givens one a plane.
        z_ERT: [E, R, T] activations.
        turned_ERT: [E, R, T] the same after rotation; None if outputs are turned (radar modes).
    """

    angle_EMT: Tensor
    z_ERT: Tensor
    turned_ERT: Tensor | None


def turns(
    spec: Spec,
    x_TD: Tensor,
    dropped_TD: Tensor,
    weights: Weights,
    selected_TE: Tensor,
    logits_TE: Tensor | None = None,
) -> Turns:
    """Return by which angles every expert's activation is turned.

        tangent             between z and z': 2 atan(|t|/2), in [0, pi); with rotation_metric
                            "output" between the outputs z B_e and z' B_e, as in plane and bias
        plane, centroid     theta = pi tanh(w x): positive towards q, negative away from it
        bias                between z and z', which is between z and z + q
        givens              theta of each pair of coordinates, less whole turns: in [-pi, pi)
        bivector            2 atan|b|, in [0, pi): of the plane span(e1, b), in which z need not lie
        cayley              between z and z', in [0, pi]: S turns several planes
        radar               between v_e and v'_e, the output before and after
        radar_pairs         2 atan(|part of c_e across v_e| / 2)
        offset, scale, core between z and z', though these controls are no rotations
        none                0

    Args:
        spec: of the layer.
        x_TD: [T, D] layer input.
        dropped_TD: [T, D] the same after dropout.
        weights: of the layer.
        selected_TE: [T, E] selected experts; what the radar modes compute for others is no angle.
        logits_TE: [T, E] the router's; only rotation_input "router" reads them.

    >>> import torch
    >>> x, weights = torch.ones(5, 3), Weights(torch.ones(2, 4, 3), torch.ones(2, 4, 6))
    >>> turns(Spec(num_experts=2), x, x, weights, torch.ones(5, 2).bool()).angle_EMT.shape
    torch.Size([2, 1, 5])
    """
    row, B_ERO, gates = ROTATIONS[spec.rotation], weights.B_ERO, weights.gates
    if "rotation_vector" in gates and not spec.small_gates:  # one product reads x
        both = (weights.A_ERD, gates["rotation_vector"])
        z_ERT, vector_EVT = map(at_least_float32, project_all(dropped_TD, both))
        z_ERT = z_ERT.expand(B_ERO.shape[0], -1, -1)
    else:
        z_ERT, vector_EVT = activations(dropped_TD, weights.A_ERD, B_ERO.shape[0]), None
    if spec.rotation == "none":
        return Turns(z_ERT.new_zeros(len(z_ERT), 1, z_ERT.shape[2]), z_ERT, z_ERT)
    if row.rotate is not None:
        gate = _gate(spec, x_TD, dropped_TD, z_ERT, weights, logits_TE, vector_EVT)
        with without_autocast(x_TD):
            turned_ERT = row.rotate(z_ERT, gate)
            return Turns(row.angle(z_ERT, turned_ERT, gate), z_ERT, turned_ERT)
    z_TER = z_ERT.permute(2, 0, 1)
    with without_autocast(x_TD):
        if spec.rotation == "radar_pairs":
            angle_TE = radar_pairs_angles(x_TD, z_TER, selected_TE, B_ERO, gates)
            return Turns(angle_TE.mT.unsqueeze(1), z_ERT, None)
        outputs = radar_outputs(z_TER, selected_TE, B_ERO, gates, spec.radar_normalize)
        v_EOT, turned_EOT = (output.permute(1, 2, 0) for output in outputs)
        return Turns(angle_between(v_EOT, turned_EOT), z_ERT, None)


def shared_weight(x_TD: Tensor, shared: Weights) -> Tensor:
    """Return g_0 [T, 1], the weight of the shared expert: sigmoid(w x), or one without a gate.

    Source: Qwen2-MoE (arXiv 2407.10671) for the gate; DeepSeekMoE (2401.06066) has none.

    >>> shared_weight(torch.ones(5, 3), Weights(torch.ones(1, 4, 3), torch.ones(1, 4, 6))).shape
    torch.Size([5, 1])
    """
    if not shared.router:
        return torch.ones_like(x_TD[:, :1], dtype=torch.promote_types(x_TD.dtype, torch.float32))
    with without_autocast(x_TD):
        gate_1D = at_least_float32(shared.router["router_weight"])
        return torch.sigmoid(x_TD.to(gate_1D.dtype) @ gate_1D.mT)


class _Bank(NamedTuple):
    """The routed experts, or the shared one: what `mixture` is given of them."""

    spec: Spec
    weights: Weights
    weight_TE: Tensor
    selected_TE: Tensor
    logits_TE: Tensor | None = None

    @property
    def has_sqrt_gate(self) -> bool:
        return self.spec.router_sqrt_gate and self.spec.rotation != "radar_pairs"


def _output(bank: _Bank, x_TD: Tensor, dropped_TD: Tensor, z_ERT: Tensor) -> Tensor:
    """Return the addition [T, O] of a bank that is no product of weighted activations with B."""
    spec, weights, weight_TE = bank.spec, bank.weights, bank.weight_TE
    if spec.rotation == "radar":
        with without_autocast(x_TD):
            y_TO = radar_sum(
                z_ERT.permute(2, 0, 1), weight_TE, bank.selected_TE, weights.B_ERO,
                weights.gates, spec.radar_normalize,
            )  # fmt: skip
            return (spec.scale * y_TO).to(weights.B_ERO.dtype)
    turned_ERT = _turned(spec, x_TD, dropped_TD, z_ERT, weights, bank.logits_TE)
    turned_TER = turned_ERT.permute(2, 0, 1)
    return combine_sqrt_gate(weight_TE, turned_TER, weights.B_ERO, scale=spec.scale)


def _weighted(bank: _Bank, x_TD: Tensor, dropped_TD: Tensor, z_ERT: Tensor) -> Tensor:
    """Return the weighted activations [E, R, T] whose product with B is the bank's addition."""
    spec, weights, weight_TE = bank.spec, bank.weights, bank.weight_TE
    if spec.rotation == "radar_pairs":
        z_TER = z_ERT.permute(2, 0, 1)
        with without_autocast(x_TD):
            weight_TE = radar_pairs_weights(
                x_TD, z_TER, weight_TE, bank.selected_TE, weights.B_ERO, weights.gates
            )
        turned_ERT = z_ERT
    else:
        turned_ERT = _turned(spec, x_TD, dropped_TD, z_ERT, weights, bank.logits_TE)
    return (spec.scale * weight_TE).mT.unsqueeze(1) * turned_ERT


def mixture(
    spec: Spec,
    x_TD: Tensor,
    dropped_TD: Tensor,
    weights: Weights,
    weight_TE: Tensor,
    selected_TE: Tensor | None = None,
    logits_TE: Tensor | None = None,
) -> Tensor:
    """Return what the adapter adds to W x: s sum_e g_e R_e(x)[A_e drop(x)] B_e.

    If the weights have a shared expert, s_0 g_0 R_0(x)[A_0 drop(x)] B_0 is part of the sum.

    Args:
        spec: scale, rotation and its switches; router_sqrt_gate: A, B and rotation learn with
            sqrt(g) in place of g, see `combine_sqrt_gate` (radar and radar_pairs ignore it, and the
            shared expert does).
        x_TD: [T, D] layer input.
        dropped_TD: [T, D] the same after dropout.
        weights: of the layer.
        weight_TE: [T, E] g, zero where an expert is not selected.
        selected_TE: [T, E] which experts are selected; None means where weight_TE is not 0. Only
            radar and radar_pairs read it.
        logits_TE: [T, E] the router's; only rotation_input "router" reads them.

    Returns:
        [T, O] in the type of B.

    Source: MoE-LoRA with the rotation gate of RotMoLE (arXiv 2605.25565); radar: 2505.23184.
    docs/method.md says what of it is published, deduced or our choice.

    >>> import torch
    >>> x, weights = torch.ones(5, 3), Weights(torch.ones(2, 4, 3), torch.ones(2, 4, 6))
    >>> mixture(Spec(num_experts=2), x, x, weights, torch.ones(5, 2)).shape
    torch.Size([5, 6])
    """
    if selected_TE is None:
        selected_TE = weight_TE != 0
    banks = [_Bank(spec, weights, weight_TE, selected_TE, logits_TE)]
    if spec.shared is None or weights.shared is None:
        both = [activations(dropped_TD, weights.A_ERD, weights.B_ERO.shape[0])]
    else:
        g_T1 = shared_weight(x_TD, weights.shared)
        banks.append(_Bank(spec.shared, weights.shared, g_T1, torch.ones_like(g_T1).bool()))
        both = [
            at_least_float32(z_ERT).expand(bank.weights.B_ERO.shape[0], -1, -1)
            for bank, z_ERT in zip(
                banks, project_all(dropped_TD, [bank.weights.A_ERD for bank in banks]), strict=True
            )
        ]
    outputs, weighted, factors = [], [], []
    for bank, z_ERT in zip(banks, both, strict=True):
        if bank.spec.rotation == "radar" or bank.has_sqrt_gate:
            outputs.append(_output(bank, x_TD, dropped_TD, z_ERT))
        else:
            weighted.append(_weighted(bank, x_TD, dropped_TD, z_ERT))
            factors.append(bank.weights.B_ERO)
    if weighted:
        outputs.append(combine_all(weighted, factors))
    return outputs[0] if len(outputs) == 1 else outputs[0] + outputs[1]
