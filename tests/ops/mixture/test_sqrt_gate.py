"""The sqrt-gate: the forward pass of the plain mixture, every gradient that of its slow twin."""

from __future__ import annotations

import pytest
import torch
from ops_cases import VARIANTS, Variant, assert_close, fast_mixture, gradients, make

from rotmole.ops.mixture.sqrt_gate import combine_sqrt_gate as fast
from rotmole.ops.reference.products import combine_sqrt_gate as slow
from rotmole.ops.rotation.table import ROTATIONS
from rotmole.ops.routing.selection import select

WITHIN = [v for v in VARIANTS if ROTATIONS[v.rotation].kind != "output"]


def _parts(E: int = 3, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weight_TE = torch.softmax(normal(5, E), -1)
    weight_TE[:, 1] *= weight_TE[:, 1] > 0.3  # some are not selected
    return [t.requires_grad_() for t in (weight_TE, normal(5, E, 4), normal(E, 4, 6))]


def test_every_gradient_is_that_of_the_slow_twin() -> None:
    probe = torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, wanted = [], []
    for seed in range(5):
        for run, kept in ((fast, found), (slow, wanted)):
            parts = _parts(seed=seed)
            y = run(*parts, scale=1.7)
            kept += [y, *torch.autograd.grad((y * probe).sum(), parts)]
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs, 1e-12)


def test_each_gradient_alone_and_an_unselected_expert_has_zero() -> None:
    for which in range(3):
        parts = _parts()
        together = torch.autograd.grad(fast(*parts, scale=0.5).sum(), parts)
        alone = [p.detach().requires_grad_(i == which) for i, p in enumerate(parts)]
        (found,) = torch.autograd.grad(fast(*alone, scale=0.5).sum(), alone[which])
        assert torch.equal(found, together[which])
        weight = parts[0].detach()
        assert not together[1][weight == 0].any()  # sqrt(0) is no singular point


@pytest.mark.parametrize("variant", WITHIN, ids=str)
def test_in_the_mixture_only_the_backward_pass_changes(variant: Variant) -> None:
    problem = make(variant, 3, T=5, E=3, K=2, D=5, O=6).leaves()

    def run(sqrt_gate: bool) -> torch.Tensor:
        weight_TE = select(problem.logits_TE, top_k=2).weight_TE
        return fast_mixture(
            problem.x_TD, problem.dropped_TD, weight_TE, problem.A_ERD, problem.B_ERO,
            problem.gates, rotation=variant.rotation, scale=problem.scale,
            router_sqrt_gate=sqrt_gate, logits_TE=problem.logits_TE, **dict(variant.options),
        )  # fmt: skip

    assert torch.equal(run(True), run(False))

    def twin(p: object) -> torch.Tensor:
        weight_TE = select(problem.logits_TE, top_k=2).weight_TE
        _, turned_TER = problem.rotated()
        return slow(weight_TE, turned_TER, problem.B_ERO, scale=problem.scale)

    ours, theirs = gradients(problem, lambda p: run(True)), gradients(problem, twin)
    plain = gradients(problem, lambda p: run(False))
    for name, wanted in theirs.items():
        assert wanted is not None, name
        assert_close(ours[name], wanted, 1e-11, name)
    if not variant.reads_logits:  # there the rotation's gradient arrives at the logits too
        assert_close(ours["logits"], plain["logits"], 1e-12, "the gate's own gradient")
    assert (ours["B"] - plain["B"]).abs().max() > 1e-3


def test_half_types_keep_their_type_and_second_derivatives_are_refused() -> None:
    parts = [p.detach().float().requires_grad_() for p in _parts()]
    B = parts[2].detach().bfloat16().requires_grad_()
    y = fast(parts[0], parts[1], B, scale=1.0)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert B.grad is not None
    assert B.grad.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fast(*parts, scale=1.0)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert parts[2].grad is not None
    assert parts[2].grad.dtype == torch.float32
    (first,) = torch.autograd.grad(
        fast(*parts, scale=1.0).square().sum(), parts[1], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
