"""The scaling gate: which experts, with what weight, and what its gradient is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_cases import FAST, assert_close, reference
from torch import Tensor

from rotmole.ops.routing.selection import choose, select, spread_chosen, top_k_of

seeds = st.integers(0, 2**32 - 1)
OPTIONS = [{}, {"norm_topk_prob": False}, {"selection": "dense"}]


@st.composite
def scores(draw: st.DrawFn, ties: bool = False) -> tuple[Tensor, int]:
    """Logits [T, E] and a top_k; with ties, small whole numbers."""
    T, E = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(seeds))
    logits_TE = 2 * torch.randn(T, E, generator=generator, dtype=torch.float64)
    return logits_TE.round() if ties else logits_TE, draw(st.integers(1, E))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@given(data=st.data())
def test_parity(options: dict[str, object], ties: bool, data: st.DataObject) -> None:
    logits_TE, top_k = data.draw(scores(ties=ties))
    gradients = []
    results = []
    for side in (FAST, reference):
        leaf = logits_TE.clone().requires_grad_()
        result = side.route(leaf, top_k=top_k, **options)
        probe = torch.arange(leaf.numel(), dtype=leaf.dtype).cos().reshape(leaf.shape)
        loss = (result.weight_TE * probe).sum() + (result.probability_TE * probe.sin()).sum()
        gradients.append(torch.autograd.grad(loss, leaf)[0])
        results.append(result)
    fast, slow = results
    assert torch.equal(fast.selected_TE, slow.selected_TE)
    assert_close(fast.weight_TE, slow.weight_TE, 1e-14)
    assert_close(fast.probability_TE, slow.probability_TE, 1e-14)
    assert_close(gradients[0], gradients[1], 1e-13)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@given(data=st.data())
def test_choosing_is_routing(options: dict[str, object], ties: bool, data: st.DataObject) -> None:
    """In fewer operations; of equal logits the first win here too, best first."""
    logits_TE, top_k = data.draw(scores(ties=ties))
    experts = logits_TE.shape[1]
    routed = select(logits_TE, top_k=top_k, **options)
    chosen = choose(
        logits_TE.mT.contiguous(),
        top_k=top_k,
        **({"selection": "top_k", "norm_topk_prob": True} | options),
    )
    weight_ET = spread_chosen(chosen.weight_KT, chosen.index_KT, experts)
    assert_close(weight_ET.mT, routed.weight_TE, 1e-14)
    assert torch.equal(weight_ET.mT != 0, routed.weight_TE != 0)
    assert (chosen.index_KT is None) == ("selection" in options)
    assert (chosen.probability_ET is None) == ("norm_topk_prob" not in options)
    if chosen.index_KT is not None:
        assert chosen.index_KT.shape == (top_k, len(logits_TE))
        assert (chosen.weight_KT.diff(dim=0) <= 0).all()
    if chosen.probability_ET is not None:
        assert_close(chosen.probability_ET.mT, routed.probability_TE, 1e-14)


@given(case=scores(ties=True))
def test_weights(case: tuple[Tensor, int]) -> None:
    """K selected, zero elsewhere, sum 1; without renormalising p itself."""
    logits_TE, top_k = case
    normed = select(logits_TE, top_k=top_k)
    raw = select(logits_TE, top_k=top_k, norm_topk_prob=False)
    assert (normed.selected_TE.sum(-1) == top_k).all()
    for result in (normed, raw):
        assert not result.weight_TE[~result.selected_TE].any()
        assert (result.weight_TE[result.selected_TE] > 0).all()
        assert_close(result.probability_TE, torch.softmax(logits_TE, -1), 1e-15)
    assert_close(normed.weight_TE.sum(-1), torch.ones(len(logits_TE)).double(), 1e-14)
    assert torch.equal(raw.weight_TE, raw.probability_TE * raw.selected_TE)
    renormalised = raw.weight_TE / raw.weight_TE.sum(-1, keepdim=True)
    assert_close(normed.weight_TE, renormalised, 1e-14, "softmax, top-K, renormalise")
    worst = logits_TE.masked_fill(~normed.selected_TE, torch.inf).amin(-1)
    assert (logits_TE.masked_fill(normed.selected_TE, -torch.inf).amax(-1) <= worst).all()


@given(case=scores())
def test_a_single_renormalised_expert_has_no_gradient_at_all(case: tuple[Tensor, int]) -> None:
    """Not even rounding noise: Adam would turn it into a random walk."""
    logits_TE = case[0].requires_grad_()
    weight_TE = select(logits_TE, top_k=1).weight_TE
    assert set(weight_TE.unique().tolist()) <= {0.0, 1.0}
    probe = torch.arange(weight_TE.numel(), dtype=weight_TE.dtype).cos().reshape(weight_TE.shape)
    (gradient,) = torch.autograd.grad((weight_TE * probe).sum(), logits_TE)
    assert not gradient.any()


@given(T=st.integers(1, 5), E=st.integers(1, 70), data=st.data())
def test_of_equal_logits_the_first_experts_win(T: int, E: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, E))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    selected_TE = select(torch.zeros(T, E, dtype=dtype), top_k=top_k).selected_TE
    assert selected_TE[:, :top_k].all()
    assert not selected_TE[:, top_k:].any()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_huge_and_half_logits(options: dict[str, object], dtype: torch.dtype) -> None:
    """Computed in at least float32, also under autocast; large scores give no NaN."""
    logits_TE = torch.tensor([[3e4, -3e4, 1.0, 0], [6e4, 6e4, 6e4, 6e4]], dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = select(logits_TE.requires_grad_(), top_k=2, **options)
    outside = select(logits_TE, top_k=2, **options)
    for found, wanted in zip(inside, outside, strict=True):
        assert torch.equal(found, wanted)
    assert inside.weight_TE.dtype == torch.float32
    assert inside.probability_TE.dtype == torch.float32
    assert torch.isfinite(inside.weight_TE).all()
    (gradient,) = torch.autograd.grad(inside.weight_TE.square().sum(), logits_TE)
    assert torch.isfinite(gradient).all()


@given(case=scores(), shift=st.floats(-50, 50))
def test_adding_a_number_to_all_logits_changes_nothing(
    case: tuple[Tensor, int], shift: float
) -> None:
    logits_TE, top_k = case
    found, wanted = (select(x, top_k=top_k) for x in (logits_TE + shift, logits_TE))
    assert_close(found.weight_TE, wanted.weight_TE, 1e-12)


@pytest.mark.parametrize("top_k", [0, 4, -1])
def test_top_k_out_of_range_is_refused(top_k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k is {top_k}"):
        select(torch.zeros(2, 3), top_k=top_k)


def test_an_unknown_selection_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k, dense"):
        select(torch.zeros(2, 3), top_k=1, selection="best")


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_the_largest_are_the_first_of_a_stable_order(top_k: int) -> None:
    """All 81 ways in which four scores of three values can tie."""
    score_TE = torch.cartesian_prod(*[torch.arange(3.0)] * 4)
    first_TK = torch.sort(score_TE, dim=-1, descending=True, stable=True).indices[:, :top_k]
    assert torch.equal(top_k_of(score_TE.T, top_k)[1].T, first_TK)
