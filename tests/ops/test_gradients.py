"""Law 4: first and second derivatives of every mode against finite differences, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ops_cases import VARIANTS, Problem, Variant, make, problems
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from lanes import first_then_slow

Check = Callable[..., bool]


def check(by: Check, problem: Problem, **options: object) -> None:
    """Run by(...) on the fast path as a function of all its tensors, logits included."""
    names = list(problem.tensors())

    def y(*tensors: Tensor) -> Tensor:
        given_tensors = dict(zip(names, tensors, strict=True))
        return problem.map(lambda name, _: given_tensors[name]).run()

    leaves = tuple(problem.leaves().tensors().values())
    assert by(y, leaves, **options)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gradcheck(variant: Variant) -> None:
    """Every entry of every Jacobian, once a mode."""
    check(gradcheck, make(variant, 20, T=2, E=3, K=2, R=4, D=2, O=4))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gradgradcheck(variant: Variant) -> None:
    """Every entry of every second derivative, once a mode."""
    check(gradgradcheck, make(variant, 21, T=1, E=2, K=2, R=4, D=1, O=2))


@pytest.mark.parametrize("order", first_then_slow([gradcheck, gradgradcheck]))
@given(data=st.data())
def test_projected_derivatives_over_random_shapes(order: Check, data: st.DataObject) -> None:
    variant = data.draw(st.sampled_from(VARIANTS))
    problem = data.draw(problems(variant, T=2, E=3, D=3, O=4))
    check(order, problem, fast_mode=True, atol=1e-4, rtol=1e-3)
