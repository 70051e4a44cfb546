"""Law 4: the slow loops of reference.py and the fast path agree, outputs and every gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_cases import (
    FAST,
    IN_RANK_SPACE,
    SLOW,
    VARIANTS,
    Variant,
    assert_close,
    gradients,
    make,
    problems,
)

from rotmole.ops.reference import method as reference
from rotmole.ops.rotation.table import ROTATIONS

every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)
ROUTES = [
    {},
    {"norm_topk_prob": False},
    {"selection": "dense"},
]


@every_variant
@given(data=st.data())
def test_outputs_and_every_gradient(variant: Variant, data: st.DataObject) -> None:
    problem = data.draw(problems(variant, T=2, E=3)).leaves()
    problem.route_options = data.draw(st.sampled_from(ROUTES))
    assert_close(problem.run(FAST), problem.run(SLOW), 1e-12, "y")
    fast = gradients(problem, lambda p: p.run(FAST))
    slow = gradients(problem, lambda p: p.run(SLOW))
    for name, tensor in problem.tensors().items():
        found, wanted = fast[name], slow[name]
        assert found is not None, f"{name} has no gradient tensor"
        assert_close(found, torch.zeros_like(tensor) if wanted is None else wanted, 1e-10, name)


@pytest.mark.parametrize("variant", IN_RANK_SPACE, ids=str)
def test_rotated(variant: Variant) -> None:
    problem = make(variant, 4, T=4, E=3, D=5, O=6)
    for found, wanted in zip(problem.rotated(), problem.rotated(reference), strict=True):
        assert_close(found, wanted, 1e-12)


@every_variant
def test_layouts_in_memory_do_not_matter(variant: Variant) -> None:
    """Transposed parameters and a gradient that is one expanded number give the same."""
    plain = make(variant, 5, T=4, E=3, K=2, D=5, O=6).leaves()
    turned = plain.map(lambda _, t: t.detach().mT.contiguous().mT.requires_grad_())
    assert not turned.x_TD.is_contiguous()
    for problem in (plain, turned):
        problem.run().sum().backward()
    for name, tensor in plain.tensors().items():
        assert tensor.grad is not None
        assert_close(turned.tensors()[name].grad, tensor.grad, 1e-13, name)


@every_variant
def test_each_gradient_alone(variant: Variant) -> None:
    """Freezing everything else does not change the gradient of one tensor."""
    problem = make(variant, 6, T=4, E=3, K=2, D=5, O=6)
    together = gradients(problem.leaves(), lambda p: p.run())
    for name, wanted in together.items():
        alone = problem.map(lambda n, t, name=name: t.clone().requires_grad_(n == name))
        y = alone.run()
        probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=y.dtype)
        (found,) = torch.autograd.grad((y * probe).sum(), alone.tensors()[name])
        assert wanted is not None
        assert_close(found, wanted, 1e-13, name)


@every_variant
def test_without_selected_it_means_weight_not_zero(variant: Variant) -> None:
    problem = make(variant, 7, T=4, E=3, K=2, D=5, O=6)
    given_selected = problem.run()
    for side in (FAST, SLOW):
        routed = side.route(problem.logits_TE, top_k=2)
        found = side.mixture(
            problem.x_TD,
            problem.dropped_TD,
            routed.weight_TE,
            problem.A_ERD,
            problem.B_ERO,
            problem.gates,
            rotation=variant.rotation,
            scale=problem.scale,
            logits_TE=problem.logits_TE,
            **dict(variant.options),
        )
        assert_close(found, given_selected, 1e-13)


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_keeps_type_and_comes_close(variant: Variant, dtype: torch.dtype) -> None:
    """The output has the type of B; against float64 it differs by that type's rounding."""
    exact = make(variant, 8, T=6, E=3, K=2, D=8, O=8)
    # gates a tenth as large: the error of an angle is its size times the type's rounding
    exact = exact.map(lambda n, t: (t * 0.1 if n in exact.gates else t).to(dtype).double())
    lower = exact.map(lambda _, t: t.to(dtype))
    found, wanted = lower.run(), exact.run(SLOW)
    assert found.dtype == dtype
    assert_close(found.double(), wanted, 20 * torch.finfo(dtype).eps)


@every_variant
def test_autocast_leaves_norms_and_angles_alone(variant: Variant) -> None:
    """Under bfloat16 autocast only the big products may round: z' is R(z) in float32."""
    problem = make(variant, 9, T=6, E=3, K=2, D=8, O=8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = problem.run()
        assert torch.isfinite(y).all()
        rounds = {"rotation_vector", "rotation_down"} & problem.gates.keys()
        if ROTATIONS[variant.rotation].kind == "output" or rounds:
            return
        z_TER, turned_TER = problem.rotated()
    assert turned_TER.dtype == torch.float32
    for e in range(3):
        for t in range(6):
            gates = {name: gate[e] for name, gate in problem.gates.items()}
            reads = {"x": problem.x_TD[t], "z": z_TER[t, e], "router": problem.logits_TE[t]}
            read = reads[dict(variant.options).get("rotation_input", "x")]
            angle = gates["rotation_angle"] @ read if gates else z_TER.new_zeros(0)
            q = gates.get("rotation_center", z_TER.new_zeros(0))
            metric = dict(variant.options).get("rotation_metric", "rank")
            M_RR = reference.metric_matrix(problem.B_ERO[e], metric)
            wanted = reference.RANK_MODES[variant.rotation](z_TER[t, e], q, angle, M_RR)
            assert_close(turned_TER[t, e], wanted, 1e-4)


@every_variant
def test_no_token_and_one_token(variant: Variant) -> None:
    problem = make(variant, 10, T=3, E=3, K=2, D=5, O=6)
    first = problem.map(lambda n, t: t[:1] if n in ("x", "logits") else t)
    assert_close(first.run(), problem.run()[:1], 1e-13)
    empty = problem.map(lambda n, t: t[:0] if n in ("x", "logits") else t).leaves()
    assert empty.run().shape == (0, 6)
    for name, gradient in gradients(empty, lambda p: p.run()).items():
        assert gradient is not None, name
        assert not gradient.any(), name


@every_variant
def test_experts_that_no_token_chose_still_get_a_gradient_tensor(variant: Variant) -> None:
    """Law 7: zeros are allowed, None is not; DDP and FSDP wait for every parameter."""
    problem = make(variant, 11, T=3, E=4, K=1, D=5, O=6)
    problem = replace(problem, logits_TE=torch.tensor([[9.0, 0, 0, 0]] * 3).double()).leaves()
    found = gradients(problem, lambda p: p.run())
    for name, gradient in found.items():
        assert gradient is not None, name
        assert torch.isfinite(gradient).all(), name
    assert found["A"][0].any()
    assert not found["A"][1:].any()
