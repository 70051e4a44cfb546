"""Values, first and second derivatives are finite everywhere, the singular points included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_cases import IN_RANK_SPACE, VARIANTS, Problem, Variant, make, problems
from torch import Tensor

every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)


def assert_finite_to_second_order(problem: Problem) -> None:
    problem = problem.leaves()
    names, leaves = zip(*problem.tensors().items(), strict=True)
    y = problem.run()
    assert torch.isfinite(y).all(), "value"
    weight = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)
    first = torch.autograd.grad((y * weight).sum(), leaves, create_graph=True)
    for name, gradient in zip(names, first, strict=True):
        assert torch.isfinite(gradient).all(), f"first derivative by {name}"
    probe = sum(gradient.sum() for gradient in first)
    if probe.requires_grad:
        second = torch.autograd.grad(probe, leaves, allow_unused=True)
        for name, gradient in zip(names, second, strict=True):
            assert gradient is None or torch.isfinite(gradient).all(), (
                f"second derivative by {name}"
            )


def with_q(problem: Problem, factor: float, noise: float = 0.0) -> Problem:
    """q = factor * z, up to relative noise, in the modes whose q can be z (T = 1 for centroid)."""
    z_TER = problem.rotated()[0] if "rotation_center" in problem.gates else None

    def change(name: str, t: Tensor) -> Tensor:
        if name == "rotation_center" and z_TER is not None:
            t = z_TER[0] * factor
        elif name == "rotation_vector" and problem.variant.input_z:
            eye = torch.eye(t.shape[-1], dtype=t.dtype)
            t = eye[: t.shape[1]].expand_as(t) * factor
        elif name == "rotation_vector" and problem.variant.small:
            return t * factor  # what reads few numbers cannot be z
        elif name == "rotation_vector":
            t = problem.A_ERD[:, : t.shape[1]] * factor
        else:
            return t
        return t * (1 + noise * torch.linspace(-1, 1, t.shape[-1], dtype=t.dtype))

    return problem.map(change)


def scaled(name: str, factor: float) -> Callable[[Problem], Problem]:
    return lambda p: p.map(lambda n, t: t * factor if n.startswith(name) else t)


POINTS: dict[str, Callable[[Problem], Problem]] = {
    "x = 0": scaled("x", 0.0),
    "z = 0": scaled("A", 0.0),
    "v = 0": scaled("B", 0.0),
    "q = 0": lambda p: with_q(p, 0.0),
    "every gate 0": lambda p: scaled("radar", 0.0)(scaled("rotation", 0.0)(p)),
    "z + q = 0": lambda p: with_q(p, -1.0),
    "z + q almost 0": lambda p: with_q(p, -1.0, 1e-9),
    "q parallel to z": lambda p: with_q(p, 2.0),
    "q almost parallel to z": lambda p: with_q(p, 2.0, 1e-9),
    "q antiparallel to z": lambda p: with_q(p, -3.0),
    "experts alike": lambda p: p.map(
        lambda n, t: t[:1].expand_as(t).clone() if n in ("A", "B") else t
    ),
    "equal logits": scaled("logits", 0.0),
    "huge logits": scaled("logits", 1e4),
}


@every_variant
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_singular_points(variant: Variant, point: str, dtype: torch.dtype) -> None:
    T = 1 if variant.rotation == "centroid" else 3
    assert_finite_to_second_order(
        POINTS[point](make(variant, 40, T=T, E=3, K=2, D=4, O=6, dtype=dtype))
    )


@every_variant
@given(data=st.data())
def test_finite_over_random_sizes(variant: Variant, data: st.DataObject) -> None:
    """Inputs from 1e-20 to 1e20 (float32: to 1e6) times one; factors from 1e-6 to 1e3 in float64.

    Squares beyond 1e38 do not fit float32.
    """
    dtype, most = data.draw(st.sampled_from([(torch.float64, 20), (torch.float32, 6)]))
    problem = data.draw(problems(variant, T=2, E=3, dtype=dtype))
    problem = scaled("x", 10.0 ** data.draw(st.integers(-20, most)))(problem)
    if dtype == torch.float64:
        for name in ("A", "B", "rotation_vector", "rotation_center"):
            problem = scaled(name, 10.0 ** data.draw(st.integers(-6, 3)))(problem)
    assert_finite_to_second_order(problem)


@every_variant
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float64, 1e-20),
        (torch.float64, 1e20),
        (torch.float32, 1e-20),
        (torch.float32, 1e6),
    ],
    ids=str,
)
def test_extreme_inputs(variant: Variant, dtype: torch.dtype, size: float) -> None:
    """An odd and an even rank where the mode can do both: of odd rank every skew S is singular."""
    for R in variant.ranks()[:2]:
        for seed in range(2):
            problem = make(variant, seed, T=2, E=3, K=2, R=R, D=3, O=6, dtype=dtype)
            assert_finite_to_second_order(scaled("x", size)(problem))


@every_variant
@given(data=st.data())
def test_no_input_gives_no_output(variant: Variant, data: st.DataObject) -> None:
    """z = 0 gives 0: exactly where q follows the input, below sqrt(e) for a learned centre."""
    problem = scaled("x", 0.0)(data.draw(problems(variant)))
    y = problem.run()
    most = 1e-12 * float(problem.B_ERO.abs().sum()) * problem.scale
    learned = "rotation_center" in problem.gates or variant.reads_logits  # q stays where x is 0
    assert y.abs().max() <= (most if learned else 0.0)


@pytest.mark.parametrize("variant", IN_RANK_SPACE, ids=str)
@given(data=st.data())
def test_z_zero_gives_zero_whatever_the_gate_says(variant: Variant, data: st.DataObject) -> None:
    problem = scaled("A", 0.0)(data.draw(problems(variant)))
    if variant.rotation == "offset":  # z + q is q there: the control is no rotation
        return
    z_TER, turned_TER = problem.rotated()
    assert not z_TER.any()
    assert turned_TER.norm(dim=-1).max() <= 1.0001e-12 * (1 + 1e6 * variant.metric)
