"""Values, first and second derivatives are finite everywhere, the singular points included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_cases import IN_RANK_SPACE, VARIANTS, Problem, Variant, make, problems
from torch import Tensor

from rotmole.ops.mixture.radar import radar_pairs_weights
from rotmole.ops.rotation import modes

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


def cancelling(rank: int, width: int, spread: float) -> tuple[Tensor, Tensor]:
    """B [E, R, O] of equal rows but for their signs and `spread`, and z [T, E, R] with z B ~ 0.

    Adam's first updates make such rows: each entry moves by the learning rate, whatever its
    gradient.
    """
    generator = torch.Generator().manual_seed(rank * width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    sign_ER = normal(4, rank).sign()
    B_ERO = 0.02 * sign_ER[:, :, None] * normal(4, 1, width).sign()
    B_ERO = B_ERO * (1 + spread * normal(4, rank, width))
    z_TER = normal(512, 4, rank)
    along_TE1 = (z_TER * sign_ER).sum(-1, keepdim=True) / rank
    return B_ERO, z_TER - along_TE1 * sign_ER


SPREADS = (0.0, 1e-7, 1e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
outputs_that_cancel = pytest.mark.parametrize(
    ("rank", "width"), [(2, 8), (3, 576), (6, 4096), (16, 64)]
)


@outputs_that_cancel
@pytest.mark.parametrize("spread", SPREADS)
def test_an_output_that_cancels_leaves_the_output_metric_finite(
    rank: int, width: int, spread: float
) -> None:
    """<z, z> = |z B|^2 up to a factor: what is left of it in float32 may be below zero."""
    B_ERO, z_TER = cancelling(rank, width, spread)
    B_ERO, z_ERT = B_ERO.requires_grad_(), z_TER.permute(1, 2, 0).clone().requires_grad_()
    q_ERT = z_ERT.detach().roll(1, 2) * 0.3
    angle_E1T = torch.ones(4, 1, 512)
    M_ERR = modes.output_metric(B_ERO)
    turned = [modes.tangent(z_ERT, q_ERT, M_ERR), modes.bias(z_ERT, q_ERT, M_ERR)]
    if rank > 2:
        turned.append(modes.plane(z_ERT, q_ERT, angle_E1T, M_ERR))
    for found_ERT in turned:
        gradients = torch.autograd.grad(found_ERT.sum(), [B_ERO, z_ERT], retain_graph=True)
        for value in (found_ERT, *gradients):
            assert torch.isfinite(value).all()


@outputs_that_cancel
@pytest.mark.parametrize("spread", SPREADS)
def test_outputs_that_cancel_leave_radar_pairs_finite(rank: int, width: int, spread: float) -> None:
    B_ERO, z_TER = (value.requires_grad_() for value in cancelling(rank, width, spread))
    weight_TE = torch.full((512, 4), 0.5)
    selected_TE = torch.ones(512, 4, dtype=torch.bool)
    gates = {"radar_pair_angle": torch.linspace(-0.5, 0.5, 16).view(4, 4)}
    mixed_TE = radar_pairs_weights(z_TER[..., 0], z_TER, weight_TE, selected_TE, B_ERO, gates)
    gradients = torch.autograd.grad(mixed_TE.sum(), [B_ERO, z_TER])
    for value in (mixed_TE, *gradients):
        assert torch.isfinite(value).all()
    y_TEO = torch.einsum("te,ter,ero->teo", mixed_TE, z_TER, B_ERO)
    assert (
        y_TEO.norm(dim=-1).max()
        <= 10 * torch.einsum("ter,ero->teo", z_TER, B_ERO).norm(dim=-1).max()
    )
