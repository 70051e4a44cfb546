"""Experts beside products that are made in full."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy.linalg import subspace_angles

from planted_cases import FIRST, layers, mixture
from rotmole.inspection.geometry import geometry, router_drift


@pytest.mark.parametrize("settings", [{}, {"share_A": True, "rotation": "none"},
                                      {"init_weights": "svd", "num_experts": 2, "r": 3}],
                         ids=["plain", "shared A", "svd"])  # fmt: skip
def test_norms_cosines_and_angles_are_those_of_the_products(settings: dict[str, object]) -> None:
    model = mixture(**settings).double()
    found = layers(model)[FIRST]
    known = geometry(found, model.peft_config["default"])
    weights, scale = found.experts.weights(), found.experts.spec.scale
    A = weights.A_ERD.detach().expand(len(weights.B_ERO), -1, -1)
    P = scale * torch.einsum("erd,ero->edo", A, weights.B_ERO.detach())
    base = found.layer.get_base_layer().weight.detach().norm()
    assert known.norm == pytest.approx((P.flatten(1).norm(dim=1) / base).tolist())
    start = torch.zeros_like(P)
    if (residual := found.experts.residual()) is not None:
        start = scale * torch.einsum("erd,ero->edo", residual.A_ERD, residual.B_ERO).detach()
    assert known.drift == pytest.approx(((P - start).flatten(1).norm(dim=1) / base).tolist())
    for i, j in itertools.combinations(range(len(P)), 2):
        cosine = (P[i] * P[j]).sum() / (P[i].norm() * P[j].norm())
        assert known.cosine[i][j] == pytest.approx(float(cosine))
        rank = found.experts.expert_B.shape[1]
        (u, _, v), (x, _, y) = (torch.linalg.svd(P[e]) for e in (i, j))
        reads = subspace_angles(u[:, :rank].numpy(), x[:, :rank].numpy()).mean()
        writes = subspace_angles(v[:rank].T.numpy(), y[:rank].T.numpy()).mean()
        assert known.input_angle[i][j] == pytest.approx(reads, abs=1e-6)
        assert known.output_angle[j][i] == pytest.approx(writes, abs=1e-6)


def test_an_expert_of_nothing_has_no_directions() -> None:
    model = mixture()
    found = layers(model)[FIRST]
    with torch.no_grad():
        found.experts.expert_B[1] = 0.0
    known = geometry(found, model.peft_config["default"])
    assert known.norm[1] == 0
    assert known.cosine[0][1] == 0
    assert known.output_angle[0][1] is None


def test_imported_experts_have_no_known_start() -> None:
    model = mixture()
    settings = model.peft_config["default"]
    settings.expert_names = ["a", "b", "c", "d"]
    assert geometry(layers(model)[FIRST], settings).drift == (None,) * 4


@pytest.mark.parametrize("moved", [0.0, 0.02, 0.1, 0.5])
def test_the_drift_of_a_router_is_estimated_without_its_start(moved: float) -> None:
    """Entries drawn within b, all moved by a share of b up or down: the estimate is that share."""
    model = mixture(num_experts=4)
    router = layers(model)[FIRST].experts
    bound = 1 / math.sqrt(32)
    torch.manual_seed(0)
    estimates = []
    with torch.no_grad():
        for _ in range(100):  # a layer of SmolLM2 has 18 times as many entries
            router.router_weight.uniform_(-bound, bound)
            router.router_weight.add_(moved * bound * torch.randn(4, 32).sign())
            estimates.append(router_drift(router))
    mean = sum(value for value in estimates if value is not None) / len(estimates)
    assert mean == pytest.approx(moved, rel=0.1)


def test_one_expert_has_no_router() -> None:
    model = mixture(num_experts=1, top_k=1, rotation="none")
    assert router_drift(layers(model)[FIRST].experts) is None
