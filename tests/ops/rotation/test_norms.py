"""Law 1: rotations keep lengths, are proper, and are the rotations that their equations name."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_cases import (
    CONDITIONAL,
    ROTATING,
    VARIANTS,
    Problem,
    Variant,
    assert_close,
    fast_mixture,
    make,
    problems,
    reference,
)
from torch import Tensor

from rotmole.ops.rotation.table import ROTATIONS, Gate, is_rotation

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(-6, 3).map(lambda power: 10.0**power)
FLOOR = 0.01


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


def gate_vector(problem: Problem, z_TER: Tensor) -> Tensor:
    """q_TER of the modes that have one."""
    if "rotation_center" in problem.gates:
        return problem.gates["rotation_center"].expand_as(z_TER)
    return problem.gate_value("rotation_vector")


def metric(problem: Problem) -> Tensor:
    name = "output" if problem.variant.metric else "rank"
    return torch.stack([reference.metric_matrix(B, name) for B in problem.B_ERO])


def inner(M_ERR: Tensor, a_TER: Tensor, b_TER: Tensor) -> Tensor:
    return torch.einsum("ter,ers,tes->te", a_TER, M_ERR, b_TER)


@given(seed=seeds, N=st.integers(2, 7), a=st.floats(-7, 7), b=st.floats(-7, 7))
def test_rotation_matrix(seed: int, N: int, a: float, b: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    u, v = torch.linalg.qr(torch.randn(N, 2, generator=generator, dtype=torch.float64))[0].T

    def R(theta: float) -> Tensor:
        return reference.rotation_matrix(u, v, torch.tensor(theta, dtype=torch.float64))

    assert is_rotation(R(a), 1e-12) == (True, "")
    assert_close(R(-a), R(a).T, 1e-14, "R(-a) = R(a)^T")
    assert_close(R(a) @ R(b), R(a + b), 1e-13, "angles add")
    assert_close(R(a) @ u, math.cos(a) * u + math.sin(a) * v, 1e-14, "u turns towards v")


@given(seed=seeds, N=st.integers(2, 6), size=st.floats(1e-6, 1))
def test_is_rotation_refuses(seed: int, N: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(N, N, generator=generator, dtype=torch.float64))[0]
    Q[:, 0] *= torch.linalg.det(Q).round()
    assert is_rotation(Q) == (True, "")
    for wrong in (
        Q * (1 + size),
        torch.cat([-Q[:1], Q[1:]]),
        Q + size * Q.roll(1, 0),
        Q * math.nan,
    ):
        ok, why = is_rotation(wrong)
        assert not ok
        assert why


@pytest.mark.parametrize("variant", ROTATING, ids=str)
@given(data=st.data())
def test_lengths_are_kept(variant: Variant, data: st.DataObject) -> None:
    """<z', z'> = <z, z> where law 1 says so, and never more."""
    size = data.draw(sizes)
    problem = data.draw(problems(variant)).map(
        lambda name, t: t * size if name in ("rotation_vector", "rotation_center") else t
    )
    z_TER, turned_TER = problem.rotated()
    M_ERR = metric(problem)
    n2_TE, found_TE = inner(M_ERR, z_TER, z_TER), inner(M_ERR, turned_TER, turned_TER)
    least = 1e-24
    # M has condition up to 1e24 where O < R: then the squared lengths themselves lose digits
    tolerance = 1e-12 if not variant.metric else 1e-10
    assert (found_TE <= n2_TE * (1 + tolerance) + 4 * least).all()
    kept_TE = torch.ones_like(n2_TE, dtype=torch.bool)
    if variant.rotation in CONDITIONAL:
        q_TER = gate_vector(problem, z_TER)
        if variant.rotation == "bias":
            moved_TER = z_TER + q_TER
            kept_TE = inner(M_ERR, moved_TER, moved_TER) >= FLOOR**2 * n2_TE + least
        else:
            t_TER = q_TER - (inner(M_ERR, q_TER, z_TER) / (n2_TE + least)).unsqueeze(-1) * z_TER
            q2_TE, t2_TE = inner(M_ERR, q_TER, q_TER), inner(M_ERR, t_TER, t_TER)
            kept_TE = t2_TE >= FLOOR**2 * (q2_TE + FLOOR**2 * n2_TE) + least
    kept_TE &= n2_TE > least / tolerance
    error_TE = (found_TE / n2_TE.clamp(min=1e-300)).sqrt() - 1
    assert error_TE[kept_TE].abs().le(tolerance).all(), error_TE[kept_TE].abs().max()


@pytest.mark.parametrize("variant", [v for v in ROTATING if v.metric], ids=str)
@given(data=st.data())
def test_the_output_metric_keeps_the_length_of_the_output(
    variant: Variant, data: st.DataObject
) -> None:
    problem = data.draw(problems(variant, D=5, O=8))
    z_TER, turned_TER = problem.rotated()
    before = torch.einsum("ter,ero->teo", z_TER, problem.B_ERO).norm(dim=-1)
    after = torch.einsum("ter,ero->teo", turned_TER, problem.B_ERO).norm(dim=-1)
    assert (after <= before * (1 + 1e-9) + 1e-10).all()
    if variant.rotation not in CONDITIONAL:
        assert_close(after, before, 1e-10)


def expected_turn(name: str, z: Tensor, q: Tensor, angle: float, length: float) -> Tensor:
    """z turned by the explicit matrix of span(z, q); `length` is |t| where the angle needs it."""
    u = unit(z)
    across = q - (q @ u) * u
    if name == "tangent":
        theta = 2 * math.atan(length / 2)
    elif name == "bias":  # straight to the direction of z + q
        theta = math.atan2(float(across.norm()), float((z + q) @ u))
    else:
        theta = math.pi * math.tanh(angle)
    matrix = reference.rotation_matrix(u, unit(across), torch.tensor(theta, dtype=torch.float64))
    return matrix @ z


PLANAR = [v for v in ROTATING if v.rotation in ("tangent", "plane", "centroid", "bias")]


@pytest.mark.parametrize("variant", PLANAR, ids=str)
@given(seed=seeds, O=st.integers(4, 8))
def test_planar_modes_against_the_explicit_matrix(variant: Variant, seed: int, O: int) -> None:  # noqa: E741 - the legend's letter
    """In rank space with the rank metric, in output space (zB towards qB) with the output one."""
    problem = make(variant, seed, T=1, E=1, K=1, R=4, D=3, O=O)
    problem = replace(problem, keep_TD=torch.ones(1, 3))
    z_TER, turned_TER = problem.rotated()
    z, turned, q = z_TER[0, 0], turned_TER[0, 0], gate_vector(problem, z_TER)[0, 0]
    t = q - (q @ z) / (z @ z) * z
    length, B = float(t.norm()), problem.B_ERO[0]
    if variant.metric:
        z, turned, q = z @ B, turned @ B, q @ B
        t = q - (q @ z) / (z @ z) * z
        length = float(t.norm() / (B.square().sum() / 4).sqrt())
    if float(t.norm()) < 0.1 * float(q.norm()) or float((z + q).norm()) < 0.1 * float(z.norm()):
        return  # inside the floors
    angles = "rotation_angle" in problem.gates
    theta = float(problem.gate_value("rotation_angle")[0, 0, 0]) if angles else 0.0
    assert_close(turned, expected_turn(variant.rotation, z, q, theta, length), 1e-9)


@pytest.mark.parametrize("name", ["bivector", "givens", "cayley"])
@given(data=st.data())
def test_linear_modes_are_proper_rotations(name: str, data: st.DataObject) -> None:
    """Their R x R matrix has determinant +1; the opposite gate gives its transpose."""
    row = ROTATIONS[name]
    R = data.draw(st.sampled_from(Variant(name).ranks()))
    generator = torch.Generator().manual_seed(data.draw(seeds))
    rows = row.vector_rows(R) if row.vector_rows else row.angle_rows(R, R // 2)
    value = torch.randn(rows, generator=generator, dtype=torch.float64) * data.draw(sizes)

    def matrix(value: Tensor) -> Tensor:
        many = value.unsqueeze(-1).expand(1, rows, R)
        gate = Gate(vector_EVT=many) if row.vector_rows else Gate(angle_EMT=many)
        return row.rotate(torch.eye(R, dtype=torch.float64).unsqueeze(0), gate)[0]

    assert is_rotation(matrix(value), 1e-10) == (True, "")
    assert_close(matrix(-value), matrix(value).T, 1e-10)
    if name == "bivector" and float(value.norm()) > 1e-3:
        e1 = torch.eye(R, dtype=torch.float64)[0]
        across = torch.cat([value.new_zeros(1), unit(value)])
        wanted = reference.rotation_matrix(e1, across, 2 * torch.atan(value.norm()))
        assert_close(matrix(value), wanted, 1e-12)


OUTPUT = [v for v in VARIANTS if ROTATIONS[v.rotation].kind == "output"]


@pytest.mark.parametrize("variant", OUTPUT, ids=str)
@given(data=st.data())
def test_output_modes_keep_the_length_of_each_output(variant: Variant, data: st.DataObject) -> None:
    problem = data.draw(problems(variant, E=3, least_E=2))
    selected_TE = torch.ones_like(problem.logits_TE, dtype=torch.bool)
    for e in range(problem.A_ERD.shape[0]):
        only_TE = torch.zeros_like(problem.logits_TE)
        only_TE[:, e] = 1
        v_TO = problem.dropped_TD @ problem.A_ERD[e].T @ problem.B_ERO[e]
        turned_TO = fast_mixture(
            problem.x_TD,
            problem.dropped_TD,
            only_TE,
            problem.A_ERD,
            problem.B_ERO,
            problem.gates,
            rotation=variant.rotation,
            scale=1.0,
            selected_TE=selected_TE,
            **dict(variant.options),
        )
        assert_close(turned_TO.norm(dim=-1), v_TO.norm(dim=-1), 1e-11)
