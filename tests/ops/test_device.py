"""Every tensor that an operation makes lies where its input lies; `meta` stands for a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops_cases import VARIANTS, Variant, make
from test_grouped import run as run_grouped
from test_routers import NAMES
from test_routers import case_of as router_case
from test_selection import NAMED
from test_selection import case_of as selection_case

from rotmole.ops import load_balance_loss, router_scores, router_z_loss, select, usage
from rotmole.ops.initial import svd_segments
from rotmole.ops.routing.task_balance import expert_groups, task_balance_loss


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_layer_computes_where_its_input_is(variant: Variant) -> None:
    problem = make(variant, 1, T=4, E=3, K=2, R=4, D=5, O=6)
    elsewhere = problem.map(lambda _, t: t.to("meta"))
    elsewhere.keep_TD = problem.keep_TD.to("meta")
    for options in ({}, {"selection": "dense"}, {"norm_topk_prob": False}):
        elsewhere.route_options = options
        y = elsewhere.leaves().run()
        assert y.device.type == "meta"
        assert y.shape == (4, 6)
        y.sum().backward()


def test_routing_and_balance_compute_where_their_input_is() -> None:
    x, router = torch.randn(6, 5, device="meta"), torch.randn(3, 5, device="meta")
    logits = router_scores("linear", x, {"router_weight": router}, experts=3)
    routing = select(logits, top_k=2)
    mask = torch.ones(6, dtype=torch.bool, device="meta")
    sequence = torch.zeros(6, dtype=torch.long, device="meta")
    found = [
        load_balance_loss(routing.probability_TE, routing.selected_TE),
        load_balance_loss(routing.probability_TE, routing.selected_TE, mask_T=mask),
        load_balance_loss(
            routing.probability_TE, routing.selected_TE, sequence_T=sequence, sequences=2
        ),
        router_z_loss(logits, mask),
        usage(routing.selected_TE, mask),
    ]
    assert all(tensor.device.type == "meta" for tensor in found)


def on_meta(keywords: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}


def test_grouped_experts_compute_where_their_input_is() -> None:
    problem = make(Variant("plane"), 1, T=4, E=3, K=2, R=4, D=5, O=6)
    elsewhere = problem.map(lambda _, t: t.to("meta"))
    elsewhere.keep_TD = problem.keep_TD.to("meta")
    y = run_grouped(elsewhere.leaves())
    assert y.device.type == "meta"
    y.sum().backward()


@NAMED
def test_every_selection_computes_where_its_input_is(options: dict[str, Any]) -> None:
    logits_TE, keywords = selection_case(options, 1)
    routing = select(logits_TE.to("meta"), **on_meta(keywords))
    assert {part.device.type for part in routing} == {"meta"}


@pytest.mark.parametrize("router", NAMES)
def test_every_router_computes_where_its_input_is(router: str) -> None:
    keywords = on_meta(router_case(router, 1))
    keywords["parameters"] = on_meta(keywords["parameters"])
    assert router_scores(**keywords).device.type == "meta"


def test_starts_from_a_spectrum_lie_where_the_weight_is() -> None:
    A, B = svd_segments(torch.randn(8, 6, device="meta"), 2, 3, 1.0)
    assert A.device.type == B.device.type == "meta"


def test_task_balance_computes_where_its_input_is() -> None:
    weight, group = (
        torch.randn(6, 4, device="meta"),
        torch.zeros(2, dtype=torch.long, device="meta"),
    )
    sequence = torch.zeros(6, dtype=torch.long, device="meta")
    loss = task_balance_loss(weight, sequence, group, groups=2, offset=0.1)
    assert loss.device.type == expert_groups(4, 2, group.device).device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_of_a_linear_router_are_the_product_in_at_least_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, router = torch.randn(4, 5, dtype=dtype), torch.randn(3, 5, dtype=dtype)
    wanted = x.double() @ router.double().T
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float64):
        logits = router_scores("linear", x, {"router_weight": router}, experts=3)
    assert logits.dtype == wide
    torch.testing.assert_close(logits, wanted.to(wide), rtol=1e-6, atol=1e-6)
