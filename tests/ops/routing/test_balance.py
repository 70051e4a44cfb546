"""Balance losses: 1 when balanced, padding never counts, linear in the split by sequence."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_cases import FAST, assert_close
from torch import Tensor

from rotmole.ops import load_balance_loss, router_z_loss, usage
from rotmole.ops.reference import balance as reference
from rotmole.ops.routing.balance import balance_gradient
from rotmole.ops.routing.selection import Routing, choose


@dataclass
class Batch:
    """T tokens of N sequences in any order, some of them padding."""

    logits_TE: Tensor
    top_k: int
    sequence_T: Tensor
    mask_T: Tensor

    @property
    def routed(self) -> Routing:
        return FAST.route(self.logits_TE, top_k=self.top_k)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    T, E, N = draw(st.integers(1, 9)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    return Batch(
        logits_TE=2 * torch.randn(T, E, generator=generator, dtype=torch.float64),
        top_k=draw(st.integers(1, E)),
        sequence_T=torch.randint(N, (T,), generator=generator),
        mask_T=torch.rand(T, generator=generator) > draw(st.sampled_from([-1, 0.4, 2])),
    )


def loss(batch: Batch, logits_TE: Tensor, room: object = None, **scope: Tensor) -> Tensor:
    routed = FAST.route(logits_TE, top_k=batch.top_k)
    by = load_balance_loss if room is None else reference.load_balance_loss
    return by(routed.probability_TE, routed.selected_TE, **scope)


@given(batch=batches(), per_sequence=st.booleans(), masked=st.booleans())
def test_parity(batch: Batch, per_sequence: bool, masked: bool) -> None:
    scope = {"sequence_T": batch.sequence_T} if per_sequence else {}
    scope |= {"mask_T": batch.mask_T} if masked else {}
    leaf = batch.logits_TE.requires_grad_()
    for fast, slow in (
        (loss(batch, leaf, **scope), loss(batch, leaf, reference, **scope)),
        (
            router_z_loss(leaf, scope.get("mask_T")),
            reference.router_z_loss(leaf, scope.get("mask_T")),
        ),
    ):
        assert fast.shape == ()
        assert_close(fast, slow, 1e-13)
        (found,) = torch.autograd.grad(fast, leaf)
        assert torch.isfinite(found).all()
        wanted = torch.zeros_like(leaf)
        if slow.requires_grad:
            (wanted,) = torch.autograd.grad(slow, leaf)
        assert_close(found, wanted, 1e-12)


@given(
    N=st.integers(0, 3), S=st.integers(1, 4), E=st.integers(1, 5), seed=st.integers(0, 999),
    data=st.data(),
)  # fmt: skip
def test_the_gradient_by_hand_is_autograds(
    N: int, S: int, E: int, seed: int, data: st.DataObject
) -> None:
    """Values and gradient, rows apart or together, padding, one row all padding, all chosen."""
    check_gradient(
        N, S, E, seed,
        top_k=data.draw(st.integers(1, E)), dense=data.draw(st.booleans()),
        apart=data.draw(st.booleans()), masked=data.draw(st.booleans()),
        first=data.draw(st.sampled_from([0, 1])),
        weights=data.draw(st.sampled_from([(0.7, 0.3), (0.7, 0.0), (0.0, 0.3)])),
    )  # fmt: skip


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_the_gradient_by_hand_of_a_batch_of_every_kind(apart: bool, masked: bool) -> None:
    check_gradient(
        3, 4, 5, 0, top_k=2, dense=False, apart=apart, masked=masked, first=1, weights=(0.7, 0.3)
    )


def check_gradient(
    N: int, S: int, E: int, seed: int, *,
    top_k: int, dense: bool, apart: bool, masked: bool, first: int, weights: tuple[float, float],
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    logits_TE = 2 * torch.randn(N * S, E, generator=generator, dtype=torch.float64)
    logits_TE.requires_grad_()
    mask_T = None
    if masked:
        mask_T = torch.randint(2, (N * S,), generator=generator)
        mask_T[:S] *= first
    balance, z = weights
    routed = FAST.route(logits_TE, top_k=top_k, selection="dense" if dense else "top_k")
    index_KT = choose(
        logits_TE.detach().mT, top_k=top_k, selection="dense" if dense else "top_k",
        norm_topk_prob=True,
    ).index_KT  # fmt: skip
    found = balance_gradient(
        logits_TE.detach().mT, None if index_KT is None else index_KT.to(torch.uint8),
        sequences=N if apart else 1, balance=balance, z=z, mask_T=mask_T,
    )  # fmt: skip
    row_T = torch.arange(N).repeat_interleave(S) if apart else torch.zeros(N * S, dtype=torch.long)
    slow_balance = reference.load_balance_loss(
        routed.probability_TE, routed.selected_TE, sequence_T=row_T, mask_T=mask_T
    )
    slow_z = reference.router_z_loss(logits_TE, mask_T)
    tokens = N * S if mask_T is None else int(mask_T.sum())
    assert found.tokens == tokens
    assert_close(found.balance, slow_balance * tokens, 1e-13)
    assert_close(found.z, slow_z * tokens, 1e-13)
    wanted = torch.zeros_like(logits_TE)
    loss = balance * slow_balance + z * slow_z
    if loss.requires_grad:
        (wanted,) = torch.autograd.grad(loss, logits_TE)
    assert_close(found.logits_ET.mT, wanted, 1e-12)


@given(E=st.integers(1, 6), rounds=st.integers(1, 3), seed=st.integers(0, 999), data=st.data())
def test_uniform_use_gives_one_for_every_top_k(
    E: int, rounds: int, seed: int, data: st.DataObject
) -> None:
    """Whatever the probabilities, if each expert is chosen alike; and the other way round."""
    top_k = data.draw(st.integers(1, E))
    turn = torch.arange(E).unsqueeze(1) + torch.arange(top_k)
    selected_TE = torch.zeros(E, E, dtype=torch.bool).scatter(1, turn % E, True).repeat(rounds, 1)
    generator = torch.Generator().manual_seed(seed)
    p_TE = torch.rand(E * rounds, E, generator=generator, dtype=torch.float64).softmax(-1)
    uniform_TE = torch.full_like(p_TE, 1 / E)
    one = torch.ones((), dtype=torch.float64)
    assert_close(load_balance_loss(p_TE, selected_TE), one, 1e-14)
    anything_TE = FAST.route(p_TE, top_k=top_k).selected_TE
    assert_close(load_balance_loss(uniform_TE, anything_TE), one, 1e-14)
    assert_close(usage(selected_TE).double(), torch.full((E,), 1 / E).double(), 1e-6)


@given(E=st.integers(2, 6), T=st.integers(1, 5))
def test_collapse_on_one_expert_gives_the_number_of_experts(E: int, T: int) -> None:
    p_TE = torch.eye(E, dtype=torch.float64)[:1].repeat(T, 1)
    assert_close(load_balance_loss(p_TE, p_TE.bool()), torch.tensor(float(E)).double(), 1e-14)


@given(batch=batches(), seed=st.integers(0, 999))
def test_padding_never_counts(batch: Batch, seed: int) -> None:
    """Other numbers in padded rows, or no padded rows at all, give the same; no gradient there."""
    mask_T = batch.mask_T
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch.logits_TE.shape, generator=generator, dtype=torch.float64) * 9
    other_TE = torch.where(mask_T[:, None], batch.logits_TE, noise)
    for scope in ({}, {"sequence_T": batch.sequence_T}):
        cut = {name: t[mask_T] for name, t in scope.items()}
        leaf = batch.logits_TE.clone().requires_grad_()
        found = loss(batch, leaf, mask_T=mask_T, **scope)
        assert_close(loss(batch, other_TE, mask_T=mask_T, **scope), found, 1e-13)
        assert_close(loss(batch, leaf[mask_T], **cut), found, 1e-13)
        assert_close(loss(batch, leaf, mask_T=mask_T.long(), **scope), found, 1e-15)
        assert not torch.autograd.grad(found, leaf)[0][~mask_T].any()
    assert_close(router_z_loss(other_TE, mask_T), router_z_loss(batch.logits_TE[mask_T]), 1e-13)
    routed = batch.routed
    assert torch.equal(usage(routed.selected_TE, mask_T), usage(routed.selected_TE[mask_T]))


@given(batch=batches())
def test_sequence_scope_is_linear_in_the_split(batch: Batch) -> None:
    """The batch's loss is the mean over its sequences, weighted by their unpadded tokens."""
    mask_T, ids_T = batch.mask_T, batch.sequence_T
    whole = loss(batch, batch.logits_TE, sequence_T=ids_T, mask_T=mask_T)
    parts = torch.zeros((), dtype=torch.float64)
    for n in ids_T.unique():
        of_n = ids_T == n
        part = loss(batch, batch.logits_TE[of_n], mask_T=mask_T[of_n])
        parts += part * mask_T[of_n].sum() / mask_T.sum().clamp(min=1)
    assert_close(whole, parts, 1e-13)


def test_micro_batch_scope_is_not_linear_in_the_split() -> None:
    """Two tokens that chose different experts are balanced together and collapsed apart."""
    p_TE = torch.eye(2, dtype=torch.float64)
    apart = [load_balance_loss(p_TE[t : t + 1], p_TE[t : t + 1].bool()) for t in range(2)]
    assert float(load_balance_loss(p_TE, p_TE.bool())) == 1
    assert [float(part) for part in apart] == [2, 2]


@given(batch=batches())
def test_order_of_tokens_and_experts(batch: Batch) -> None:
    whole = loss(batch, batch.logits_TE, sequence_T=batch.sequence_T, mask_T=batch.mask_T)
    turned = loss(
        batch,
        batch.logits_TE.flip(0, 1),
        sequence_T=batch.sequence_T.flip(0),
        mask_T=batch.mask_T.flip(0),
    )
    assert_close(turned, whole, 1e-13)


@given(batch=batches())
def test_usage(batch: Batch) -> None:
    """Shares of the choices made: they sum to 1 unless no token counts."""
    share_E = usage(batch.routed.selected_TE, batch.mask_T)
    counted = [
        sum(
            bool(batch.routed.selected_TE[t, e] and batch.mask_T[t])
            for t in range(len(batch.mask_T))
        )
        for e in range(batch.logits_TE.shape[1])
    ]
    wanted = torch.tensor(counted) / max(1, sum(counted))
    assert_close(share_E.double(), wanted.double(), 1e-6)


def test_no_token_gives_zero_and_a_zero_gradient() -> None:
    for T, mask_T in ((0, None), (3, torch.zeros(3, dtype=torch.bool))):
        leaf = torch.zeros(T, 2).requires_grad_()
        for scope in ({}, {"sequence_T": torch.zeros(T, dtype=torch.long)}):
            routed = FAST.route(leaf, top_k=1)
            value = load_balance_loss(
                routed.probability_TE, routed.selected_TE, mask_T=mask_T, **scope
            ) + router_z_loss(leaf, mask_T)
            assert float(value.detach()) == 0
            assert not torch.autograd.grad(value, leaf)[0].any()
        assert not usage(routed.selected_TE, mask_T).any()
