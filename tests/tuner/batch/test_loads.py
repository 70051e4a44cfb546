"""Loss-free balancing: once per optimiser step, against the load of the whole step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

import tiny
from rotmole import RotMoleConfig, update_router_bias
from rotmole.training.callbacks.balance import BalanceCallback

RATE = 0.01


def _adapted(**extra: object) -> PeftModel:
    config = RotMoleConfig(
        **({"r": 2, "num_experts": 4, "top_k": 1, "rotation": "none", "norm_topk_prob": False,
            "target_modules": ["q_proj"], "router_bias_rate": RATE, "init_weights": False} | extra)
    )  # fmt: skip
    torch.manual_seed(2)
    return get_peft_model(tiny.llama(), config)


def _experts(model: PeftModel) -> list[torch.nn.Module]:
    return [m.experts("default") for m in model.modules() if hasattr(m, "rotmole_experts")]


@pytest.mark.parametrize("how", ["loaded", "cast later"])
def test_on_a_half_precision_base_the_bias_moves_on(how: str) -> None:
    """In bfloat16 a bias of 0.5 plus 0.001 is 0.5."""
    config = RotMoleConfig(r=2, target_modules=["q_proj"], router_bias_rate=1e-3)
    base = tiny.llama().bfloat16() if how == "loaded" else tiny.llama()
    model = get_peft_model(base, config)
    model = model if how == "loaded" else model.bfloat16()
    experts = _experts(model)[0]
    assert experts.router_bias.dtype == torch.float32
    experts.router_bias.fill_(0.5)
    experts.loads.loads_E = torch.tensor([4.0, 0.0, 2.0, 2.0])
    update_router_bias(model)
    assert experts.router_bias.tolist() == pytest.approx([0.499, 0.501, 0.5, 0.5])
    model.double()
    assert experts.router_bias.dtype == torch.float64


def _biases(model: PeftModel) -> list[list[float]]:
    return [e.router_bias.tolist() for e in _experts(model)]


def _batch(seed: int = 0) -> dict[str, torch.Tensor]:
    ids = tiny.tokens(4, 7, seed)
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    return {"input_ids": ids, "attention_mask": mask,
            "labels": ids.masked_fill(mask == 0, -100)}  # fmt: skip


def _loads(model: PeftModel, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Count choices by hand from captured inputs."""
    captured: list[torch.Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda m, args: captured.append(args[0]))
        for layer in model.modules()
        if hasattr(layer, "rotmole_experts")
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    kept = batch["attention_mask"].bool().flatten()
    found = []
    for experts, x in zip(_experts(model), captured, strict=True):
        chosen = tiny.routing(experts, x.flatten(0, 1)).selected_TE
        found.append(chosen[kept].sum(0))
    return found


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_it_moves_once_against_the_load_of_all_micro_batches(reentrant: bool | None) -> None:
    model = _adapted()
    batches = [_batch(0), _batch(1)]
    loads = [sum(pair) for pair in zip(*(_loads(model, b) for b in batches), strict=True)]
    if reentrant is not None:
        model.enable_input_require_grads()
        tiny.enable_checkpointing(model, reentrant)
    model.train()
    for batch in batches:
        model(**batch).loss.backward()
    assert [e.loads.loads_E.tolist() for e in _experts(model)] == [x.tolist() for x in loads]
    assert not any(any(bias) for bias in _biases(model))
    assert update_router_bias(model) == 2
    wanted = [torch.sign(x.float().mean() - x) * RATE for x in loads]
    for bias, step in zip(_biases(model), wanted, strict=True):
        assert bias == pytest.approx(step.tolist())
    with pytest.warns(UserWarning, match="found no loads"):
        assert update_router_bias(model) == 0  # nothing was counted since
    assert update_router_bias(model) == 0  # said once


@pytest.mark.slow
def test_a_compiled_model_counts_nothing_and_says_so() -> None:
    model = _adapted().train()
    compiled = torch.compile(model, backend="eager")
    compiled(**_batch()).loss.backward()
    with pytest.warns(UserWarning, match=r"not inside torch\.compile"):
        assert update_router_bias(model) == 0


def test_evaluation_counts_nothing_and_the_bias_is_saved(tmp_path: Path) -> None:
    model = _adapted().eval()
    with torch.no_grad():
        model(**_batch())
    model(**_batch()).loss.backward()  # eval mode, with gradients
    assert all(e.loads.loads_E is None for e in _experts(model))
    model.train()
    model(**_batch()).loss.backward()
    update_router_bias(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert _biases(again) == _biases(model)
    model.eval()
    with torch.no_grad():
        assert torch.equal(again(**_batch()).logits, model(**_batch()).logits)


def test_a_step_without_an_update_warns_once() -> None:
    model = _adapted()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def steps() -> None:
        for _ in range(3):
            model(**_batch()).loss.backward()
            optimizer.step()

    with pytest.warns(UserWarning, match="nobody moves the bias") as said:
        steps()
    assert len(said) == 1  # not once a layer
    model = _adapted()
    optimizer.register_step_post_hook(lambda *_: update_router_bias(model))
    steps()  # a warning would be an error


def test_the_trainer_balances_the_experts(tmp_path: Path) -> None:
    """A bias that sends most tokens to expert 0 is taken back, one step of the rate an update."""
    ids = tiny.tokens(8, 10)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model = _adapted(router_bias_rate=0.05)
    for experts in _experts(model):
        experts.router_bias[0] = 0.5

    def greatest_share() -> float:
        model.eval()
        return max(float((x / x.sum()).max()) for x in _loads(model, batch))

    before = greatest_share()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=4, use_cpu=True,
        gradient_accumulation_steps=2, learning_rate=1e-6, report_to="none", disable_tqdm=True,
        save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    rows = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids.tolist()])
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[BalanceCallback()]).train()
    moved = torch.tensor(_biases(model)) / 0.05
    torch.testing.assert_close(moved, moved.round(), rtol=0, atol=1e-3)  # whole steps
    assert (moved[:, 0] < 8).all()  # it was 10
    assert (moved[:, 1:].abs() <= 12).all()  # one an update, not one a micro-batch
    assert greatest_share() < 0.8 < before
