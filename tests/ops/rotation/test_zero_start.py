"""Law 3: with its gates at their zero start every mode is mode `none`, bit for bit.

B is random and not zero: B = 0 would hide any rotation.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_cases import VARIANTS, Problem, Variant, assert_close, gradients, make, problems

from rotmole.ops.rotation.table import ROTATIONS

ZERO = {  # what method.md's table says; a mode added later states its own in its row
    "none": (),
    "tangent": ("rotation_vector",),
    "bivector": ("rotation_vector",),
    "plane": ("rotation_angle",),
    "centroid": ("rotation_angle",),
    "givens": ("rotation_angle",),
    "cayley": ("rotation_angle",),
    "bias": ("rotation_vector",),
    "radar": ("radar_up",),
    "radar_pairs": ("radar_pair_angle", "radar_pair_up"),
    "offset": ("rotation_vector",),
    "scale": ("rotation_angle",),
    "core": ("rotation_angle",),
}


def assert_equals_none(problem: Problem) -> None:
    start = problem.at_zero_start()
    found, wanted = start.run(), start.without_rotation().run()
    if problem.variant.rotation == "radar":  # it sums in output space
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}
        assert_close(found, wanted, tolerance[found.dtype])
    else:
        assert torch.equal(found, wanted)


def test_the_table_of_zero_starts() -> None:
    assert {name: ROTATIONS[name].zero for name in ZERO} == ZERO


DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@given(data=st.data())
def test_zero_start_is_none_bit_for_bit(variant: Variant, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    problem = data.draw(problems(variant, T=9, E=5, D=20, O=24, dtype=dtype))
    size = 10.0 ** data.draw(st.integers(-3, 3))
    assert_equals_none(problem.map(lambda n, t: t * size if n == "x" else t))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_zero_start_at_the_size_of_a_layer(variant: Variant, dtype: torch.dtype) -> None:
    """Large enough for the blocked matrix kernels, whose sums differ with the shape."""
    assert_equals_none(make(variant, 30, T=65, E=4, K=2, R=8, D=192, O=160, dtype=dtype))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@given(data=st.data())
def test_learning_at_the_zero_start(variant: Variant, data: st.DataObject) -> None:
    """Experts and router learn as without rotation, and no gate that starts at zero is asleep."""
    start = data.draw(problems(variant)).at_zero_start().leaves()
    found = gradients(start, lambda p: p.run())
    wanted = gradients(start.without_rotation(), lambda p: p.run())
    for name in wanted:
        assert found[name] is not None
        assert_close(found[name], wanted[name], 1e-11, name)
    alone = variant.rotation == "radar_pairs" and start.top_k == 1  # the identity, by its equation
    if start.dropped_TD.any() and not alone:
        for name in set(start.gates) & set(ROTATIONS[variant.rotation].zero):
            assert found[name].any(), name
