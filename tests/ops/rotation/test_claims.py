"""What each mode can and cannot do, as the documents say it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_cases import Variant, assert_close, gradients, make, problems
from torch import Tensor

from rotmole.ops import router_shapes
from rotmole.ops.rotation.table import ROTATIONS, Gate, gate_shapes
from rotmole.ops.routing.threshold import threshold_shapes

BIAS = [
    Variant("bias"),
    Variant("bias", (("rotation_metric", "output"),)),
]


@given(data=st.data())
def test_one_expert_without_rotation_is_lora(data: st.DataObject) -> None:
    """Law 2, as far as tensors go: y = s x A^T B, and every gradient."""
    problem = data.draw(problems(Variant("none"), E=1)).leaves()
    found = gradients(problem, lambda p: p.run())
    wanted = gradients(problem, lambda p: p.scale * (p.dropped_TD @ p.A_ERD[0].T @ p.B_ERO[0]))
    for name in ("x", "A", "B"):
        assert_close(found[name], wanted[name], 1e-13, name)
    lora = problem.scale * (problem.dropped_TD @ problem.A_ERD[0].T @ problem.B_ERO[0])
    assert_close(problem.run(), lora, 1e-13)
    assert not found["logits"].any()


def positive_ratio(found_TER: Tensor, wanted_TER: Tensor) -> Tensor:
    """c with found = c wanted, checked to be one positive number for each token and expert."""
    c = (found_TER * wanted_TER).sum(-1) / wanted_TER.square().sum(-1).clamp(min=1e-300)
    assert_close(found_TER, c.unsqueeze(-1) * wanted_TER, 1e-11)
    assert (c >= 0).all()
    return c


@pytest.mark.parametrize("variant", BIAS, ids=str)
@given(data=st.data())
def test_bias_is_the_mixture_with_a_plus_q_times_a_positive_number(
    variant: Variant, data: st.DataObject
) -> None:
    problem = data.draw(problems(variant))
    summed = replace(problem, A_ERD=problem.A_ERD + problem.gates["rotation_vector"])
    moved_TER = summed.without_rotation().rotated()[0]
    c_TE = positive_ratio(problem.rotated()[1], moved_TER)
    if not variant.metric:
        z_TER = problem.rotated()[0]
        outside = moved_TER.norm(dim=-1) > 0.02 * z_TER.norm(dim=-1)
        ratio = z_TER.norm(dim=-1) / moved_TER.norm(dim=-1).clamp(min=1e-300)
        seen = outside & (z_TER.norm(dim=-1) > 1e-6)
        assert_close(c_TE[seen], ratio[seen], 1e-11)


@given(data=st.data())
def test_bias_from_z_turns_alike_for_every_token(data: st.DataObject) -> None:
    """z' is along (I + Q) z, a matrix that B absorbs."""
    problem = data.draw(problems(Variant("bias", (("rotation_input", "z"),))))
    z_TER, turned_TER = problem.rotated()
    Q = problem.gates["rotation_vector"]
    positive_ratio(turned_TER, z_TER + torch.einsum("ers,tes->ter", Q, z_TER))


@given(data=st.data())
def test_offset_is_the_mixture_with_a_plus_q(data: st.DataObject) -> None:
    problem = data.draw(problems(Variant("offset")))
    summed = replace(problem, A_ERD=problem.A_ERD + problem.gates["rotation_vector"])
    assert_close(problem.run(), summed.without_rotation().run(), 1e-12)


@given(data=st.data())
def test_scale_is_a_signed_scalar(data: st.DataObject) -> None:
    problem = data.draw(problems(Variant("scale")))
    z_TER, turned_TER = problem.rotated()
    angle_TE = torch.einsum("emd,td->te", problem.gates["rotation_angle"], problem.x_TD)
    wanted = 2**0.5 * torch.sin(angle_TE + torch.pi / 4)
    assert_close(turned_TER, wanted.unsqueeze(-1) * z_TER, 1e-13)


@given(data=st.data())
def test_core_is_any_matrix_at_a_token(data: st.DataObject) -> None:
    """Its gate can be chosen so that z' = M z for a given M; row by row, C z and not z C."""
    problem = data.draw(problems(Variant("core"), T=1, E=2, D=3))
    R = problem.A_ERD.shape[1]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    M_RR = torch.randn(R, R, generator=generator, dtype=torch.float64)
    x_D = problem.x_TD[0]
    C = (M_RR - torch.eye(R)).flatten().outer(x_D / (x_D @ x_D))
    E = problem.A_ERD.shape[0]
    z_TER, turned_TER = replace(problem, gates={"rotation_angle": C.expand(E, -1, -1)}).rotated()
    assert_close(turned_TER, z_TER @ M_RR.T, 1e-10)


@given(data=st.data())
def test_givens_angles_add(data: st.DataObject) -> None:
    """Its planes are fixed, so turning by x1 and then by x2 is turning by x1 + x2."""
    problem = data.draw(problems(Variant("givens"), T=1))
    R = problem.A_ERD.shape[1]
    W = problem.gates["rotation_angle"]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    W2 = torch.randn(W.shape, generator=generator, dtype=torch.float64)
    once_TER = problem.rotated()[1]
    rotate = ROTATIONS["givens"].rotate
    angle2 = torch.einsum("emd,td->emt", W2, problem.x_TD)
    twice_TER = rotate(once_TER.permute(1, 2, 0), Gate(angle_EMT=angle2)).permute(2, 0, 1)
    both = replace(problem, gates={"rotation_angle": W + W2})
    assert R % 2 == 0
    assert_close(twice_TER, both.rotated()[1], 1e-12)


@pytest.mark.parametrize(
    "variant",
    [Variant("radar_pairs"), Variant("radar_pairs", shapes=(("radar_rank", 2),))],
    ids=str,
)
@given(data=st.data())
def test_radar_pairs_is_the_identity_with_one_expert_chosen(
    variant: Variant, data: st.DataObject
) -> None:
    problem = replace(data.draw(problems(variant)), top_k=1)
    assert torch.equal(problem.run(), problem.without_rotation().run())


@given(data=st.data())
def test_radar_pairs_mixes_outputs_of_chosen_experts_only(data: st.DataObject) -> None:
    """y lies in the span of the chosen v_j, with weights that may be negative."""
    problem = data.draw(problems(Variant("radar_pairs"), T=1, E=4, least_E=2, O=6))
    chosen_E = torch.zeros_like(problem.logits_TE[0], dtype=torch.bool)
    chosen_E[problem.logits_TE[0].topk(problem.top_k).indices] = True
    # what the others hold does not matter
    other = problem.map(
        lambda n, t: torch.where(chosen_E[:, None, None], t, t + 1) if n in ("A", "B") else t
    )
    assert_close(other.run(), problem.run(), 1e-12)
    v_KO = torch.stack(
        [
            problem.dropped_TD[0] @ problem.A_ERD[e].T @ problem.B_ERO[e]
            for e in range(len(chosen_E))
            if chosen_E[e]
        ]
    )
    y_O = problem.run()[0]
    if v_KO.any():
        basis = torch.linalg.svd(v_KO, full_matrices=False)
        inside = basis.Vh[1e-9 * basis.S[0] < basis.S]
        assert_close(y_O @ inside.T @ inside, y_O, 1e-6)


def test_the_diagonal_of_radar_pairs_is_never_read() -> None:
    problem = make(Variant("radar_pairs"), 60, E=3, K=3)
    other = problem.map(lambda n, t: t + 5 * torch.eye(3) if n == "radar_pair_angle" else t)
    assert torch.equal(other.run(), problem.run())


def test_names_and_shapes_of_parameters() -> None:
    """A saved adapter has these names: they are part of the format."""
    sizes = {"E": 4, "R": 6, "D": 10, "O": 12}
    assert gate_shapes("radar", **sizes) == {"radar_down": (24, 8), "radar_up": (8, 6)}
    assert gate_shapes("radar", **sizes, radar_rank=3) == {
        "radar_down": (24, 3),
        "radar_up": (3, 6),
    }
    assert gate_shapes("radar_pairs", **sizes) == {"radar_pair_angle": (4, 4)}
    assert gate_shapes("radar_pairs", **sizes, radar_rank=3) == {
        "radar_pair_angle": (4, 4),
        "radar_pair_down": (10, 3),
        "radar_pair_up": (3, 16),
    }
    assert router_shapes("attention", E=4, D=10) == {
        "router_query": (16, 10),
        "router_key": (4, 16),
    }
    assert router_shapes("attention", E=4, D=10, H=3)["router_key"] == (4, 3)
    assert threshold_shapes(10) == {
        "router_threshold_weight": (1, 10),
        "router_threshold_bias": (1,),
    }
