"""The grouped path computes the chosen experts alone, and finds what the reference finds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import Problem, Variant, assert_close, gradients, make, problems
from test_fused import FUSED
from torch import Tensor

from rotmole.ops.mixture import grouped
from rotmole.ops.mixture.grouped import chosen_dots, chosen_outer, chosen_sum, grouped_mixture
from rotmole.ops.reference import method as reference
from rotmole.ops.routing.selection import select
from rotmole.ops.spec import Spec, Weights

GROUPED = [v for v in FUSED if not v.input_z]
every = pytest.mark.parametrize("variant", GROUPED, ids=str)


def run(problem: Problem) -> Tensor:
    routed = select(problem.logits_TE, top_k=problem.top_k, **problem.route_options)
    spec = Spec(
        num_experts=len(problem.B_ERO),
        scale=problem.scale,
        top_k=problem.top_k,
        rotation=problem.variant.rotation,
        **problem.variant.reading,
    )
    return grouped_mixture(
        spec,
        problem.x_TD,
        problem.dropped_TD,
        Weights(problem.A_ERD, problem.B_ERO, problem.gates),
        routed.weight_TE,
        routed.selected_TE,
        problem.logits_TE,
    )


@every
@settings(max_examples=30)  # of each of many modes
@given(data=st.data())
def test_outputs_and_every_gradient(variant: Variant, data: st.DataObject) -> None:
    problem = data.draw(problems(variant, T=3, E=5)).leaves()
    problem.route_options = {"norm_topk_prob": data.draw(st.booleans())}
    slow = reference
    assert_close(run(problem), problem.run(slow), 1e-12, "y")
    found = gradients(problem, run)
    wanted = gradients(problem, lambda p: p.run(slow))
    for name, tensor in problem.tensors().items():
        assert found[name] is not None, f"{name} has no gradient tensor"
        other = torch.zeros_like(tensor) if wanted[name] is None else wanted[name]
        assert_close(found[name], other, 1e-10, name)


def test_first_and_second_derivatives_of_the_products() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor([[0, 3], [3, 1], [4, 4]])

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, w, table = normal(3, 4), normal(3, 2), normal(6, 4)
    for function, inputs in (
        (lambda x, t: chosen_dots(x, t, rows), (x, table)),
        (lambda w, t: chosen_sum(w, t, rows), (w, table)),
        (lambda w, x: chosen_outer(w, x, rows, 6), (w, x)),
    ):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@every
def test_second_derivatives(variant: Variant) -> None:
    problem = make(variant, 1, T=1, E=2, K=1, D=2, O=2).leaves()
    names = list(problem.tensors())

    def function(*tensors: Tensor) -> Tensor:
        named = dict(zip(names, tensors, strict=True))
        return run(problem.map(lambda name, _: named[name]))

    assert torch.autograd.gradgradcheck(function, tuple(problem.tensors().values()))


def test_experts_nobody_chose_get_zero_gradients() -> None:
    problem = make(Variant("tangent"), 2, T=2, E=40, K=1, D=5, O=6).leaves()
    found = gradients(problem, run)
    used = select(problem.logits_TE, top_k=1).selected_TE.any(0)
    for name in ("A", "B", "rotation_vector"):
        gradient = found[name]
        assert gradient is not None
        assert (gradient[~used] == 0).all()
        assert (gradient[used] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_zero_start_is_bit_equal_to_none(dtype: torch.dtype) -> None:
    for variant in GROUPED:
        problem = make(variant, 3, T=7, E=20, K=2, D=9, O=6, dtype=dtype).at_zero_start()
        assert torch.equal(run(problem), run(problem.without_rotation()))


def test_dots_in_float32_are_those_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA needs, where torch has no such kernel in bfloat16; here the format is chosen."""
    generator = torch.Generator().manual_seed(3)
    x, table = (torch.randn(n, 16, generator=generator).bfloat16() for n in (4, 6))
    rows = torch.tensor([[0, 3], [3, 1], [4, 4], [5, 0]])
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(grouped, "_dots_dtype", lambda _, d=dtype: d)
        leaves = [t.clone().requires_grad_() for t in (x, table)]
        dots = chosen_dots(*leaves, rows)
        assert dots.dtype == torch.bfloat16
        found[dtype] = [dots, *torch.autograd.grad(dots.float().square().sum(), leaves)]
    for here, there in zip(*found.values(), strict=True):
        assert_close(here.float(), there.float(), 0.02)


@pytest.mark.parametrize("on_cuda", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_only_bfloat16_on_cuda_is_widened(on_cuda: bool, dtype: torch.dtype) -> None:
    """No card is at hand: what stands for a tensor on one has the two attributes that are read."""
    given = SimpleNamespace(is_cuda=on_cuda, dtype=dtype)
    wide = on_cuda and dtype == torch.bfloat16
    assert grouped._dots_dtype(given) == (torch.float32 if wide else dtype)
