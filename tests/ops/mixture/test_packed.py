"""The packed path for decoding finds what the reference finds, in every type and selection."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from ops_cases import Variant, assert_close, make
from test_fused import FUSED, by_reference, how_of, router_of, run, weights_of

from rotmole.ops.mixture.packed import pack, packed_activations, packed_mixture


@pytest.mark.parametrize("variant", FUSED, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"norm_topk_prob": False}, {"selection": "dense"}], ids=str
)
def test_outputs(variant: Variant, options: dict[str, Any]) -> None:
    for T in (1, 3):
        problem = make(variant, T, T=T, E=4, K=2, D=5, O=6)
        router_ED = router_of(problem).detach()
        how = how_of(problem, **options)
        packed = pack(how.spec, [weights_of(problem, router_ED)], torch.float64)
        wanted, _ = by_reference(how, problem, router_ED, None)
        assert_close(packed_mixture(problem.x_TD, packed), wanted, 1e-12)
        base_TO = torch.ones(T, 6, dtype=torch.float64)
        found = packed_mixture(problem.x_TD, packed, base_TO)
        assert_close(found, base_TO + wanted, 1e-12)
        assert (base_TO == 1).all()


@pytest.mark.parametrize("variant", FUSED, ids=str)
def test_one_A_for_all_experts(variant: Variant) -> None:
    problem = make(variant, 8, T=3, E=4, K=2, D=5, O=6)
    router_ED, how = router_of(problem).detach(), how_of(problem)
    A_1RD = problem.A_ERD[:1]
    layer = weights_of(replace(problem, A_ERD=A_1RD), router_ED)
    many = replace(problem, A_ERD=A_1RD.expand(4, -1, -1))
    wanted, _ = by_reference(how, many, router_ED, None)
    found = packed_mixture(problem.x_TD, pack(how.spec, [layer], torch.float64))
    assert_close(found, wanted, 1e-12)


@pytest.mark.parametrize("variant", FUSED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_layers_together_are_each_alone(variant: Variant, dtype: torch.dtype) -> None:
    """Of other widths out; E, R, D and x in common."""
    problems = [make(variant, 7, T=3, E=4, K=2, D=5, O=width, dtype=dtype) for width in (6, 2, 9)]
    how, x_TD = how_of(problems[0]), problems[0].x_TD
    layers = [weights_of(p, router_of(p).detach().to(dtype)) for p in problems]
    found = packed_activations(x_TD, pack(how.spec, layers, dtype))
    assert len(found) == 3
    for layer, m_TN in zip(layers, found, strict=True):
        (alone_TN,) = packed_activations(x_TD, pack(how.spec, [layer], dtype))
        assert m_TN.dtype == dtype
        tolerance = 1e-12 if dtype == torch.float64 else 0.02
        assert_close(m_TN.double(), alone_TN.double(), tolerance)


@pytest.mark.parametrize("variant", FUSED, ids=str)
def test_half_types_keep_gates_in_float32(variant: Variant) -> None:
    problem = make(variant, 4, T=8, E=4, K=2, D=16, O=12, dtype=torch.bfloat16)
    router_ED = router_of(problem).detach().bfloat16()
    how = how_of(problem)
    packed = pack(how.spec, [weights_of(problem, router_ED)], torch.bfloat16)
    found = packed_mixture(problem.x_TD, packed)
    wanted, _ = run(how, problem, router_ED, None)
    assert found.dtype == torch.bfloat16
    assert torch.equal(packed_mixture(problem.x_TD.float(), packed), found)
    error = (found.float() - wanted.float()).norm() / wanted.float().norm()
    assert error < 0.01
    reads_x = "rotation_angle" in problem.gates and not variant.small
    apart = {"router", "angle"} if reads_x else {"router"}
    wide = packed.kind.names[0][0]
    assert set(wide) == apart
    assert {w.dtype for w in packed.fixed[1 : 1 + len(wide)] if w is not None} == {torch.float32}


def test_equal_logits_choose_the_lower_index() -> None:
    problem = make(Variant("none"), 1, T=2, E=6, K=2, D=5, O=6)
    how = how_of(problem)
    router_ED = torch.zeros(6, 5, dtype=torch.float64)
    packed = pack(how.spec, [weights_of(problem, router_ED)], torch.float64)
    wanted, _ = by_reference(how, problem, router_ED, None)
    assert_close(packed_mixture(problem.x_TD, packed), wanted, 1e-13)
