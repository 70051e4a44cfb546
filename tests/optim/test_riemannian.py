"""Riemannian preconditioning (and runs of Muon): its closed form, its law, which parameters it touches, its runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

import tiny
from rotmole import ConfigError, RotMoleConfig
from rotmole.config.load import load_run
from rotmole.optim import Muon, RiemannianAdamW, RiemannianSGD, parameter_groups
from rotmole.optim.riemannian import expert_modules, preconditioned
from rotmole.training.run import train
from rotmole.tuner.experts.experts import Experts
from training_cases import settings, write_data, write_model


def _adapted(**extra: object) -> PeftModel:
    config = RotMoleConfig(
        **({"r": 3, "num_experts": 3, "target_modules": ["q_proj", "v_proj"],
            "init_weights": False} | extra)
    )  # fmt: skip
    return get_peft_model(tiny.llama(), config).double()


def _backward(model: PeftModel, seed: int = 0) -> None:
    ids = tiny.tokens(2, 6, seed)
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()


def _explicit(experts: Experts, delta: float) -> dict[str, torch.Tensor]:
    """Precondition both gradients by explicit inverses, expert by expert."""
    A, B = experts.expert_A.detach(), experts.expert_B.detach()
    dA, dB = experts.expert_A.grad, experts.expert_B.grad
    assert dA is not None
    assert dB is not None
    eye = delta * torch.eye(A.shape[1], dtype=A.dtype)
    shared = len(A) == 1
    inner = [sum(b @ b.T for b in B)] if shared else [b @ b.T for b in B]
    for_A = [torch.linalg.inv(gram + eye) @ g for gram, g in zip(inner, dA, strict=True)]
    for_B = [torch.linalg.inv(A[0 if shared else e] @ A[0 if shared else e].T + eye) @ g
             for e, g in enumerate(dB)]  # fmt: skip
    return {"expert_A": torch.stack(for_A), "expert_B": torch.stack(for_B)}


@pytest.mark.parametrize("extra", [{}, {"share_A": True}, {"frozen": "A"}], ids=str)
def test_a_step_of_sgd_is_the_explicit_inverse(extra: dict[str, object]) -> None:
    model = _adapted(**extra)
    _backward(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    names = {id(p): n for n, p in model.named_parameters()}
    delta, lr = 1e-3, 0.1
    wanted = {n: before[n] - lr * p.grad for n, p in model.named_parameters() if p.grad is not None}
    for experts in expert_modules(model):
        if not experts.expert_A.requires_grad:
            experts.expert_A.grad = torch.zeros_like(experts.expert_A)  # for the formula only
        for name, grad in _explicit(experts, delta).items():
            parameter = getattr(experts, name)
            if parameter.requires_grad:
                wanted[names[id(parameter)]] = parameter.detach() - lr * grad
            else:
                parameter.grad = None
    raw = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    optimizer = RiemannianSGD(parameter_groups(model, lr=lr), model=model, delta=delta)
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), wanted.get(name, before[name]))
        if name in raw:  # gradients are as they were
            assert torch.equal(parameter.grad, raw[name])


def test_adamw_takes_preconditioned_gradients_and_nothing_else_changes() -> None:
    """Ours equals torch's AdamW on a twin whose gradients were preconditioned by hand."""
    model, twin = _adapted(), _adapted()
    options = {"lr": 1e-2, "weight_decay": 0.1}
    ours = RiemannianAdamW(parameter_groups(model, **options), model=model, delta=1e-4)
    theirs = torch.optim.AdamW(parameter_groups(twin, **options))
    for step in range(3):
        for each in (model, twin):
            _backward(each, step)
        for experts in expert_modules(twin):
            for name, grad in _explicit(experts, 1e-4).items():
                getattr(experts, name).grad = grad
        ours.step()
        theirs.step()
    for (name, parameter), wanted in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, wanted, rtol=1e-7, atol=1e-9, msg=name)


def test_an_update_of_the_product_does_not_depend_on_how_it_is_split() -> None:
    """A -> S A, B -> S^-T B leaves B^T A and, for small d, its first-order change as they are."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    A, B, W, S = normal(2, 3, 7), normal(2, 3, 5), normal(2, 5, 7), normal(2, 3, 3)
    changes, plain = [], []
    for split in (torch.eye(3).double().expand(2, 3, 3), S):
        A_, B_ = split @ A, torch.linalg.inv(split).mT @ B
        dA, dB = B_ @ W, A_ @ W.mT  # gradients of <W, B^T A>
        precise = preconditioned(dA, B_, 1e-12), preconditioned(dB, A_, 1e-12)
        changes.append(precise[1].mT @ A_ + B_.mT @ precise[0])
        plain.append(dB.mT @ A_ + B_.mT @ dA)
    torch.testing.assert_close(changes[1], changes[0], rtol=1e-6, atol=1e-6)
    assert (plain[1] - plain[0]).abs().max() > 0.1


def test_a_parameter_keeps_its_type_and_a_rank_deficient_factor_stays_finite() -> None:
    B = torch.ones(1, 4, 6, dtype=torch.bfloat16)  # rank one
    grad = preconditioned(torch.ones(1, 4, 5, dtype=torch.bfloat16), B, 1e-6)
    assert grad.dtype == torch.bfloat16
    assert torch.isfinite(grad).all()
    with pytest.raises(ConfigError, match="above 0"):
        RiemannianSGD([torch.nn.Parameter(torch.ones(1))], model=tiny.llama(), delta=0.0, lr=1.0)


def test_a_closure_is_evaluated_once_and_hooks_run_once() -> None:
    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)  # torch wraps its step now
    model = _adapted()
    optimizer = RiemannianSGD(parameter_groups(model, lr=0.1), model=model)
    calls: list[str] = []

    def closure() -> torch.Tensor:
        calls.append("closure")
        ids = tiny.tokens(2, 6)
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss

    optimizer.register_step_post_hook(lambda *_: calls.append("hook"))
    assert optimizer.step(closure) > 0
    assert calls == ["closure", "hook"]


@pytest.mark.parametrize("kind", [RiemannianAdamW, Muon])
def test_sharded_factors_are_refused_with_the_reason(kind: type) -> None:
    model = _adapted()
    _backward(model)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        experts = expert_modules(model)[0]
        whole = experts.expert_A
        parts = distribute_tensor(whole.detach(), mesh, [Replicate()])
        experts.expert_A = torch.nn.Parameter(parts)
        experts.expert_A.grad = distribute_tensor(whole.grad, mesh, [Replicate()])
        optimizer = kind(parameter_groups(model, lr=0.1), model=model)
        with pytest.raises(ConfigError, match="FSDP shards them"):
            optimizer.step()
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_model(tmp_path_factory.mktemp("m")), write_data(tmp_path_factory.mktemp("d"))


@pytest.mark.parametrize("name", ["riemannian_adamw", "riemannian_sgd", "muon"])
def test_a_run_learns_and_resumes_bit_equal(
    name: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    def run(output: str, steps: int, resume: str | None = None) -> dict[str, torch.Tensor]:
        values = settings(*folders, tmp_path / output, max_steps=steps, save_steps=4,
                          eval_strategy="no", lr_scheduler_type="constant")  # fmt: skip
        del values["training"]["eval_steps"]
        delta = 1e-4 if name.startswith("riemannian") else None
        values["optimizer"] = {"name": name, "riemannian_delta": delta}
        values["training"]["learning_rate"] = 0.1 if name.endswith("sgd") else 1e-2
        result = train(load_run(None, text=yaml.safe_dump(values)), progress=False, resume=resume)
        optimizer = result.built.trainer.optimizer.optimizer
        assert type(optimizer).__name__.lower() == name.replace("_", "")
        assert getattr(optimizer, "delta", None) == delta
        losses = [r["loss"] for r in result.built.trainer.state.log_history if "loss" in r]
        assert steps < 8 or sum(losses[-3:]) < sum(losses[:3])
        return {n: p for n, p in result.built.model.named_parameters() if p.requires_grad}

    straight = run("straight", 8)
    if name == "riemannian_sgd":
        return  # it has no state to lose
    run("halved", 4)
    resumed = run("halved", 8, resume="auto")
    assert all(torch.equal(straight[n], resumed[n]) for n in straight)


def test_what_does_not_go_together_is_said_before_anything_loads(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    values = settings(*folders, tmp_path / "o", optim="sgd", fsdp="full_shard")
    values["optimizer"] = {"name": "riemannian_sgd"}
    with pytest.raises(ConfigError, match="both choose the optimizer") as error:
        load_run(None, text=yaml.safe_dump(values))
    assert any("needs the whole of A and B" in problem for problem in error.value.problems)
    values = settings(*folders, tmp_path / "o")
    for name in (None, "muon"):
        values["optimizer"] = {"name": name, "riemannian_delta": 0.1}
        with pytest.warns(UserWarning, match="riemannian_delta has no effect"):
            load_run(None, text=yaml.safe_dump(values))
