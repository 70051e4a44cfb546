"""Routing: every function and its twin agree; the laws are in tests/ops/routing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_cases import assert_close
from torch import Tensor

from rotmole.ops.reference import balance as slow_balance
from rotmole.ops.reference import routing as slow
from rotmole.ops.reference import shapes
from rotmole.ops.routing.balance import balance_gradient, usage
from rotmole.ops.routing.route import route, scaling_gate_shapes, select_by
from rotmole.ops.routing.routers import ROUTERS, router_shapes
from rotmole.ops.routing.selection import (
    SELECTIONS,
    SORTED_UP_TO,
    choose,
    spread_chosen,
    top_k_of,
)
from rotmole.ops.routing.task_balance import expert_groups
from rotmole.ops.routing.threshold import threshold_shapes
from rotmole.ops.spec import Spec, Tokens, Weights

seeds = st.integers(0, 2**32 - 1)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("H", [None, 3])
@pytest.mark.parametrize("router", ROUTERS)
def test_shapes(router: str, H: int | None) -> None:
    assert router_shapes(router, E=4, D=7, H=H) == shapes.router_shapes(router, E=4, D=7, H=H)
    assert threshold_shapes(7) == shapes.threshold_shapes(7)
    for selection in SELECTIONS:
        spec = Spec(num_experts=4, router=router, router_dim=H, selection=selection)
        wanted = shapes.scaling_gate_shapes(router, selection, E=4, D=7, H=H)
        assert scaling_gate_shapes(spec, 7) == wanted


few_or_many = st.one_of(st.integers(1, 6), st.integers(SORTED_UP_TO + 1, SORTED_UP_TO + 9))


@given(seed=seeds, E=few_or_many, T=st.integers(1, 4), ties=st.booleans(), data=st.data())
def test_top_k_of(seed: int, E: int, T: int, ties: bool, data: st.DataObject) -> None:
    score_ET = normal(torch.Generator().manual_seed(seed), E, T)
    score_ET = score_ET.round() if ties else score_ET
    top_k = data.draw(st.integers(1, E))
    for one, other in zip(top_k_of(score_ET, top_k), slow.top_k_of(score_ET, top_k), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("E", [4, SORTED_UP_TO + 1])
def test_top_k_of_hides_no_nan_and_takes_minus_infinity(E: int) -> None:
    score_ET = torch.full((E, 2), -torch.inf)
    score_ET[2, 0], score_ET[3, 1] = torch.nan, 1.0
    score_KT, index_KT = top_k_of(score_ET, 2)
    assert index_KT.tolist() == [[2, 3], [0, 0]]
    assert torch.equal(score_KT.isnan(), torch.tensor([[True, False], [False, False]]))


@given(
    seed=seeds, E=st.integers(1, 6), T=st.integers(1, 4), ties=st.booleans(),
    selection=st.sampled_from(["top_k", "dense"]), norm=st.booleans(), data=st.data(),
)  # fmt: skip
def test_choose_and_spread_chosen(
    seed: int, E: int, T: int, ties: bool, selection: str, norm: bool, data: st.DataObject
) -> None:
    logits_ET = normal(torch.Generator().manual_seed(seed), E, T)
    logits_ET = logits_ET.round() if ties else logits_ET
    options: dict[str, Any] = {
        "top_k": data.draw(st.integers(1, E)), "selection": selection, "norm_topk_prob": norm,
    }  # fmt: skip
    chosen = choose(logits_ET, **options)
    for t, weights in enumerate(slow.choose(logits_ET, **options)):
        if chosen.index_KT is not None:
            assert chosen.index_KT[:, t].tolist() == list(weights)
        assert_close(chosen.weight_KT[:, t], torch.stack(list(weights.values())), 1e-14)
    if chosen.index_KT is not None:
        wanted_ET = slow.spread_chosen(chosen.weight_KT, chosen.index_KT, E)
        assert torch.equal(spread_chosen(chosen.weight_KT, chosen.index_KT, E), wanted_ET)


def learned(router: str, scoring: str, selection: str) -> bool:
    """Whether the combination is defined."""
    row = SELECTIONS[selection]
    return scoring in row.scorings and (ROUTERS[router].weight == "learned" or row.name == "top_k")


CASES = [
    (router, scoring, selection)
    for router in ROUTERS
    for scoring in ("softmax", "sigmoid")
    for selection in SELECTIONS
    if learned(router, scoring, selection)
]


@pytest.mark.parametrize("sequence_T", [None, torch.tensor([1, 0, 0, 1, 1, 1])], ids=str)
@pytest.mark.parametrize(("router", "scoring", "selection"), CASES)
def test_route_and_select_by(
    router: str, scoring: str, selection: str, sequence_T: Tensor | None
) -> None:
    generator = torch.Generator().manual_seed(3)
    spec = Spec(
        num_experts=5, top_k=2, router=router, router_dim=3, router_seed=11, scoring=scoring,
        selection=selection, norm_topk_prob=selection == "top_p", router_temperature=0.6,
    )  # fmt: skip
    x_TD, A_ERD, B_ERO = (normal(generator, *shape) for shape in ((6, 4), (5, 2, 4), (5, 2, 3)))
    parameters = {
        name: normal(generator, *shape) for name, shape in scaling_gate_shapes(spec, 4).items()
    }
    ids_T, mask_T = torch.arange(6) + 40, torch.tensor([1, 1, 0, 1, 1, 1]).bool()
    bias_E = normal(generator, 5) if selection == "top_k" else None
    weights = Weights(A_ERD, B_ERO, router=parameters, bias_E=bias_E)
    tokens = Tokens(ids_T, mask_T, sequence_T, sequences=2)
    logits_TE, routing = route(spec, x_TD, weights, tokens=tokens)
    settings: dict[str, Any] = {
        "selection": selection, "scoring": scoring, "top_k": 2, "top_p": spec.top_p,
        "norm_topk_prob": spec.norm_topk_prob, "bias_E": bias_E, "sequences": 2, "mask_T": mask_T,
        "sequence_T": sequence_T,
    }  # fmt: skip
    wanted_TE, wanted = slow.route(
        router, x_TD, parameters, A_ERD=A_ERD, ids_T=ids_T, temperature=0.6, seed=11, **settings
    )
    assert_close(logits_TE, wanted_TE, 1e-13)
    assert torch.equal(routing.selected_TE, wanted.selected_TE)
    assert_close(routing.weight_TE, wanted.weight_TE, 1e-13)
    assert_close(routing.probability_TE, wanted.probability_TE, 1e-13)
    tau_T1 = torch.full((6, 1), 0.1).double() if selection == "threshold" else None
    again = select_by(spec, logits_TE, tau_T1, bias_E, tokens)
    weight = {"hash": "mean", "magnitude": "one"}.get(router, "learned")
    wanted = slow.select(logits_TE, tau_T1=tau_T1, weight=weight, **settings)
    assert torch.equal(again.selected_TE, wanted.selected_TE)
    assert_close(again.weight_TE, wanted.weight_TE, 1e-13)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("numbered", [False, True])
def test_balance_gradient_and_usage(numbered: bool, dense: bool, masked: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    logits_ET = 2 * normal(generator, 4, 6)
    index_KT = None if dense else logits_ET.topk(2, dim=0).indices
    options: dict[str, Any] = {"sequences": 3, "balance": 0.7, "z": 0.3}
    if numbered:
        options["sequence_T"] = torch.tensor([0, 0, 0, 1, 2, 2])
    if masked:
        options["mask_T"] = torch.tensor([1, 0, 1, 0, 1, 1])
    fast = balance_gradient(logits_ET, index_KT, **options)
    wanted = slow_balance.balance_gradient(logits_ET, index_KT, **options)
    assert_close(fast.logits_ET, wanted.logits_ET, 1e-13)
    assert_close(fast.balance, wanted.balance, 1e-13)
    assert_close(fast.z, wanted.z, 1e-13)
    assert fast.tokens == wanted.tokens
    selected_TE = logits_ET.T > 0
    mask_T = options.get("mask_T")
    assert torch.equal(usage(selected_TE, mask_T), slow_balance.usage(selected_TE, mask_T))


def test_expert_groups() -> None:
    for experts in range(1, 9):
        for groups in range(1, experts + 1):
            wanted = slow_balance.expert_groups(experts, groups)
            assert expert_groups(experts, groups).tolist() == wanted
