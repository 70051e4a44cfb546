"""Rotation: every function and its twin agree; the laws are in tests/ops/rotation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ops_cases import assert_close
from torch import Tensor

from rotmole.ops.reference import method, shapes
from rotmole.ops.reference import rotation as slow
from rotmole.ops.rotation import modes
from rotmole.ops.rotation.adjoint import adjoint
from rotmole.ops.rotation.table import ROTATIONS, Gate, gate_shapes, is_rotation

E, R, T = 2, 4, 3


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_gate_shapes(rotation: str) -> None:
    for extra in ({}, {"rotation_planes": 1}, {"radar_rank": 5}, {"rotation_input": "z"}):
        if extra.get("rotation_input") == "z" and not ROTATIONS[rotation].input_z:
            continue
        sizes = {"E": 3, "R": 6, "D": 7, "O": 8}
        wanted = shapes.gate_shapes(rotation, **sizes, **extra)
        assert gate_shapes(rotation, **sizes, **extra) == wanted


def test_square() -> None:
    """Without a metric, with one, and with one that says nothing, or less, of a vector's length."""
    a, metric = normal(0, E, R, T), normal(2, E, R, R)
    metric = metric @ metric.mT
    negative = -1e-17 * torch.eye(R, dtype=a.dtype).expand(E, R, R)
    for M in (None, metric, torch.zeros_like(negative), negative):
        assert_close(modes.square(a, M), slow.square(a, M), 1e-13)
        assert (modes.square(a, M) > 0).all()


def test_inner() -> None:
    a, b, metric = normal(0, E, R, T), normal(1, E, R, T), normal(2, E, R, R)
    for M in (None, metric):
        assert_close(modes.inner(a, b, M), slow.inner(a, b, M), 1e-13)


def test_part_across() -> None:
    z, q, metric = normal(0, E, R, T), normal(1, E, R, T), normal(2, E, R, R)
    metric = metric @ metric.mT
    n2, t = modes.part_across(z, q, metric)
    for e in range(E):
        for place in range(T):
            slow_n2, slow_t = method.across(z[e, :, place], q[e, :, place], metric[e])
            assert_close(n2[e, 0, place], slow_n2, 1e-12)
            assert_close(t[e, :, place], slow_t, 1e-12)


Mode = tuple[Callable[..., Tensor], Callable[..., Tensor], int, int, bool]
# the mode, its twin, rows of the vector gate, rows of the angle gate, whether it has a metric
MODES: dict[str, Mode] = {
    "tangent": (modes.tangent, method.tangent, R, 0, True),
    "bivector": (modes.bivector, method.bivector, R - 1, 0, False),
    "plane": (modes.plane, method.plane, R, 1, True),
    "givens": (modes.givens, method.givens, 0, R // 2, False),
    "cayley": (modes.cayley, method.cayley, 0, R * (R - 1) // 2, False),
    "bias": (modes.bias, method.bias, R, 0, True),
    "scale": (modes.scale, method.scale, 0, 1, False),
    "core": (modes.core, method.core, 0, R * R, False),
}


@pytest.mark.parametrize("with_metric", [False, True])
@pytest.mark.parametrize("name", MODES)
def test_modes(name: str, with_metric: bool) -> None:
    fast, twin, vector_rows, angle_rows, has_metric = MODES[name]
    if with_metric and not has_metric:
        return
    z, q, angle = normal(3, E, R, T), normal(4, E, vector_rows, T), normal(5, E, angle_rows, T)
    gates = [gate for gate in (q, angle) if gate.numel()]
    M_ERR = torch.eye(R).double().expand(E, R, R)
    options = {}
    if with_metric:
        M_ERR = modes.output_metric(normal(6, E, R, 9))
        options = {"metric": M_ERR}
    turned = fast(z, *gates, **options)
    for e in range(E):
        for t in range(T):
            wanted = twin(z[e, :, t], q[e, :, t], angle[e, :, t], M_ERR[e])
            assert_close(turned[e, :, t], wanted, 1e-12)


IN_RANK_SPACE = [name for name, row in ROTATIONS.items() if row.kind != "output"]


@pytest.mark.parametrize("rotation", IN_RANK_SPACE)
@pytest.mark.parametrize("inside", [False, True])
def test_adjoint(rotation: str, inside: bool) -> None:
    row = ROTATIONS[rotation]
    z, G, dm = normal(7, E, R, T), normal(8, E, 1, T).abs(), normal(9, E, R, T)
    vector = normal(10, E, row.vector_rows(R), T) if row.vector_rows else None
    angle = normal(11, E, row.angle_rows(R, R // 2), T) if row.angle_rows else None
    center = normal(12, E, R) if row.center else None
    if inside and vector is not None:  # almost along z, where lengths are floored
        vector = (2 * z + 2e-3 * normal(13, E, R, T))[:, : vector.shape[1]]
    if inside and center is not None:
        z = center.unsqueeze(-1) + 2e-3 * z
    found = adjoint(rotation, z, Gate(vector, angle, center), G, dm)
    wanted = slow.adjoint(rotation, z, G, dm, vector_EVT=vector, angle_EMT=angle, center_ER=center)
    for name, gradient in wanted._asdict().items():
        other = getattr(found, name)
        assert (other is None) == (gradient is None), name
        if gradient is not None:
            assert_close(other, gradient, 1e-11, name)


def test_is_rotation() -> None:
    skew = normal(13, 4, 4)
    proper = torch.linalg.matrix_exp(skew - skew.T)
    mirror = torch.diag(torch.tensor([1.0, 1, 1, -1]).double())
    for matrix in (proper, proper @ mirror, proper * 1.01, skew, proper[:1, :1] * torch.nan):
        assert is_rotation(matrix)[0] == slow.is_rotation(matrix)
    assert slow.is_rotation(proper)
    assert not slow.is_rotation(proper @ mirror)
