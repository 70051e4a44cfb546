"""The shared expert: every way adds what the slow loops add, and sends every gradient back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from ops_cases import Problem, Variant, assert_close, make
from test_fused import FUSED
from torch import Tensor
from torch.nn.functional import linear

from rotmole.ops.mixture.banks import How
from rotmole.ops.mixture.dense import mixture, shared_weight
from rotmole.ops.mixture.fused import GATES, fused_mixture
from rotmole.ops.mixture.grouped import grouped_mixture
from rotmole.ops.mixture.packed import pack, packed_activations, packed_mixture
from rotmole.ops.reference import layer, method
from rotmole.ops.routing.selection import select
from rotmole.ops.spec import Spec, Weights

ROUTED = [Variant("none"), Variant("tangent"), Variant("plane", (("rotation_input", "z"),))]
SHARED = [v for v in FUSED if not v.reads_logits]  # the shared expert has no router
LEAVES = {"A": "A_ERD", "B": "B_ERO", "gate": "router"}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Layer:
    """Routed experts and a shared one: as the fast side takes them, and as the slow side does."""

    def __init__(self, routed: Variant, shared: Variant, *, gate: bool, E: int = 3) -> None:
        self.problem = make(routed, 1, T=3, E=E, K=min(2, E), D=5, O=6)
        other = make(shared, 2, T=3, E=1, K=1, R=shared.ranks(4)[-1], D=5, O=6)
        self.router_ED, self.base_TO = normal(3, E, 5), normal(4, 3, 6)
        self.shared = {"A": other.A_ERD, "B": other.B_ERO} | other.gates
        if gate:
            self.shared["gate"] = normal(5, 1, 5)
        reading = shared.reading
        self.shared_settings = {
            "rotation": shared.rotation, "scale": 0.7, "rotation_input": reading["rotation_input"],
        }  # fmt: skip
        shared_spec = Spec(
            scale=0.7, scoring="sigmoid", selection="dense", rotation=shared.rotation, **reading
        )
        self.spec = Spec(
            num_experts=E, scale=self.problem.scale, top_k=self.problem.top_k,
            rotation=routed.rotation, shared=shared_spec, **routed.reading,
        )  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        """Everything that gets a gradient, by the slow side's names."""
        problem = self.problem
        named = {"x_TD": problem.x_TD, "A_ERD": problem.A_ERD, "B_ERO": problem.B_ERO}
        named |= problem.gates
        if self.spec.num_experts > 1:
            named["router_ED"] = self.router_ED
        return named | {f"shared_{name}": tensor for name, tensor in self.shared.items()}

    def weights(self, named: dict[str, Tensor]) -> Weights:
        gates = {name: tensor for name, tensor in named.items() if name in GATES}
        shared = {n.removeprefix("shared_"): t for n, t in named.items() if "shared_" in n}
        router = {"router_weight": named["router_ED"]} if "router_ED" in named else {}
        return Weights(
            named["A_ERD"],
            named["B_ERO"],
            gates,
            router,
            shared=Weights(
                shared["A"],
                shared["B"],
                {name: tensor for name, tensor in shared.items() if name in GATES},
                {"router_weight": shared["gate"]} if "gate" in shared else {},
            ),
        )

    def slow_settings(self, keep_TD: Tensor | None) -> dict[str, Any]:
        one = (
            {} if self.spec.num_experts > 1 else {"weight_TE": torch.ones_like(self.base_TO[:, :1])}
        )
        return one | {
            "rotation": self.spec.rotation, "scale": self.spec.scale, "top_k": self.spec.top_k,
            "rotation_input": self.spec.rotation_input, "keep_TD": keep_TD, "keep_scale": 4 / 3,
            "base_TO": self.base_TO, "shared_settings": self.shared_settings,
        }  # fmt: skip

    def slow(self, keep_TD: Tensor | None, dy_TO: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """y, and the gradient of each tensor."""
        named, settings = self.tensors(), self.slow_settings(keep_TD)
        gates = {name: tensor for name, tensor in named.items() if name in GATES}
        plain = {n: t for n, t in named.items() if n not in GATES and "shared_" not in n}
        y_TO, _ = layer.layer(**plain, gates=gates, shared=self.shared, **settings)
        return y_TO, layer.layer_gradients(named, dy_TO, None, **settings)

    def dense(self, named: dict[str, Tensor], keep_TD: Tensor | None) -> Tensor:
        x_TD = named["x_TD"]
        logits_TE, weight_TE, selected_TE = None, x_TD.new_ones(len(x_TD), 1), None
        if "router_ED" in named:
            logits_TE = linear(x_TD, named["router_ED"])
            weight_TE, selected_TE, _ = select(logits_TE, top_k=self.spec.top_k)
        dropped_TD = x_TD if keep_TD is None else x_TD * keep_TD * (4 / 3)
        weights = self.weights(named)
        arguments = self.spec, x_TD, dropped_TD, weights, weight_TE, selected_TE, logits_TE
        return self.base_TO + mixture(*arguments)

    def grouped(self, named: dict[str, Tensor], keep_TD: Tensor | None) -> Tensor:
        x_TD = named["x_TD"]
        logits_TE = linear(x_TD, named["router_ED"])
        weight_TE, selected_TE, _ = select(logits_TE, top_k=self.spec.top_k)
        dropped_TD = x_TD if keep_TD is None else x_TD * keep_TD * (4 / 3)
        weights = self.weights(named)
        arguments = self.spec, x_TD, dropped_TD, weights, weight_TE, selected_TE, logits_TE
        return self.base_TO + grouped_mixture(*arguments)

    def fused(self, named: dict[str, Tensor], keep_TD: Tensor | None) -> Tensor:
        how = How(self.spec, torch.float64, keep_scale=4 / 3)
        weights = self.weights(named)
        arguments = {"keep_TD": keep_TD, "base_TO": self.base_TO}
        return fused_mixture(how, named["x_TD"], weights, **arguments)[0]


def layers() -> Iterator[Any]:
    for shared in SHARED:
        yield pytest.param(Layer(Variant("none"), shared, gate=True), id=f"none+{shared}")
    for routed in ROUTED[1:]:
        yield pytest.param(Layer(routed, Variant("none"), gate=False), id=f"{routed}+none")
    for gate in (False, True):
        one = Layer(Variant("tangent"), Variant("none"), gate=gate, E=1)
        yield pytest.param(one, id=f"one expert, gate={gate}")


@pytest.mark.parametrize("case", [*layers()])
@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("way", ["dense", "fused", "grouped"])
def test_outputs_and_every_gradient(case: Layer, drops: bool, way: str) -> None:
    if way == "grouped" and (case.spec.num_experts == 1 or case.spec.rotation_input == "z"):
        way = "dense"
    keep_TD = case.problem.keep_TD > 0 if drops else None
    dy_TO = normal(9, 3, 6)
    wanted_TO, wanted = case.slow(keep_TD, dy_TO)
    leaves = {n: t.detach().clone().requires_grad_() for n, t in case.tensors().items()}
    y_TO = getattr(case, way)(leaves, keep_TD)
    assert_close(y_TO, wanted_TO, 1e-12)
    found = torch.autograd.grad((y_TO * dy_TO).sum(), list(leaves.values()))
    for name, gradient in zip(leaves, found, strict=True):
        assert_close(gradient, wanted[name], 1e-11, name)
        assert wanted[name].any(), name


@pytest.mark.parametrize("gate", [False, True])
def test_second_derivatives(gate: bool) -> None:
    case = Layer(Variant("tangent"), Variant("givens"), gate=gate)
    leaves = {n: t.detach().clone().requires_grad_() for n, t in case.tensors().items()}

    def run(*values: Tensor) -> Tensor:
        return case.fused(dict(zip(leaves, values, strict=True)), None)

    assert torch.autograd.gradcheck(run, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(run, tuple(leaves.values()))


@pytest.mark.parametrize("shared", SHARED, ids=str)
@pytest.mark.parametrize("gate", [False, True])
def test_packed(shared: Variant, gate: bool) -> None:
    case = Layer(Variant("plane"), shared, gate=gate)
    wanted_TO, _ = case.slow(None, case.base_TO)
    x_TD, weights = case.problem.x_TD, case.weights(case.tensors())
    packed = pack(case.spec, [weights], torch.float64)
    found = packed_mixture(x_TD, packed, case.base_TO)
    assert_close(found, wanted_TO, 1e-12)
    other = weights._replace(B_ERO=weights.B_ERO[..., :2])
    assert other.shared is not None
    other = other._replace(shared=other.shared._replace(B_ERO=other.shared.B_ERO[..., :2]))
    both = pack(case.spec, [weights, other], torch.float64)
    for m_TN in packed_activations(x_TD, both):
        assert_close(m_TN, packed_activations(x_TD, packed)[0], 1e-12)
    half = case.weights({name: tensor.bfloat16() for name, tensor in case.tensors().items()})
    base_TO, packed = case.base_TO.bfloat16(), pack(case.spec, [half], torch.bfloat16)
    near = packed_mixture(x_TD.bfloat16(), packed, base_TO)
    error = (near.double() - wanted_TO).norm() / wanted_TO.norm()
    assert error < 0.03


def test_weight_of_the_shared_expert() -> None:
    problem = make(Variant("none"), 1, T=3, E=1, K=1, D=5, O=6)
    weights = Weights(problem.A_ERD, problem.B_ERO)
    assert_close(shared_weight(problem.x_TD, weights), method.shared_weight(problem.x_TD), 1e-15)
    gate = 40 * normal(1, 1, 5)  # saturated too
    weights = weights._replace(router={"router_weight": gate})
    found = shared_weight(problem.x_TD, weights)
    assert_close(found, method.shared_weight(problem.x_TD, gate), 1e-14)


def _concatenated(problem: Problem, other: Problem) -> tuple[Tensor, Tensor]:
    A = torch.cat([problem.A_ERD, other.A_ERD], dim=1)
    return A, torch.cat([problem.B_ERO, other.B_ERO], dim=1)


def test_one_expert_and_a_shared_one_are_one_LoRA_of_both_ranks() -> None:
    problem = make(Variant("none"), 1, T=3, E=1, K=1, R=2, D=5, O=6)
    other = make(Variant("none"), 2, T=3, E=1, K=1, R=3, D=5, O=6)
    spec = Spec(scale=1.3, shared=Spec(scale=1.3))
    weights = Weights(problem.A_ERD, problem.B_ERO, shared=Weights(other.A_ERD, other.B_ERO))
    how = How(spec, torch.float64)
    found = fused_mixture(how, problem.x_TD, weights)[0]
    A, B = _concatenated(problem, other)
    wanted = 1.3 * problem.x_TD @ A[0].T @ B[0]
    assert_close(found, wanted, 1e-13)


def test_the_shared_expert_does_not_change_what_the_router_says() -> None:
    case = Layer(Variant("tangent"), Variant("plane"), gate=True)
    how, x_TD = How(case.spec, torch.float64), case.problem.x_TD
    weights = case.weights(case.tensors())
    alone = replace(how.spec, shared=None)
    _, logits_TE, index_KT = fused_mixture(how, x_TD, weights)
    _, plain_TE, plain_KT = fused_mixture(
        how._replace(spec=alone), x_TD, weights._replace(shared=None)
    )
    for found, wanted in ((logits_TE, plain_TE), (index_KT, plain_KT)):
        assert found is not None
        assert wanted is not None
        assert_close(found.double(), wanted.double(), 1e-14)
