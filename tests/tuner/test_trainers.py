"""The method under transformers' and TRL's trainers as they are, with the balance loss on."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainingArguments

import tiny
from lanes import first_then_slow
from rotmole import balance_states
from rotmole.ops import load_balance_loss, select
from rotmole.training.callbacks.balance import BalanceCallback
from trainer_cases import TRAINERS, adapted, arguments, causal_rows, difference, dpo, weights

STEPS = 20


def _trained(folder: Path, base: torch.nn.Module | None = None, **settings: object) -> PeftModel:
    balance = settings.pop("balance", 0.5)
    model = adapted(tiny.llama() if base is None else base, balance)
    Trainer(
        model=model,
        args=TrainingArguments(**arguments(folder, **settings)),
        train_dataset=causal_rows(),
        callbacks=[BalanceCallback()],
    ).train()
    return model


def test_accumulation_gives_the_weights_of_the_whole_batch(tmp_path: Path) -> None:
    """Batch 4 x 1 = 2 x 2 = 1 x 4 with the balance loss on and equal lengths."""
    base = tiny.llama().double()
    runs = [
        _trained(tmp_path, copy.deepcopy(base), per_device_train_batch_size=size,
                 gradient_accumulation_steps=4 // size, lr_scheduler_type="constant",
                 optim="sgd", max_grad_norm=0.0)
        for size in (4, 2, 1)
    ]  # fmt: skip
    assert difference(runs[0], runs[1]) < 1e-7
    assert difference(runs[0], runs[2]) < 1e-7
    alone = _trained(tmp_path, copy.deepcopy(base), balance=0.0, lr_scheduler_type="constant",
                     optim="sgd", max_grad_norm=0.0)  # fmt: skip
    assert difference(runs[0], alone) > 1e-4


def test_checkpointing_off_non_reentrant_and_reentrant_give_equal_weights(tmp_path: Path) -> None:
    off = _trained(tmp_path)
    for reentrant in (False, True):
        name = tiny.checkpointing_name(TrainingArguments)
        on = _trained(tmp_path, **{name: True, f"{name}_kwargs": {"use_reentrant": reentrant}})
        assert difference(off, on) == 0.0


def _routers(model: PeftModel) -> dict[str, torch.Tensor]:
    return {n: w for n, w in weights(model).items() if n.endswith("default.router_weight")}


@pytest.mark.parametrize("name", first_then_slow(TRAINERS))
def test_every_trainer_feels_the_balance_loss_and_resumes_bit_equal(
    name: str, tmp_path: Path
) -> None:
    make = TRAINERS[name]
    settings: dict[str, Any] = {"max_steps": STEPS, "logging_steps": 1}
    settings |= {"save_strategy": "steps", "save_steps": STEPS // 2}
    straight, off = (make(tmp_path / f"b{balance}", balance, **settings) for balance in (0.5, 0.0))
    started = _routers(straight.model)
    for trainer in (straight, off):
        trainer.train()
    logs = [row for row in straight.state.log_history if "loss" in row]
    assert len(logs) == STEPS
    assert all(math.isfinite(row["loss"]) for row in logs)
    assert logs[-1]["router_aux_loss"] < logs[0]["router_aux_loss"]
    assert "router_aux_loss" not in off.state.log_history[0]
    for router, before in started.items():
        after = _routers(straight.model)[router]
        assert not torch.equal(after, before), router
        assert (after - _routers(off.model)[router]).abs().max() > 1e-3, router

    resumed = make(tmp_path / "resumed", 0.5, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b0.5" / f"checkpoint-{STEPS // 2}"))
    assert resumed.state.global_step == STEPS
    assert difference(straight.model, resumed.model) == 0.0


def _expected_balance(model: PeftModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean balance loss of the adapted layers over a batch, written out sequence by sequence."""
    inputs, handles = [], []
    for layer in model.modules():
        if hasattr(layer, "rotmole_experts"):
            handles.append(
                layer.register_forward_pre_hook(lambda m, args: inputs.append((m, args[0])))
            )
    model(input_ids=ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    losses = []
    for layer, x in inputs:
        for row, kept in zip(x, mask.bool(), strict=True):
            routing = select(row[kept] @ layer.experts("default").router_weight.T, top_k=2)
            loss = load_balance_loss(routing.probability_TE, routing.selected_TE)
            losses.append(loss * kept.sum() / mask.sum())
    return sum(losses) / len(inputs)  # type: ignore[return-value] # a tensor: inputs are not empty


class _KeepBatch(TrainerCallback):
    """Keep the first batch that the loss is computed from."""

    def __init__(self) -> None:
        self.batch: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def] # hook
        self.batch = dict(next(iter(kwargs["train_dataloader"])))


def test_dpo_counts_chosen_and_rejected_tokens_and_not_the_reference(tmp_path: Path) -> None:
    """One SGD update: the balance loss moved the routers by its gradient over both, once."""
    sgd = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
    keep = _KeepBatch()
    on, off = (
        dpo(tmp_path / str(balance), balance, keep, logging_steps=1, **sgd)
        for balance in (0.5, 0.0)
    )
    before = adapted(tiny.llama(), 0.0)  # the same start; TRL has changed its model's forward
    started = _routers(on.model)
    records: list[int] = []
    (state,) = balance_states(on.model)
    record, state.record = state.record, lambda terms: (records.append(1), record(terms))  # type: ignore[method-assign] # a spy
    for trainer in (on, off):
        trainer.train()
    ids, mask = keep.batch["input_ids"], keep.batch["attention_mask"]
    assert len(ids) == 2 * 4  # four chosen, four rejected
    assert not mask.all()
    expected = _expected_balance(before, ids, mask)
    assert len(records) == len(_routers(on.model))  # one pass a layer: none by the reference
    assert on.state.log_history[0]["router_aux_loss"] == pytest.approx(float(expected.detach()))
    half = _expected_balance(before, ids[:4], mask[:4])
    assert abs(float((half - expected).detach())) > 1e-3  # chosen alone would give another figure
    (0.5 * expected).backward()
    for name, parameter in before.named_parameters():
        if name in _routers(on.model):
            assert torch.equal(parameter, started[name])
            moved = _routers(on.model)[name] - _routers(off.model)[name]
            torch.testing.assert_close(moved, -parameter.grad, rtol=1e-4, atol=1e-6)
