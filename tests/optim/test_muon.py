"""Muon on stacks of experts: torch's own expert by expert, AdamW for all else."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny
from rotmole import ConfigError, RotMoleConfig
from rotmole.optim import Muon, parameter_groups
from rotmole.optim.muon import orthogonalised
from rotmole.optim.riemannian import expert_modules

LR, DECAY = 1e-2, 0.1


def adapted(**extra: object) -> torch.nn.Module:
    fields = {"r": 3, "num_experts": 3, "target_modules": ["q_proj", "down_proj"]}
    config = RotMoleConfig(**(fields | {"init_weights": False} | extra))
    return get_peft_model(tiny.llama(), config)


def backward(model: torch.nn.Module, seed: int) -> None:
    ids = tiny.tokens(2, 6, seed)
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize("shape", [(4, 3, 20), (4, 20, 3), (1, 6, 6)])
def test_orthogonalised_keeps_the_singular_vectors_of_each_matrix(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    U, _, Vt = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.linspace(0.5, 2.0, U.shape[-1]) * torch.tensor([1e-4, 1.0, 9.0, 1e3])[:, None]
    matrix = U @ torch.diag_embed(values[: shape[0]]) @ Vt
    found = U.mT @ orthogonalised(matrix).float() @ Vt.mT
    assert (found.diagonal(dim1=-2, dim2=-1) - 1).abs().max() < 0.4
    assert (found - torch.diag_embed(found.diagonal(dim1=-2, dim2=-1))).abs().max() < 0.03
    assert not orthogonalised(torch.zeros(shape)).any()


@pytest.mark.parametrize("extra", [{}, {"share_A": True}, {"frozen": "A"}], ids=str)
def test_experts_are_stepped_as_by_torchs_muon_and_all_else_as_by_adamw(
    extra: dict[str, object],
) -> None:
    model = adapted(**extra)
    groups = parameter_groups(model, lr=LR, rotation_gate_lr=LR / 4, weight_decay=DECAY)
    optimizer = Muon(groups, model=model, betas=(0.8, 0.9))
    modules = expert_modules(model)
    factors = {id(p): p for m in modules for p in (m.expert_A, m.expert_B) if p.requires_grad}
    copies = {p: torch.nn.Parameter(p.detach().clone()) for g in groups for p in g["params"]}
    singles = {p: [torch.nn.Parameter(one.detach().clone()) for one in p] for p in factors.values()}
    flat = [single for group in singles.values() for single in group]
    muon = torch.optim.Muon(flat, lr=LR, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    rest = [
        g | {"params": [copies[p] for p in g["params"] if id(p) not in factors]} for g in groups
    ]
    adamw = torch.optim.AdamW(rest, betas=(0.8, 0.9))
    for step in range(4):
        backward(model, step)
        for p, copy in copies.items():
            copy.grad = p.grad.clone()
        for p, stack in singles.items():
            for single, grad in zip(stack, p.grad, strict=True):
                single.grad = grad.clone() if grad.any() else None
        gradients = {p: p.grad.clone() for p in copies}
        for one in (optimizer, muon, adamw):
            one.step()
        for p, copy in copies.items():
            assert torch.equal(p.grad, gradients[p])
            wanted = torch.stack(list(singles[p])) if id(p) in factors else copy
            # bfloat16 rounds products of a stack and of one matrix differently
            tolerance = 0.02 * LR * (step + 1) if id(p) in factors else 0.0
            torch.testing.assert_close(p, wanted, rtol=0, atol=tolerance)


def test_an_expert_without_a_gradient_is_left_as_it_is() -> None:
    """Its old momentum, made orthogonal, would go on moving it as fast as ever."""
    model = adapted()
    optimizer = Muon(parameter_groups(model, lr=LR, weight_decay=DECAY), model=model)
    backward(model, 0)
    optimizer.step()
    backward(model, 1)
    A = expert_modules(model)[0].expert_A
    A.grad[1] = 0
    before = A.detach().clone()
    optimizer.step()
    assert torch.equal(A[1], before[1])
    assert not torch.equal(A[0], before[0])


def test_a_loaded_state_goes_on_bit_equal() -> None:
    states = []
    model = adapted()
    start = {n: v.clone() for n, v in model.state_dict().items()}
    for stop in (False, True):
        model.load_state_dict(start)
        optimizer = Muon(parameter_groups(model, lr=LR), model=model)
        for step in range(4):
            if stop and step == 2:
                saved = optimizer.state_dict()
                optimizer = Muon(parameter_groups(model, lr=LR), model=model)
                optimizer.load_state_dict(saved)
            backward(model, step)
            optimizer.step()
        states.append({n: v.clone() for n, v in model.state_dict().items()})
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_a_model_without_experts_is_adamws() -> None:
    found = []
    for muon in (True, False):
        torch.manual_seed(0)
        model = get_peft_model(tiny.llama(), LoraConfig(r=3, target_modules=["q_proj"]))
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = Muon(trained, model=model) if muon else torch.optim.AdamW(trained)
        backward(model, 0)
        optimizer.step()
        found.append([p.detach().clone() for p in trained])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_momentum_that_never_forgets_is_refused() -> None:
    model = adapted()
    with pytest.raises(ConfigError, match=r"momentum is 1\.0"):
        Muon(model.parameters(), model=model, momentum=1.0)
