"""LoRAMoE's localised loss: parity with its twin, where its least lies, and its corners."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_cases import assert_close

from rotmole.ops.reference.balance import task_balance_loss as slow
from rotmole.ops.routing.task_balance import expert_groups
from rotmole.ops.routing.task_balance import task_balance_loss as fast


@given(
    seed=st.integers(0, 10**6),
    N=st.integers(1, 3),
    E=st.integers(2, 5),
    groups=st.integers(1, 2),
    offset=st.sampled_from([0.0, 0.1, 0.7]),
    masked=st.booleans(),
)
def test_value_and_gradient_are_those_of_the_slow_twin(
    seed: int, N: int, E: int, groups: int, offset: float, masked: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    sequence_T = torch.arange(N).repeat_interleave(4)
    weight = torch.rand(4 * N, E, generator=generator, dtype=torch.float64).softmax(-1)
    group_N = torch.randint(0, groups, (N,), generator=generator)
    mask_T = torch.rand(4 * N, generator=generator) > 0.3 if masked else None
    if mask_T is not None:
        mask_T[0] = True  # no token at all has its own test
    results = []
    for loss in (fast, slow):
        leaf = weight.clone().requires_grad_()
        value = loss(leaf, sequence_T, group_N, groups=groups, offset=offset, mask_T=mask_T)
        results.append((value, *torch.autograd.grad(value, leaf)))
    for found, wanted in zip(*results, strict=True):
        assert_close(found, wanted, 1e-10)


def test_the_least_gives_the_own_group_its_share() -> None:
    """At zero loss the own group holds (1 + a)/2 of a sequence, each of its experts alike."""
    a, group_N = 0.4, torch.tensor([0, 1])
    logits = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits.requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        loss = fast(logits.softmax(-1), torch.tensor([0, 1]), group_N, groups=2, offset=a)
        loss.backward()
        optimizer.step()
    assert loss < 1e-6
    share = logits.detach().softmax(-1)
    wanted = torch.tensor([[0.35, 0.35, 0.15, 0.15], [0.15, 0.15, 0.35, 0.35]]).double()
    assert_close(share, wanted, 1e-3)


def test_groups_are_even_and_in_order() -> None:
    assert expert_groups(6, 3).tolist() == [0, 0, 1, 1, 2, 2]
    assert expert_groups(5, 2).tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("tokens", [0, 2])
def test_no_token_gives_zero(tokens: int) -> None:
    weight = torch.full((tokens, 2), 0.5, requires_grad=True)
    mask = torch.zeros(tokens, dtype=torch.bool)
    loss = fast(weight, torch.zeros(tokens, dtype=torch.long), torch.tensor([0]),
                groups=2, offset=0.1, mask_T=mask)  # fmt: skip
    loss.backward()
    assert loss == 0
    assert weight.grad is not None
    assert not weight.grad.any()
