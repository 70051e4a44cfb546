"""The angles that statistics are made of: each mode beside the slow loops, and known angles."""

from __future__ import annotations

import math

import pytest
import torch
from ops_cases import VARIANTS, Problem, Variant, _layer, assert_close, make
from torch import Tensor

from rotmole.ops.mixture import radar
from rotmole.ops.mixture.dense import Turns, turns
from rotmole.ops.reference import method
from rotmole.ops.reference import turns as slow
from rotmole.ops.rotation import modes
from rotmole.ops.routing.selection import select


def settings_of(problem: Problem) -> dict[str, object]:
    options = {n: v for n, v in problem.variant.options if n != "router_sqrt_gate"}
    return {"rotation": problem.variant.rotation, **options}


def fast_turns(problem: Problem, selected_TE: Tensor) -> Turns:
    spec, weights = _layer(problem.A_ERD, problem.B_ERO, problem.gates, settings_of(problem))
    x_TD, logits_TE = problem.x_TD, problem.logits_TE
    return turns(spec, x_TD, problem.dropped_TD, weights, selected_TE, logits_TE)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_angles_are_those_of_the_slow_loops(variant: Variant) -> None:
    problem = make(variant, 6, T=4, E=3, K=2, D=5, O=6)
    selected_TE = select(problem.logits_TE, top_k=2).selected_TE
    wanted = slow.turns(
        problem.x_TD, problem.dropped_TD, problem.A_ERD, problem.B_ERO, problem.gates,
        selected_TE, logits_TE=problem.logits_TE, **settings_of(problem),
    )  # fmt: skip
    found_EMT = fast_turns(problem, selected_TE).angle_EMT
    compared = 0
    for t, of_token in enumerate(wanted):
        for e, angles in enumerate(of_token):
            if angles:
                assert found_EMT[e, :, t].tolist() == pytest.approx(angles, abs=2e-8)
                compared += 1
    assert compared == 4 * 2
    if variant.rotation != "none":
        assert found_EMT.abs().max() > 0.05


def test_givens_angles_are_less_whole_turns() -> None:
    problem = make(Variant("givens"), 3, T=5, E=2, D=3, O=4)
    selected_TE = torch.ones(5, 2, dtype=torch.bool)
    far = problem.map(lambda name, t: t * 50 if name == "rotation_angle" else t)
    found_EMT = fast_turns(far, selected_TE).angle_EMT
    assert found_EMT.abs().max() <= math.pi
    raw_TEM = far.gate_value("rotation_angle")
    assert raw_TEM.abs().max() > 2 * math.pi
    assert_close(torch.cos(found_EMT), torch.cos(raw_TEM.permute(1, 2, 0)), 1e-10)
    assert_close(torch.sin(found_EMT), torch.sin(raw_TEM.permute(1, 2, 0)), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_and_straight_angles_keep_their_digits(dtype: torch.dtype) -> None:
    for angle in (0.0, 1e-6, 1e-3, 1.0, math.pi / 2, math.pi - 1e-3, math.pi):
        first = torch.tensor([[3.0], [0.0]], dtype=dtype)
        second = torch.tensor([[math.cos(angle)], [math.sin(angle)]], dtype=torch.float64)
        found = modes.angle_between(first[None], 0.01 * second.to(dtype)[None])
        assert float(found) == pytest.approx(angle, rel=1e-6, abs=1e-6)
    nothing = torch.zeros(1, 2, 1, dtype=dtype)
    assert float(modes.angle_between(nothing, first[None])) == 0
    assert slow.angle_between(nothing[0, :, 0], first[:, 0]) == 0


def test_radar_outputs_are_those_of_the_slow_loops() -> None:
    problem = make(Variant("radar"), 9, T=3, E=3, D=5, O=6)
    selected_TE = torch.ones(3, 3, dtype=torch.bool)
    z_TER = torch.einsum("erd,td->ter", problem.A_ERD, problem.dropped_TD)
    outputs = radar.radar_outputs(z_TER, selected_TE, problem.B_ERO, problem.gates, True)
    for t in range(3):
        v = {e: z_TER[t, e] @ problem.B_ERO[e] for e in range(3)}
        turned = method.radar(v, problem.gates, True)
        for e in range(3):
            assert_close(outputs[0][t, e], v[e], 1e-12)
            assert_close(outputs[1][t, e], turned[e], 1e-12)


def test_pairs_angles() -> None:
    problem = make(Variant("radar_pairs"), 2, T=3, E=3, D=5, O=6)
    selected_TE = torch.ones(3, 3, dtype=torch.bool)
    z_TER = torch.einsum("erd,td->ter", problem.A_ERD, problem.dropped_TD)
    gates = problem.gates
    found_TE = radar.radar_pairs_angles(problem.x_TD, z_TER, selected_TE, problem.B_ERO, gates)
    wanted = slow.turns(
        problem.x_TD, problem.dropped_TD, problem.A_ERD, problem.B_ERO, gates, selected_TE,
        rotation="radar_pairs",
    )  # fmt: skip
    for t in range(3):
        assert found_TE[t].tolist() == pytest.approx([a for (a,) in wanted[t]], abs=2e-8)
