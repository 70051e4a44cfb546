"""The fused function and its slow twin agree: outputs, every gradient, under every option."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from ops_cases import IN_RANK_SPACE, VARIANTS, Problem, Variant, assert_close, make, problems
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from rotmole.ops import compiled
from rotmole.ops.mixture import fused, products
from rotmole.ops.mixture.banks import How
from rotmole.ops.mixture.fused import GATES, can_fuse, fused_mixture
from rotmole.ops.reference import method as reference
from rotmole.ops.rotation.adjoint import BY_HAND, adjoint
from rotmole.ops.rotation.table import ROTATIONS, Gate
from rotmole.ops.spec import Spec, Weights


def _fusible(variant: Variant) -> bool:
    options = dict(variant.options)
    return can_fuse(variant.rotation, options.get("rotation_metric", "rank"))


FUSED = [v for v in VARIANTS if _fusible(v)]
every = pytest.mark.parametrize("variant", FUSED, ids=str)


@pytest.fixture(scope="module", params=["many", "few", "turned"], autouse=True)
def tokens_are_few(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Every test runs three times, each time computed another way, as the sizes of a layer decide.

    With many tokens; with few, which take fewer operations; with products turned, as from many
    inputs.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "FEW_TOKENS", 10**9 if request.param == "few" else 0)
        patch.setattr(products, "TURNED_FROM", 1 if request.param == "turned" else 10**9)
        yield request.param == "few"


def how_of(problem: Problem, dtype: torch.dtype | None = None, **changes: Any) -> How:
    spec = Spec(
        num_experts=len(problem.B_ERO),
        scale=problem.scale,
        top_k=problem.top_k,
        rotation=problem.variant.rotation,
        **problem.variant.reading,
    )
    return How(replace(spec, **changes), dtype or problem.x_TD.dtype, keep_scale=1 / 0.75)


def weights_of(problem: Problem, router_ED: Tensor | None = None) -> Weights:
    router = {} if router_ED is None else {"router_weight": router_ED}
    return Weights(problem.A_ERD, problem.B_ERO, problem.gates, router)


def router_of(problem: Problem, seed: int = 9) -> Tensor:
    E, D = problem.A_ERD.shape[0], problem.A_ERD.shape[2]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(E, D, generator=generator, dtype=torch.float64).requires_grad_()


def by_reference(
    how: How, problem: Problem, router_ED: Tensor, keep_TD: Tensor | None
) -> tuple[Tensor, Tensor]:
    x_TD = problem.x_TD
    dropped_TD = x_TD if keep_TD is None else x_TD * keep_TD * how.keep_scale
    logits_TE = x_TD @ router_ED.T
    routing = reference.route(
        logits_TE,
        top_k=how.spec.top_k,
        selection=how.spec.selection,
        norm_topk_prob=how.spec.norm_topk_prob,
    )
    y_TO = reference.mixture(
        x_TD, dropped_TD, routing.weight_TE, problem.A_ERD, problem.B_ERO, problem.gates,
        rotation=how.spec.rotation, scale=how.spec.scale, logits_TE=logits_TE,
        rotation_input=how.spec.rotation_input,
    )  # fmt: skip
    return y_TO, logits_TE


def run(
    how: How,
    problem: Problem,
    router_ED: Tensor,
    keep_TD: Tensor | None,
    base_TO: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    weights = weights_of(problem, router_ED)
    return fused_mixture(how, problem.x_TD, weights, keep_TD=keep_TD, base_TO=base_TO)[:2]


def gradients(
    outputs: tuple[Tensor, Tensor | None], inputs: dict[str, Tensor], create_graph: bool = False
) -> dict[str, Tensor]:
    """Gradients of a fixed random functional of both outputs."""
    generator = torch.Generator().manual_seed(4)
    total = sum(
        (o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum()
        for o in outputs if o is not None
    )  # fmt: skip
    found = torch.autograd.grad(
        total, list(inputs.values()), create_graph=create_graph, materialize_grads=True
    )
    return dict(zip(inputs, found, strict=True))


def leaves(problem: Problem, router_ED: Tensor) -> dict[str, Tensor]:
    tensors = {name: t for name, t in problem.tensors().items() if name != "logits"}
    return tensors | {"router": router_ED}


@every
@examples(max_examples=30)  # of each of many modes
@given(data=st.data())
def test_outputs_and_every_gradient(variant: Variant, data: st.DataObject) -> None:
    problem = data.draw(problems(variant, T=3, E=3)).leaves()
    router_ED = router_of(problem)
    how = how_of(
        problem,
        selection=data.draw(st.sampled_from(["top_k", "dense"])),
        norm_topk_prob=data.draw(st.booleans()),
    )
    keep_TD = problem.keep_TD > 0 if data.draw(st.booleans()) else None
    fast = run(how, problem, router_ED, keep_TD)
    slow = by_reference(how, problem, router_ED, keep_TD)
    assert_close(fast[0], slow[0], 1e-12, "y")
    assert fast[1] is not None
    assert_close(fast[1], slow[1], 1e-13, "logits")
    inputs = leaves(problem, router_ED)
    found, wanted = gradients(fast, inputs), gradients(slow, inputs)
    for name in inputs:
        assert_close(found[name], wanted[name], 1e-10, name)


@every
@pytest.mark.parametrize("dropped", [False, True])
def test_first_and_second_derivatives(variant: Variant, dropped: bool) -> None:
    problem = make(variant, 2, T=2, E=3, K=2, D=3, O=4).leaves()
    inputs = leaves(problem, router_of(problem))
    inputs["base"] = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
    keep_TD = problem.keep_TD > 0 if dropped else None

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        named = dict(zip(inputs, tensors, strict=True))
        changed = problem.map(lambda name, t: named.get(name, t))
        return run(how_of(problem), changed, named["router"], keep_TD, named["base"])

    # along random directions: entry by entry test_outputs_and_every_gradient compares the first
    # pass with autograd through the reference; the second is the slow twin's, checked elsewhere
    assert torch.autograd.gradcheck(function, tuple(inputs.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tuple(inputs.values()), fast_mode=True)
    # that looks at one pass alone, and would not see that it is of another function
    by_hand = gradients(function(*inputs.values()), inputs)
    again = gradients(function(*inputs.values()), inputs, create_graph=True)
    for name in inputs:
        assert_close(again[name], by_hand[name], 1e-12, name)


@pytest.mark.parametrize("name", sorted(BY_HAND))
@given(data=st.data())
def test_backward_by_hand_is_autograd(name: str, data: st.DataObject) -> None:
    """Also where norms vanish: z = 0, q = 0, q along z or nearly so, and far from 1."""
    problem = data.draw(problems(Variant(name), T=3, E=2))
    size = data.draw(st.sampled_from([0.0, 1e-9, 1e-3, 1.0, 1e3]))
    z_TER, _ = problem.rotated()
    z = (z_TER * data.draw(st.sampled_from([0.0, 1e-9, 1.0]))).permute(1, 2, 0).contiguous()
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    E, R, T = z.shape
    row = ROTATIONS[name]
    vector = angle = None
    if row.vector_rows:
        q = torch.randn(E, row.vector_rows(R), T, generator=generator, dtype=z.dtype) * size
        along = z * size  # a thousandth of z beside that is inside plane's floor
        vector = data.draw(st.sampled_from([q, along, along + 1e-3 * z.roll(1, dims=1) * size]))
    if row.angle_rows:
        angle = torch.randn(E, row.angle_rows(R, R // 2), T, generator=generator, dtype=z.dtype)
    G = torch.rand(E, 1, T, generator=generator, dtype=z.dtype)
    dm = torch.randn(E, R, T, generator=generator, dtype=z.dtype)
    gate = Gate(vector, angle)
    by_hand = BY_HAND.pop(name)
    try:
        wanted = adjoint(name, z, gate, G, dm)
    finally:
        BY_HAND[name] = by_hand
    found = adjoint(name, z, gate, G, dm)
    for part, (one, other) in zip(found._fields, zip(found, wanted, strict=True), strict=True):
        assert (one is None) == (other is None), part
        if one is not None:
            assert one.isfinite().all(), part
            scale = max(1.0, float(other.abs().max()))
            assert_close(one / scale, other / scale, 1e-9, part)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_zero_start_is_bit_equal_to_none(variant: Variant, dtype: torch.dtype) -> None:
    if ROTATIONS[variant.rotation].kind == "identity":
        variant = Variant("tangent")
    for seed, T in enumerate((1, 2, 7, 64)):
        problem = make(variant, seed, T=T, E=4, K=2, D=33, O=20, dtype=dtype)
        problem = problem.at_zero_start()
        router_ED = router_of(problem).detach().to(dtype)
        how = how_of(problem)
        plain = replace(problem, variant=Variant("none"), gates={})
        found = run(how, problem, router_ED, None)
        wanted = run(how_of(plain), plain, router_ED, None)
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])


@every
def test_given_weights_and_frozen_inputs(variant: Variant) -> None:
    """With weights instead of a router, and with x that wants no gradient."""
    problem = make(variant, 5, T=4, E=3, K=2, D=5, O=6).leaves()
    weight_TE = torch.rand(4, 3, dtype=torch.float64).requires_grad_()
    arguments = (problem.A_ERD, problem.B_ERO, problem.gates)
    how = how_of(problem)
    x_TD = problem.x_TD.detach()
    logits_TE = problem.logits_TE
    weights = weights_of(problem)
    y_TO, *said = fused_mixture(how, x_TD, weights, weight_TE=weight_TE, logits_TE=logits_TE)
    assert said == [None, None]
    wanted_TO = reference.mixture(
        problem.x_TD, problem.x_TD, weight_TE, *arguments,
        rotation=how.spec.rotation, scale=how.spec.scale, logits_TE=logits_TE,
        rotation_input=how.spec.rotation_input,
    )  # fmt: skip
    inputs = {"weight": weight_TE, "A": problem.A_ERD, "B": problem.B_ERO} | problem.gates
    inputs["logits"] = logits_TE
    found, wanted = gradients((y_TO, None), inputs), gradients((wanted_TO, None), inputs)
    for name in inputs:
        assert_close(found[name], wanted[name], 1e-11, name)


@every
@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize("dropped", [False, True])
def test_what_is_kept_for_the_backward_pass(
    variant: Variant, dropped: bool, norm_topk_prob: bool, tokens_are_few: bool
) -> None:
    """x, its mask, the parameters, and only z, the gates' values and the chosen weights besides.

    Where tokens are few all experts' weights are kept, so that they need not be spread again.
    """
    T, E, D, O, K = 64, 3, 40, 50, 2  # noqa: E741 - the legend's letter
    problem = make(variant, 7, T=T, E=E, K=K, D=D, O=O, dtype=torch.float32).leaves()
    router_ED = router_of(problem).detach().float().requires_grad_()
    base_TO = torch.zeros(T, O, requires_grad=True)
    parameters = {t.data_ptr() for t in leaves(problem, router_ED).values()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        how = how_of(problem, norm_topk_prob=norm_topk_prob)
        keep_TD = problem.keep_TD > 0 if dropped else None
        run(how, problem, router_ED, keep_TD, base_TO)
    found = sum(t.untyped_storage().nbytes() for t in kept.values())
    R = problem.A_ERD.shape[1]
    gates = ROTATIONS[variant.rotation]
    rows = gates.vector_rows(R) if gates.vector_rows else 0
    if gates.angle_rows and not rows:  # beside a vector the angle is computed again
        rows = problem.gates["rotation_angle"].shape[1]
    few = 0
    if variant.small:  # gates of few inputs are computed again from them
        rows, few = 0, {"x": 2, "z": 0, "router": E}[variant.reading["rotation_input"]]
    softmax = 0 if norm_topk_prob else 4 * E
    kept_rows = 4 * E * (R + rows) + 4 * few
    weights = 4 * E if tokens_are_few else 5 * K
    assert found == T * (kept_rows + weights + softmax + (D if dropped else 0))


@every
def test_one_A_for_all_experts(variant: Variant) -> None:
    problem = make(variant, 8, T=4, E=3, K=2, D=5, O=6).leaves()
    A_1RD = problem.A_ERD[:1].detach().requires_grad_()
    inputs = leaves(problem, router_of(problem)) | {"A": A_1RD}
    fast = run(how_of(problem), replace(problem, A_ERD=A_1RD), inputs["router"], None)
    many = replace(problem, A_ERD=A_1RD.expand(3, -1, -1))
    slow = by_reference(how_of(problem), many, inputs["router"], None)
    assert_close(fast[0], slow[0], 1e-12)
    found, wanted = gradients(fast, inputs), gradients(slow, inputs)
    for name in inputs:
        assert_close(found[name], wanted[name], 1e-10, name)


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_givens_turns_as_many_planes_as_it_is_told(planes: int) -> None:
    variant = Variant("givens", shapes=(("rotation_planes", planes),))
    problem = make(variant, 8, T=4, E=3, K=2, R=6, D=5, O=6).leaves()
    inputs = leaves(problem, router_of(problem))
    fast = run(how_of(problem), problem, inputs["router"], None)
    slow = by_reference(how_of(problem), problem, inputs["router"], None)
    assert_close(fast[0], slow[0], 1e-12)
    found, wanted = gradients(fast, inputs), gradients(slow, inputs)
    for name in inputs:
        assert_close(found[name], wanted[name], 1e-10, name)


@pytest.mark.parametrize("dropped", [False, True])
@given(data=st.data())
def test_the_base_is_added_and_gets_its_gradient(dropped: bool, data: st.DataObject) -> None:
    variant = Variant(data.draw(st.sampled_from(sorted(BY_HAND))))
    problem = data.draw(problems(variant, T=3, E=3)).leaves()
    router_ED, how = router_of(problem), how_of(problem)
    keep_TD = problem.keep_TD > 0 if dropped else None
    alone, logits = run(how, problem, router_ED, keep_TD)
    base_TO = torch.randn_like(alone).requires_grad_()
    before = base_TO.detach().clone()
    y_TO, again = run(how, problem, router_ED, keep_TD, base_TO)
    assert_close(y_TO, base_TO + alone, 1e-13)
    assert torch.equal(base_TO, before)
    inputs = leaves(problem, router_ED) | {"base": base_TO}
    found = gradients((y_TO, again), inputs)
    wanted = gradients((base_TO + alone, logits), inputs)
    for name in inputs:
        assert_close(found[name], wanted[name], 1e-12, name)


HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(("base", "products", "result"), [
    (HALF, SINGLE, SINGLE), (SINGLE, HALF, SINGLE), (HALF, HALF, HALF), (DOUBLE, SINGLE, DOUBLE),
])  # fmt: skip
def test_the_wider_type_of_base_and_products_wins(
    base: torch.dtype, products: torch.dtype, result: torch.dtype
) -> None:
    """As in base + addition; the base is not changed, and its gradient has its type."""
    problem = make(Variant("tangent"), 1, T=5, E=3, K=2, D=8, O=6, dtype=SINGLE).leaves()
    router_ED = router_of(problem).detach().float().requires_grad_()
    base_TO = torch.randn(5, 6).to(base).requires_grad_()
    before = base_TO.detach().clone()
    how = how_of(problem, dtype=products)
    y_TO, _ = run(how, problem, router_ED, None, base_TO)
    alone, _ = run(how, problem, router_ED, None)
    assert y_TO.dtype == result
    assert torch.equal(base_TO, before)
    error = (y_TO - (base_TO + alone)).float().norm() / alone.float().norm()
    assert error < (0.02 if HALF in (base, products) and result == HALF else 1e-6)
    y_TO.sum().backward()
    assert base_TO.grad is not None
    assert base_TO.grad.dtype == base
    assert torch.equal(base_TO.grad, torch.ones_like(base_TO))


@every
@pytest.mark.parametrize("products", [DOUBLE, HALF], ids=str)
@pytest.mark.parametrize("differentiated", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"norm_topk_prob": False}, {"selection": "dense"}], ids=str
)
def test_traced_steps_give_the_same(
    variant: Variant,
    products: torch.dtype,
    differentiated: bool,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The steps that torch.compile and export follow, run as they stand; compiled: test_compile."""
    problem = make(variant, 4, T=5, E=4, K=2, D=8, O=6)
    if products == HALF:
        problem = problem.map(lambda _, t: t.bfloat16().float())
    problem = problem.leaves()
    router_ED = router_of(problem).detach().to(problem.x_TD.dtype).requires_grad_()
    how = how_of(problem, dtype=products, **options)
    keep_TD = problem.keep_TD > 0
    base_TO = torch.randn(5, 6, dtype=problem.x_TD.dtype, requires_grad=True)
    inputs = leaves(problem, router_ED) | {"base": base_TO}
    wanted = run(how, problem, router_ED, keep_TD, base_TO)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with torch.set_grad_enabled(differentiated):
        found = run(how, problem, router_ED, keep_TD, base_TO)
    tolerance = 1e-12 if products == DOUBLE else 0.03
    assert found[0].dtype == wanted[0].dtype
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours is not None
        assert theirs is not None
        assert_close(ours, theirs, tolerance)
    if differentiated and products == DOUBLE:
        ours, theirs = gradients(found, inputs), gradients(wanted, inputs)
        for name, gradient in theirs.items():
            assert_close(ours[name], gradient, 1e-10, name)


def test_a_single_renormalised_expert_teaches_the_router_nothing_at_all() -> None:
    """Not even rounding noise: Adam would turn it into a random walk."""
    problem = make(Variant("tangent"), 6, T=50, E=4, K=1, D=8, O=6, dtype=SINGLE).leaves()
    router_ED = router_of(problem).detach().float().requires_grad_()
    y_TO, _ = run(how_of(problem), problem, router_ED, None)
    (gradient,) = torch.autograd.grad(y_TO.square().sum(), router_ED)
    assert not gradient.any()


def test_more_experts_than_a_byte_can_number() -> None:
    for experts in (256, 257):
        problem = make(Variant("none"), 3, T=6, E=experts, K=2, R=2, D=4, O=3).leaves()
        router_ED = router_of(problem)
        with torch.no_grad():
            router_ED[-1] = 9 * problem.x_TD[0]  # the last expert is among the chosen
        inputs = leaves(problem, router_ED)
        fast = run(how_of(problem), problem, router_ED, None)
        slow = by_reference(how_of(problem), problem, router_ED, None)
        found, wanted = gradients(fast, inputs), gradients(slow, inputs)
        assert found["B"][-1].any()
        for name in inputs:
            assert_close(found[name], wanted[name], 1e-10, name)


def test_products_in_bfloat16_give_nearly_the_gradients_of_float32() -> None:
    """compute_dtype "input": float32 weights, bfloat16 products; gates stay in float32."""
    for name in ("none", "tangent", "plane", "givens"):
        problem = make(Variant(name), 3, T=256, E=4, K=2, R=8, D=128, O=96, dtype=torch.float32)
        problem = problem.map(
            lambda n, t: t.bfloat16().float() if n == "x" else t / t.shape[-1] ** 0.5
        ).leaves()
        router_ED = router_of(problem).detach().float().requires_grad_()
        inputs = leaves(problem, router_ED)
        found = {}
        for dtype in (torch.float32, torch.bfloat16):
            y_TO, _ = run(how_of(problem, dtype=dtype), problem, router_ED, None)
            found[dtype] = gradients((y_TO.float(), None), inputs)
        for key, wanted in found[torch.float32].items():
            error = (found[torch.bfloat16][key] - wanted).norm() / wanted.norm()
            assert error < 0.02, (name, key, float(error))


def test_unknown_rotations_are_left_to_the_slow_twin() -> None:
    assert {v.rotation for v in IN_RANK_SPACE} == {v.rotation for v in FUSED}
    assert not can_fuse("radar")
    assert not can_fuse("tangent", rotation_metric="output")
    gates = {"rotation_vector", "rotation_angle", "rotation_center", "rotation_down"}
    assert set(GATES) == gates
    assert fused.GATES is GATES
