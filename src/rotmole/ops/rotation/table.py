"""The table of rotation gates: what each mode computes, what it needs, what may be claimed of it.

A mode is one function in modes.py and one row here; the laws in tests/ops pick it up by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rotmole.ops.rotation import modes


class Gate(NamedTuple):
    """What a rotation reads besides z; None where the mode does not use it.

    Attributes:
        vector_EVT: [E, V, T] vector gate q = Q_e x (or b = Q_e x for bivector).
        angle_EMT: [E, M, T] angle gate, linear in the layer's input.
        center_ER: [E, R] one learned vector per expert.
        metric_ERR: [E, R, R] metric of the inner product; None is the identity.
    """

    vector_EVT: Tensor | None = None
    angle_EMT: Tensor | None = None
    center_ER: Tensor | None = None
    metric_ERR: Tensor | None = None


def _vector(gate: Gate) -> Tensor:
    assert gate.vector_EVT is not None
    return gate.vector_EVT


def _angle(gate: Gate) -> Tensor:
    assert gate.angle_EMT is not None
    return gate.angle_EMT


def _center(z: Tensor, gate: Gate) -> Tensor:
    assert gate.center_ER is not None
    return gate.center_ER.unsqueeze(-1).expand_as(z)


Rotate = Callable[[Tensor, Gate], Tensor]


def _turn(z: Tensor, turned: Tensor, gate: Gate) -> Tensor:
    return modes.angle_between(z, turned, gate.metric_ERR)


def _angle_of_tangent(z: Tensor, turned: Tensor, gate: Gate) -> Tensor:
    _, t = modes.part_across(z, _vector(gate), gate.metric_ERR)
    return 2 * torch.atan(modes.square(t, gate.metric_ERR).sqrt() / 2)


def _angle_of_plane(z: Tensor, turned: Tensor, gate: Gate) -> Tensor:
    return math.pi * torch.tanh(_angle(gate))


def _angle_of_bivector(z: Tensor, turned: Tensor, gate: Gate) -> Tensor:
    return 2 * torch.atan(torch.linalg.vector_norm(_vector(gate), dim=-2, keepdim=True))


def _angles_of_pairs(z: Tensor, turned: Tensor, gate: Gate) -> Tensor:
    return torch.remainder(_angle(gate) + math.pi, 2 * math.pi) - math.pi


@dataclass(frozen=True)
class Rotation:
    """One row of the table of modes: how it rotates, what it needs, what may be claimed of it.

    Attributes:
        name: the value of the `rotation` setting.
        kind: "identity", "rotation" (each expert by itself, in rank space), "control" (no
            rotation, for comparison) or "output" (experts act on one another; mixture/radar.py).
        rotate: (z_ERT, gate) -> z'_ERT; None for kind "output".
        vector_rows: R -> V, rows of the vector gate of an expert; None without one.
        angle_rows: (R, planes) -> M, rows of the angle gate of an expert; None without one.
        center: whether it learns a vector per expert.
        zero: the parameters that are zero at the start, which makes the mode the identity.
        min_rank, max_rank, even_rank: which ranks it can do.
        metric: whether rotation_metric "output" is defined.
        input_z: whether rotation_input "z" is defined.
        angle: (z_ERT, z'_ERT, gate) -> by which angles z was turned, [E, M, T] in [-pi, pi]: that
            between z and z' unless the mode says one itself (see mixture/turns.py).
    """

    name: str
    kind: str
    rotate: Rotate | None
    vector_rows: Callable[[int], int] | None = None
    angle_rows: Callable[[int, int], int] | None = None
    center: bool = False
    zero: tuple[str, ...] = ()
    min_rank: int = 1
    max_rank: int | None = None
    even_rank: bool = False
    metric: bool = False
    input_z: bool = False
    angle: Callable[[Tensor, Tensor, Gate], Tensor] = _turn

    @property
    def linear_gates(self) -> bool:
        """Whether it has a vector or an angle gate, which may read C x or the router's logits."""
        return self.vector_rows is not None or self.angle_rows is not None


def _all(rank: int) -> int:
    return rank


def _one(rank: int, planes: int) -> int:
    return 1


_TABLE = (
    Rotation("none", "identity", lambda z, gate: z),
    Rotation(
        "tangent", "rotation", lambda z, gate: modes.tangent(z, _vector(gate), gate.metric_ERR),
        vector_rows=_all, zero=("rotation_vector",), min_rank=2, metric=True, input_z=True,
        angle=_angle_of_tangent,
    ),
    Rotation(
        "bivector", "rotation", lambda z, gate: modes.bivector(z, _vector(gate)),
        vector_rows=lambda rank: rank - 1, zero=("rotation_vector",), min_rank=2, input_z=True,
        angle=_angle_of_bivector,
    ),
    Rotation(
        "plane", "rotation",
        lambda z, gate: modes.plane(z, _vector(gate), _angle(gate), gate.metric_ERR),
        vector_rows=_all, angle_rows=_one, zero=("rotation_angle",), min_rank=3, metric=True,
        input_z=True, angle=_angle_of_plane,
    ),
    Rotation(
        "centroid", "rotation",
        lambda z, gate: modes.plane(z, _center(z, gate), _angle(gate), gate.metric_ERR),
        angle_rows=_one, center=True, zero=("rotation_angle",), min_rank=3, metric=True,
        angle=_angle_of_plane,
    ),
    Rotation(
        "givens", "rotation", lambda z, gate: modes.givens(z, _angle(gate)),
        angle_rows=lambda rank, planes: planes, zero=("rotation_angle",),
        min_rank=2, even_rank=True, input_z=True, angle=_angles_of_pairs,
    ),
    Rotation(
        "cayley", "rotation", lambda z, gate: modes.cayley(z, _angle(gate)),
        angle_rows=lambda rank, planes: rank * (rank - 1) // 2, zero=("rotation_angle",),
        min_rank=2, max_rank=16,
    ),
    Rotation(
        "bias", "rotation", lambda z, gate: modes.bias(z, _vector(gate), gate.metric_ERR),
        vector_rows=_all, zero=("rotation_vector",), min_rank=2, metric=True, input_z=True,
    ),
    Rotation("radar", "output", None, zero=("radar_up",)),
    Rotation("radar_pairs", "output", None, zero=("radar_pair_angle", "radar_pair_up")),
    Rotation(
        "offset", "control", lambda z, gate: z + _vector(gate),
        vector_rows=_all, zero=("rotation_vector",),
    ),
    Rotation(
        "scale", "control", lambda z, gate: modes.scale(z, _angle(gate)),
        angle_rows=_one, zero=("rotation_angle",),
    ),
    Rotation(
        "core", "control", lambda z, gate: modes.core(z, _angle(gate)),
        angle_rows=lambda rank, planes: rank * rank, zero=("rotation_angle",),
    ),
)  # fmt: skip

ROTATIONS: dict[str, Rotation] = {row.name: row for row in _TABLE}


def gate_shapes(
    rotation: str,
    *,
    E: int,
    R: int,
    D: int,
    O: int,  # noqa: E741  the legend's letter for out_features
    rotation_input: str = "x",
    rotation_dim: int | None = None,
    rotation_planes: int | None = None,
    radar_rank: int | None = None,
) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every parameter of a rotation gate.

    Args:
        rotation: a name in ROTATIONS.
        E, R, D, O: experts, rank, in_features, out_features.
        rotation_input: "x"; "z" where the mode defines it; "router": the E logits.
        rotation_dim: H, inputs that a map C makes of x for all gates; None: they read x.
        rotation_planes: planes of givens; None is R/2.
        radar_rank: rho of radar (None is 8) and radar_pairs (None leaves the input out).

    Returns:
        For example {"rotation_vector": (E, R, D)} for tangent; {} for none.

    >>> gate_shapes("plane", E=4, R=8, D=16, O=16)
    {'rotation_vector': (4, 8, 16), 'rotation_angle': (4, 1, 16)}
    """
    row = ROTATIONS[rotation]
    shapes: dict[str, tuple[int, ...]] = {}
    inputs = {"x": D if rotation_dim is None else rotation_dim, "z": R, "router": E}[rotation_input]
    if row.linear_gates and rotation_dim is not None:
        shapes["rotation_down"] = (rotation_dim, D)
    if row.vector_rows is not None:
        shapes["rotation_vector"] = (E, row.vector_rows(R), inputs)
    if row.angle_rows is not None:
        planes = R // 2 if rotation_planes is None else rotation_planes
        shapes["rotation_angle"] = (E, row.angle_rows(R, planes), inputs)
    if row.center:
        shapes["rotation_center"] = (E, R)
    if rotation == "radar":
        rho = 8 if radar_rank is None else radar_rank
        shapes |= {"radar_down": (2 * O, rho), "radar_up": (rho, O // 2)}
    if rotation == "radar_pairs":
        shapes["radar_pair_angle"] = (E, E)
        if radar_rank is not None:
            shapes |= {
                "radar_pair_down": (D, radar_rank),
                "radar_pair_up": (radar_rank, E * E),
            }
    return shapes


def is_rotation(matrix_RR: Tensor, tolerance: float = 1e-9) -> tuple[bool, str]:
    """Say whether a matrix is a proper rotation: M M^T = I and det M = +1.

    Args:
        matrix_RR: [R, R].
        tolerance: largest absolute deviation allowed.

    Returns:
        (ok, why): why is "" when ok.

    >>> is_rotation(torch.eye(2, dtype=torch.float64))
    (True, '')
    """
    identity = torch.eye(matrix_RR.shape[-1], dtype=matrix_RR.dtype, device=matrix_RR.device)
    error = float((matrix_RR @ matrix_RR.T - identity).abs().max())
    if not error <= tolerance:
        return False, f"M M^T differs from I by {error:.3g}, more than {tolerance:.3g}"
    determinant = float(torch.linalg.det(matrix_RR))
    if not abs(determinant - 1) <= tolerance:
        return False, f"det M is {determinant:.6g}, not +1"
    return True, ""
