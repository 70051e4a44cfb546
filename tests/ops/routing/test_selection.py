"""Selections: which experts, with what weight; the laws of each, and the slow twin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import assert_close
from torch import Tensor
from torch.autograd import gradcheck

from rotmole.ops import select
from rotmole.ops.reference import routing as reference_routing
from rotmole.ops.routing.threshold import threshold_of

seeds = st.integers(0, 2**32 - 1)

# Every selection with every setting that means something to it.
OPTIONS: list[dict[str, Any]] = [
    {"scoring": "sigmoid"},
    {"scoring": "sigmoid", "norm_topk_prob": False},
    {"bias": True},
    {"bias": True, "scoring": "sigmoid"},
    {"bias": True, "norm_topk_prob": False},
    {"selection": "dense", "scoring": "sigmoid"},
    {"selection": "dense", "scoring": "sigmoid", "norm_topk_prob": False},
    {"selection": "top_p"},
    {"selection": "top_p", "norm_topk_prob": False},
    {"selection": "threshold"},
    {"selection": "threshold", "norm_topk_prob": False},
    {"selection": "expert_choice"},
    {"weight": "mean"},
    {"weight": "one", "bias": True},
]
NAMED = pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items())
)
PER_TOKEN = [o for o in OPTIONS if o.get("selection") != "expert_choice"]


def case_of(
    options: dict[str, Any], seed: int, *, N: int = 2, S: int = 3, E: int = 4, ties: bool = False
) -> tuple[Tensor, dict[str, Any]]:
    """Logits [N S, E] and the keywords of select; tau is a tensor of its own."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = 2 * torch.randn(N * S, E, generator=generator, dtype=torch.float64)
    keywords = {k: v for k, v in options.items() if k != "bias"}
    keywords["top_k"] = 1 + seed % E
    keywords["top_p"] = 0.05 + 0.9 * float(torch.rand((), generator=generator))
    if options.get("bias"):
        keywords["bias_E"] = torch.randn(E, generator=generator)
    if options.get("selection") == "threshold":
        keywords["tau_T1"] = torch.rand(N * S, 1, generator=generator, dtype=torch.float64) / E
    if options.get("selection") == "expert_choice":
        mask = torch.rand(N * S, generator=generator) > 0.3
        keywords |= {"sequences": N, "mask_T": mask}
    return logits_TE.round() if ties else logits_TE, keywords


@NAMED
@pytest.mark.parametrize("ties", [False, True])
@settings(max_examples=30)
@given(seed=seeds, E=st.integers(1, 5), S=st.integers(1, 4))
def test_parity(options: dict[str, Any], ties: bool, seed: int, E: int, S: int) -> None:
    logits_TE, keywords = case_of(options, seed, S=S, E=E, ties=ties)
    results, gradients = [], []
    for by in (select, reference_routing.select):
        leaves = [logits_TE.clone().requires_grad_()]
        if "tau_T1" in keywords:
            leaves.append(keywords["tau_T1"].clone().requires_grad_())
            keywords = keywords | {"tau_T1": leaves[1]}
        result = by(leaves[0], **keywords)
        probe = torch.arange(logits_TE.numel()).double().cos().reshape(logits_TE.shape)
        loss = (result.weight_TE * probe).sum() + (result.probability_TE * probe.sin()).sum()
        if loss.requires_grad:
            gradients.append(torch.autograd.grad(loss, leaves, allow_unused=True))
        results.append(result)
    fast, slow = results
    assert torch.equal(fast.selected_TE, slow.selected_TE)
    assert_close(fast.weight_TE, slow.weight_TE, 1e-12)
    assert_close(fast.probability_TE, slow.probability_TE, 1e-13)
    for found, wanted in zip(*gradients, strict=True) if gradients else ():
        assert_close(found, wanted, 1e-7 if "tau_T1" in keywords else 1e-11)


@NAMED
@settings(max_examples=30)
@given(seed=seeds, E=st.integers(1, 6))
def test_weights(options: dict[str, Any], seed: int, E: int) -> None:
    """Exactly zero where not selected, never negative, sum one where that is promised."""
    logits_TE, keywords = case_of(options, seed, E=E)
    routing = select(logits_TE, **keywords)
    assert not routing.weight_TE[~routing.selected_TE].any()
    assert (routing.weight_TE >= 0).all()
    total_T = routing.weight_TE.sum(-1)
    normed = keywords.get("norm_topk_prob", True) and keywords.get("weight") != "one"
    if options.get("selection") == "expert_choice":
        assert (total_T <= 1 + 1e-12).all()
    elif normed:
        assert_close(total_T, torch.ones_like(total_T), 1e-12)
    if keywords.get("weight") == "one":
        assert_close(total_T, torch.full_like(total_T, keywords["top_k"]), 1e-12)


@NAMED
@settings(max_examples=20)
@given(order=st.permutations(range(4)), seed=seeds)
def test_order_of_experts(options: dict[str, Any], order: list[int], seed: int) -> None:
    logits_TE, keywords = case_of(options, seed)
    moved = dict(keywords)
    if "bias_E" in moved:
        moved["bias_E"] = moved["bias_E"][order]
    found, wanted = select(logits_TE[:, order], **moved), select(logits_TE, **keywords)
    assert torch.equal(found.selected_TE, wanted.selected_TE[:, order])
    assert_close(found.weight_TE, wanted.weight_TE[:, order], 1e-12)


@pytest.mark.parametrize("options", PER_TOKEN, ids=str)
@settings(max_examples=20)
@given(order=st.permutations(range(6)), seed=seeds)
def test_tokens_do_not_see_each_other(options: dict[str, Any], order: list[int], seed: int) -> None:
    logits_TE, keywords = case_of(options, seed)
    some, fewer = order[:3], dict(keywords)
    if "tau_T1" in fewer:
        fewer["tau_T1"] = fewer["tau_T1"][some]
    found, wanted = select(logits_TE[some], **fewer), select(logits_TE, **keywords)
    assert torch.equal(found.selected_TE, wanted.selected_TE[some])
    assert_close(found.weight_TE, wanted.weight_TE[some], 1e-14)
    assert_close(found.probability_TE, wanted.probability_TE[some], 1e-14)


@NAMED
def test_gradcheck(options: dict[str, Any]) -> None:
    logits_TE, keywords = case_of(options, 11, S=2, E=3)
    leaves = [logits_TE.requires_grad_()]
    if "tau_T1" in keywords:
        leaves.append(keywords.pop("tau_T1").requires_grad_())

    def weights(logits: Tensor, *tau: Tensor) -> tuple[Tensor, ...]:
        routing = select(logits, **keywords, tau_T1=tau[0] if tau else None)
        found = (routing.weight_TE, routing.probability_TE)
        return tuple(t for t in found if t.requires_grad)

    if "weight" in keywords:
        assert weights(*leaves) == ()  # constant weights: nothing to learn
    else:
        assert gradcheck(weights, tuple(leaves))


@NAMED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_huge_and_half_logits(options: dict[str, Any], dtype: torch.dtype) -> None:
    """At least float32, also under autocast; large scores give no NaN; ties go to the first."""
    _, keywords = case_of(options, 8, N=1, S=2)
    logits_TE = torch.tensor([[3e4, -3e4, 1.0, 0], [6e4, 6e4, 6e4, 6e4]], dtype=dtype)
    if "tau_T1" in keywords:
        keywords["tau_T1"] = keywords["tau_T1"].float()
    logits_TE.requires_grad_()
    outside = select(logits_TE, **keywords)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = select(logits_TE, **keywords)
    for found, wanted in zip(inside, outside, strict=True):
        assert torch.equal(found, wanted)
    assert outside.weight_TE.dtype == torch.float32
    assert torch.isfinite(outside.weight_TE).all()
    if outside.weight_TE.requires_grad:
        (gradient,) = torch.autograd.grad(outside.weight_TE.square().sum(), logits_TE)
        assert torch.isfinite(gradient).all()


@given(E=st.integers(1, 70), data=st.data())
def test_of_equal_scores_the_first_win(E: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, E))
    zero = torch.zeros(2, E)
    first = torch.arange(E).expand(2, E) < top_k
    for options in ({"scoring": "sigmoid"}, {"bias_E": torch.ones(E)}, {"weight": "mean"}):
        assert torch.equal(select(zero, top_k=top_k, **options).selected_TE, first)
    wanted = select(zero, selection="top_p", top_p=(top_k - 0.5) / E).selected_TE
    assert torch.equal(wanted, first)
    chosen = select(torch.zeros(E, 2), selection="expert_choice", top_k=1).selected_TE
    taken = max(1, E // 2)
    assert chosen[:taken].all()
    assert not chosen[taken:].any()


@given(seed=seeds)
def test_one_normalised_sigmoid_expert_has_no_gradient_at_all(seed: int) -> None:
    logits_TE = case_of({}, seed)[0].requires_grad_()
    weight_TE = select(logits_TE, top_k=1, scoring="sigmoid").weight_TE
    (gradient,) = torch.autograd.grad((weight_TE * torch.randn(6, 4).double()).sum(), logits_TE)
    assert not gradient.any()


@given(seed=seeds, E=st.integers(1, 6))
def test_top_p_takes_the_fewest_experts_that_have_the_mass(seed: int, E: int) -> None:
    logits_TE, keywords = case_of({"selection": "top_p"}, seed, E=E)
    routing, p = select(logits_TE, **keywords), keywords["top_p"]
    mass_T = (routing.probability_TE * routing.selected_TE).sum(-1)
    least_T = routing.probability_TE.masked_fill(~routing.selected_TE, torch.inf).amin(-1)
    left_T = routing.probability_TE.masked_fill(routing.selected_TE, -torch.inf).amax(-1)
    assert (mass_T >= p - 1e-12).all()
    assert (mass_T - least_T < p + 1e-12).all()
    assert (left_T <= least_T).all()
    everything = select(logits_TE, selection="top_p", top_p=1.0)
    missing_T = 1 - (everything.probability_TE * everything.selected_TE).sum(-1)
    assert (missing_T <= 1e-12).all()


def test_top_p_ends_where_the_mass_is_just_reached() -> None:
    """Four equal experts and p = 1/2: the first two, by both paths."""
    logits_TE = torch.zeros(1, 4, dtype=torch.float64)
    for by in (select, reference_routing.select):
        routing = by(logits_TE, selection="top_p", top_p=0.5)
        assert routing.selected_TE.tolist() == [[True, True, False, False]]


@given(seed=seeds, E=st.integers(1, 6))
def test_threshold(seed: int, E: int) -> None:
    """Selected are those at or above tau <= 1/E, so at least one; g is the surplus over its sum."""
    logits_TE, keywords = case_of({"selection": "threshold"}, seed, E=E)
    routing, tau_T1 = select(logits_TE, **keywords), keywords["tau_T1"]
    assert torch.equal(routing.selected_TE, routing.probability_TE >= tau_T1)
    assert routing.selected_TE.any(-1).all()
    surplus_TE = (routing.probability_TE - tau_T1) * routing.selected_TE
    assert_close(routing.weight_TE * surplus_TE.sum(-1, keepdim=True), surplus_TE, 1e-12)


def test_nothing_above_the_threshold_gives_zero_weights_and_gradients() -> None:
    logits_TE = torch.zeros(1, 4, requires_grad=True)
    tau_T1 = torch.full((1, 1), 0.25, requires_grad=True)
    routing = select(logits_TE, selection="threshold", tau_T1=tau_T1)
    assert routing.selected_TE.all()  # p equals tau: at the edge, with nothing to share out
    routing.weight_TE.square().sum().backward()
    for zero in (routing.weight_TE, logits_TE.grad, tau_T1.grad):
        assert not zero.any()


@given(seed=seeds, E=st.integers(1, 9))
def test_tau_lies_below_one_over_E(seed: int, E: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_TD, w, b = (torch.randn(*s, generator=generator).double() for s in ((3, 2), (1, 2), (1,)))
    tau_T1 = threshold_of(x_TD, w, b, experts=E)
    assert ((tau_T1 > 0) & (tau_T1 < 1 / E)).all()
    assert_close(tau_T1, reference_routing.threshold_of(x_TD, w, b, experts=E), 1e-14)


@given(seed=seeds, data=st.data())
def test_expert_choice_does_not_depend_on_the_batch(seed: int, data: st.DataObject) -> None:
    """A sequence alone, among others, and padded left or right: the same choices, bit for bit."""
    E, c = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    c = min(c, E)
    lengths = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    longest, left = max(lengths), data.draw(st.booleans())
    generator = torch.Generator().manual_seed(seed)
    rows, masks, alone = [], [], []
    for length in lengths:
        logits = torch.randn(length, E, generator=generator, dtype=torch.float64)
        alone.append(select(logits, selection="expert_choice", top_k=c))
        pad = torch.randn(longest - length, E, generator=generator, dtype=torch.float64) + 9
        rows += [pad, logits] if left else [logits, pad]
        ones = torch.ones(length)
        masks += [torch.zeros(len(pad)), ones] if left else [ones, torch.zeros(len(pad))]
    mask_T = torch.cat(masks).bool()
    together = select(
        torch.cat(rows), selection="expert_choice", top_k=c, sequences=len(lengths), mask_T=mask_T
    )
    assert not together.selected_TE[~mask_T].any()
    assert torch.equal(together.weight_TE[mask_T], torch.cat([r.weight_TE for r in alone]))
    for length, routing in zip(lengths, alone, strict=True):
        assert (routing.selected_TE.sum(0) == max(1, c * length // E)).all()
        p, S = routing.probability_TE, routing.selected_TE
        least_E = p.masked_fill(~S, torch.inf).amin(0)
        assert (p.masked_fill(S, -torch.inf).amax(0) <= least_E).all()


def test_expert_choice_of_nothing() -> None:
    routing = select(torch.zeros(0, 3), selection="expert_choice", top_k=1, sequences=0)
    assert routing.weight_TE.shape == (0, 3)
    padding = torch.zeros(4, dtype=torch.bool)
    routing = select(torch.zeros(4, 3), selection="expert_choice", top_k=1, mask_T=padding)
    assert not routing.weight_TE.any()


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@given(seed=seeds)
def test_the_bias_moves_the_selection_and_nothing_else(scoring: str, seed: int) -> None:
    """A bias as large as all scores decides alone; weights are those without any bias."""
    logits_TE, _ = case_of({}, seed)
    bias_E = torch.tensor([0.0, 3, 0, 3])
    routing = select(logits_TE, top_k=2, scoring=scoring, bias_E=bias_E)
    assert torch.equal(routing.selected_TE, (bias_E > 0).expand(6, 4))
    score = torch.softmax(logits_TE, -1) if scoring == "softmax" else torch.sigmoid(logits_TE)
    kept = score * routing.selected_TE
    assert_close(routing.weight_TE, kept / kept.sum(-1, keepdim=True), 1e-13)
    zero = select(logits_TE, top_k=2, scoring=scoring, bias_E=torch.zeros(4))
    assert torch.equal(zero.selected_TE, select(logits_TE, top_k=2, scoring=scoring).selected_TE)


def test_what_is_not_defined_is_refused() -> None:
    logits_TE = torch.zeros(2, 3)
    for settings_ in (
        {"selection": "best"},
        {"selection": "top_p", "scoring": "sigmoid"},
        {"scoring": "relu"},
    ):
        with pytest.raises(ValueError, match="not defined"):
            select(logits_TE, **settings_)
    for selection in ("top_k", "expert_choice"):
        with pytest.raises(ValueError, match="top_k is 4"):
            select(logits_TE, selection=selection, scoring="softmax", top_k=4)
