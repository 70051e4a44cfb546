"""Law 5: the order of the experts does not matter; scaling z (and q) scales z'."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_cases import ROTATING, VARIANTS, Variant, assert_close, problems
from torch import Tensor

# In these the length of q means nothing (R(cz, cq) = c R(z, q)); in all others q is a tangent or
# an angle, and R(cz, q) = c R(z, q).
Q_SCALES_ALONG = ("bias", "plane", "centroid")


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@given(data=st.data())
def test_order_of_experts(variant: Variant, data: st.DataObject) -> None:
    problem = data.draw(problems(variant, least_E=2))
    E = problem.A_ERD.shape[0]
    order = torch.tensor(data.draw(st.permutations(range(E))))

    def reorder(name: str, t: Tensor) -> Tensor:
        if name == "logits":
            return t[:, order]
        if name == "radar_pair_angle":
            return t[order][:, order]
        if name == "radar_pair_up":
            return t.unflatten(1, (E, E))[:, order][:, :, order].flatten(1)
        if name in ("A", "B") or (name.startswith("rotation_") and name != "rotation_down"):
            t = t[order]
            reads_logits = problem.variant.reads_logits and name in (
                "rotation_vector",
                "rotation_angle",
            )
            return t[..., order] if reads_logits else t
        return t  # x, and what experts share

    assert_close(problem.map(reorder).run(), problem.run(), 1e-12)


# a gate that reads z turns a longer z by another angle, but for bias, whose q is linear in z
SCALING = [v for v in ROTATING if not v.input_z or v.rotation == "bias"]


@pytest.mark.parametrize("variant", SCALING, ids=str)
@given(data=st.data())
def test_scaling(variant: Variant, data: st.DataObject) -> None:
    problem = data.draw(problems(variant))
    c = 10.0 ** data.draw(st.floats(-3, 3))
    scaled = {"A"}
    if variant.rotation in Q_SCALES_ALONG and not variant.input_z:
        scaled |= {"rotation_vector", "rotation_center"}
    z_TER, turned_TER = problem.rotated()
    found_z, found = problem.map(lambda n, t: t * c if n in scaled else t).rotated()
    assert_close(found_z / c, z_TER, 1e-12)
    # the epsilons count where |z| is about 1e-12: not at these sizes, unless dropout left nothing
    well = z_TER.norm(dim=-1, keepdim=True) > 1e-3
    assert_close(found / c * well, turned_TER * well, 1e-9 if variant.metric else 1e-11)
