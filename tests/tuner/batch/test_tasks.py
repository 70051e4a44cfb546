"""LoRAMoE's localised loss acts with the right gradient; task ids reach it and nothing else."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model

import tiny
from rotmole import ConfigError, DataError, RotMoleConfig, balance_states
from rotmole.config.load import load_run
from rotmole.ops import select
from rotmole.ops.reference.balance import task_balance_loss as slow
from rotmole.training.run import train
from training_cases import settings, write_data, write_model

COEFFICIENT, OFFSET = 0.7, 0.3


def _adapted(base: torch.nn.Module | None = None, **extra: object) -> PeftModel:
    config = RotMoleConfig(
        **({"r": 4, "num_experts": 4, "selection": "dense", "init_weights": False,
            "target_modules": ["q_proj", "v_proj"], "router_task_loss_coef": COEFFICIENT,
            "router_task_offset": OFFSET} | extra)
    )  # fmt: skip
    torch.manual_seed(1)
    return get_peft_model(tiny.llama() if base is None else base, config).double()


def _batch() -> dict[str, torch.Tensor]:
    ids = tiny.tokens(3, 6)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _routers(model: PeftModel) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if n.endswith("router_weight")}


def _expected(tasks: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradient of the task loss + the slow twin's losses of captured inputs, by autograd."""
    model, batch = _adapted(router_task_loss_coef=0.0, router_task_offset=0.1), _batch()
    captured: list[tuple[torch.nn.Module, torch.Tensor]] = []
    for layer in model.modules():
        if hasattr(layer, "rotmole_experts"):
            layer.register_forward_pre_hook(lambda m, args: captured.append((m, args[0])))
    total = model(**batch).loss
    row_T = torch.arange(3).repeat_interleave(6)
    for layer, x in captured:
        logits = (x @ layer.experts("default").router_weight.T).flatten(0, 1)
        weight = select(logits, top_k=2, selection="dense").weight_TE
        loss = slow(weight, row_T, tasks, groups=2, offset=OFFSET,
                    mask_T=batch["attention_mask"].flatten())  # fmt: skip
        total = total + COEFFICIENT * loss / len(captured)
    total.backward()
    return _routers(model)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_the_gradient_is_that_of_the_sum_padding_left_out(reentrant: bool | None) -> None:
    tasks = torch.tensor([0, 1, 1])
    expected, model = _expected(tasks), _adapted()
    if reentrant is not None:
        model.enable_input_require_grads()
        tiny.enable_checkpointing(model, reentrant)
    model.train()
    seen: set[str] = set()
    inner = model.base_model.model.model
    inner.register_forward_pre_hook(lambda m, args, kwargs: seen.update(kwargs), with_kwargs=True)
    model(**_batch(), task_id=tasks).loss.backward()
    assert "attention_mask" in seen
    assert "task_id" not in seen  # the base model never sees it
    for name, found in _routers(model).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-9, atol=1e-12)
    (state,) = balance_states(model)
    popped = state.pop()
    assert popped is not None
    assert popped["router_task_loss"] > 0
    other = _adapted()
    other(**_batch(), task_id=1 - tasks).loss.backward()
    assert any((g - expected[n]).abs().max() > 1e-4 for n, g in _routers(other).items())


def test_without_task_ids_it_warns_once_and_generation_does_not_miss_them() -> None:
    model, batch = _adapted(), _batch()
    with pytest.warns(UserWarning, match="has no task_id"):
        model(**batch).loss.backward()
    model.zero_grad()
    model(**batch).loss.backward()  # a second warning would be an error
    model = _adapted().eval()
    model.generate(input_ids=batch["input_ids"][1:], max_new_tokens=2, do_sample=False)


def test_a_group_that_is_not_there_is_refused() -> None:
    model = _adapted()
    with pytest.raises(DataError, match=r"0\.\.1"):
        model(**_batch(), task_id=torch.tensor([0, 1, 2]))


def test_each_adapter_has_its_own_number_of_groups() -> None:
    model = _adapted()
    config = copy.deepcopy(model.peft_config["default"])
    config.router_task_groups = 4
    model.add_adapter("more", config)
    model.double()
    batch, ids = _batch(), torch.tensor([0, 3, 1])
    with pytest.raises(DataError, match=r"0\.\.1"):
        model(**batch, task_id=ids)
    model.set_adapter("more")
    model(**batch, task_id=ids)
    with pytest.raises(DataError, match=r"0\.\.3"):
        model(**batch, task_id=ids + 1)


def test_an_encoder_decoder_takes_task_ids_and_unload_removes_the_hook() -> None:
    base = tiny.t5()
    model = _adapted(base, target_modules=["q"])
    ids = tiny.tokens(2, 5)
    model(input_ids=ids, labels=ids, task_id=torch.tensor([0, 1])).loss.backward()
    assert all(state.pop()["router_task_loss"] > 0 for state in balance_states(model))
    unloaded = model.unload()
    assert not unloaded._forward_pre_hooks
    assert not unloaded.encoder._forward_pre_hooks


def test_a_run_teaches_groups_their_tasks(tmp_path: Path) -> None:
    model, data = (tmp_path / name for name in ("model", "data"))
    for folder in (model, data):
        folder.mkdir()
    write_model(model)
    write_data(data)
    values = settings(model, data, tmp_path / "run", max_steps=12, save_strategy="no",
                      eval_strategy="no")  # fmt: skip
    for name in ("eval_steps", "save_steps", "save_total_limit"):
        del values["training"][name]
    values["adapter"] |= {
        "num_experts": 2, "rotation": "none", "selection": "dense", "router_aux_loss_coef": 0.0,
        "router_task_loss_coef": 5.0, "router_task_offset": 0.8,
    }  # fmt: skip
    values["data"]["tasks"]["sums"]["task_group"] = 0
    values["data"]["tasks"]["colours"]["task_group"] = 1
    result = train(load_run(None, text=yaml.safe_dump(values)), progress=False)
    losses = [r["router_task_loss"] for r in result.built.trainer.state.log_history
              if "router_task_loss" in r]  # fmt: skip
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    values["data"]["tasks"]["sums"]["task_group"] = 2
    with pytest.raises(ConfigError, match=r"task_group: 2 must be below"):
        load_run(None, text=yaml.safe_dump(values))
