"""The trainer's own parts: loss, groups, order, and the stop before a NaN."""

from __future__ import annotations

import inspect
from contextlib import contextmanager

import pytest
import torch
from transformers import Trainer

from rotmole.errors import ConfigError, NonFiniteError
from rotmole.training.build import build
from rotmole.training.checkpoints.checkpoints import Checkpoints
from rotmole.training.finite import first_nonfinite
from rotmole.training.order import WINDOW, EpochSampler
from rotmole.training.trainer import RotMoleTrainer
from rotmole.training.validation import ValidatingTrainer
from training_cases import run_file


@pytest.fixture
def built(model_folder, data_folder, tmp_path):
    run = run_file(model_folder, data_folder, tmp_path)
    made = build(run)
    made.model.eval()
    with torch.no_grad():  # a start where every part of the adapter acts
        for _, parameter in made.model.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.dim()))
    return made


def batch(built, start=0, stop=4):
    rows = [built.trainer.train_dataset[i] for i in range(start, stop)]
    return built.trainer.data_collator(rows)


@pytest.mark.parametrize("count", [None, 57])
def test_the_loss_is_transformers_own(built, count):
    count = None if count is None else torch.tensor(count)
    ours = built.trainer.compute_loss(built.model, batch(built), num_items_in_batch=count)
    theirs = Trainer.compute_loss(
        built.trainer, built.model, batch(built), num_items_in_batch=count
    )
    torch.testing.assert_close(ours, theirs)
    names = [n for n, p in built.model.named_parameters() if p.requires_grad]
    values = [p for p in built.model.parameters() if p.requires_grad]
    for name, mine, other in zip(
        names,
        torch.autograd.grad(ours, values, allow_unused=True),
        torch.autograd.grad(theirs, values, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, msg=name)


def test_a_batch_without_a_learnt_token_has_loss_zero(built):
    inputs = batch(built)
    inputs["labels"].fill_(-100)
    loss = built.trainer.compute_loss(built.model, inputs, num_items_in_batch=torch.tensor(0))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in built.model.parameters())


def test_a_model_that_cannot_skip_positions_is_trained_all_the_same(built):
    ours = built.trainer.compute_loss(built.model, batch(built))
    built.trainer.accepts_logits_to_keep = False
    torch.testing.assert_close(built.trainer.compute_loss(built.model, batch(built)), ours)


def test_learning_rates_follow_the_roles(model_folder, data_folder, tmp_path):
    run = run_file(model_folder, data_folder, tmp_path)
    rates = run.optimizer.model_copy(
        update={"scaling_gate_lr": 1e-3, "rotation_gate_lr": 2e-3, "lora_plus_ratio": 4.0}
    )
    built = build(run.model_copy(update={"optimizer": rates}))
    groups = {g["role"]: g for g in built.trainer.create_optimizer().param_groups}
    assert {role: group["lr"] for role, group in groups.items()} == {
        "expert": 2e-2, "expert_B": 8e-2, "scaling_gate": 1e-3, "rotation_gate": 2e-3,
    }  # fmt: skip
    held = sum(p.numel() for group in groups.values() for p in group["params"])
    assert held == built.model.get_nb_trainable_parameters()[0]


def test_an_optimizer_that_ignores_the_roles_is_refused(model_folder, data_folder, tmp_path):
    run = run_file(model_folder, data_folder, tmp_path)
    rates = run.optimizer.model_copy(update={"scaling_gate_lr": 1e-3})
    trainer = build(run.model_copy(update={"optimizer": rates})).trainer
    trainer.get_optimizer_cls_and_kwargs = lambda *_: (torch.optim.AdamW, {"params": []})
    with pytest.raises(ConfigError, match="optimizer:"):
        trainer.create_optimizer()


def test_epoch_0_keeps_the_mixture_and_later_ones_are_shuffled():
    sampler = EpochSampler(50, seed=7)
    assert list(sampler) == list(range(50))
    sampler.set_epoch(1)
    first, again = list(sampler), list(sampler)
    assert first == again != list(range(50))
    assert sorted(first) == list(range(50))
    sampler.set_epoch(2)
    assert list(sampler) != first
    assert len(sampler) == 50


def test_grouping_by_length_saves_padding_and_keeps_every_row():
    lengths = [3 + 7 * (row * 7919 % 50) for row in range(400)]
    sampler = EpochSampler(400, seed=7, batch=4, lengths=lengths)
    order = sampler.order(0)
    assert sorted(order) == list(range(400))
    assert order == sampler.order(0) != sampler.order(1)

    def padded(rows: list[int]) -> int:
        return sum(4 * max(lengths[r] for r in rows[i : i + 4]) for i in range(0, 400, 4))

    assert padded(order) < 0.75 * padded(list(range(400)))


def test_grouping_by_length_mixes_tasks_and_lengths_as_the_mixture_does():
    """A window has the rows of the mixture's own window, and its batches no order of length."""
    lengths = [5 + row * 37 % 90 for row in range(4 * WINDOW * 2 + 6)]
    sampler = EpochSampler(len(lengths), seed=7, batch=4, lengths=lengths)
    order, size = sampler.order(0), 4 * WINDOW
    for start in range(0, len(lengths), size):
        window = order[start : start + size]
        assert sorted(window) == list(range(start, min(start + size, len(lengths))))
    means = [sum(lengths[row] for row in order[i : i + 4]) / 4 for i in range(0, size, 4)]
    assert sorted(means) != means != sorted(means, reverse=True)
    first, second = means[: WINDOW // 2], means[WINDOW // 2 :]
    assert abs(sum(first) - sum(second)) / (WINDOW // 2) < 30  # sorted it would be 45


def test_grouped_batches_are_those_of_all_processes(built):
    built.trainer.args.train_sampling_strategy = "group_by_length"
    built.trainer.args.gradient_accumulation_steps = 3
    assert built.trainer._get_train_sampler().batch == 4


def test_the_second_epoch_reaches_the_sampler(built):
    loader = built.trainer.get_train_dataloader()
    seen = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        seen.append(torch.cat([b["input_ids"][:, 0] for b in loader]).tolist())
    assert seen[0] != seen[1]


def test_the_failing_rows_are_named(built):
    rows = built.trainer.rows_of_update(1)
    expected = built.trainer.train_dataset.select(range(4, 8))
    assert rows == [{"task": row["task"], "id": row["id"]} for row in expected]
    shuffled = EpochSampler(60, built.run.seed).order(1)[:4]
    expected = built.trainer.train_dataset.select(shuffled)
    assert [row["id"] for row in built.trainer.rows_of_update(15)] == expected["id"]


def test_the_failing_rows_are_named_where_a_batch_that_is_not_full_is_dropped(built, monkeypatch):
    """60 rows in batches of 7: 8 updates an epoch, not 9."""
    trainer = built.trainer
    monkeypatch.setattr(trainer.args, "per_device_train_batch_size", 7)
    monkeypatch.setattr(trainer, "_train_batch_size", 7)
    monkeypatch.setattr(trainer.args, "dataloader_drop_last", True)
    assert len(trainer.get_train_dataloader()) == 8
    first = EpochSampler(60, built.run.seed).order(1)[:7]
    expected = trainer.train_dataset.select(first)
    assert [row["id"] for row in trainer.rows_of_update(8)] == expected["id"]
    monkeypatch.setattr(trainer.args, "gradient_accumulation_steps", 3)
    assert len(trainer.rows_of_update(2)) == 14  # 56 rows in updates of 21


def test_the_first_layer_that_is_not_finite_is_named(built):
    with torch.no_grad():
        built.model.get_base_model().model.layers[1].mlp.up_proj.weight.fill_(float("nan"))
    name = first_nonfinite(built.model, batch(built))
    assert name == "base_model.model.model.layers.1.mlp.up_proj"


def test_a_loss_that_is_not_finite_stops_at_once_and_names_the_layer(built):
    count = torch.tensor(20)
    assert built.trainer.training_step(built.model, batch(built), count).isfinite()
    built.model.zero_grad()
    with torch.no_grad():
        built.model.get_base_model().model.layers[0].self_attn.o_proj.weight.fill_(float("inf"))
    with pytest.raises(NonFiniteError, match=r"loss of update 1 is nan.*layers\.0\.self_attn"):
        built.trainer.training_step(built.model, batch(built), count)


def test_a_checkpoint_is_written_once_for_each_log_and_try(built, monkeypatch):
    """Auto find batch size tries anew with other weights; a later log changes the sums it holds."""
    trainer, written = built.trainer, []

    @contextmanager
    def save_nothing(checkpoints, trainer, log):
        yield
        checkpoints.last_saved = trainer.state.global_step, trainer._globalstep_last_logged

    monkeypatch.setattr(Checkpoints, "save", save_nothing)
    monkeypatch.setattr(Trainer, "_save_checkpoint", lambda *_: written.append(1))
    trainer.state.global_step, trainer._globalstep_last_logged = 3, 2

    def saves() -> int:
        written.clear()
        trainer._save_checkpoint(built.model, None)
        return len(written)

    assert [saves(), saves()] == [1, 0]
    trainer._globalstep_last_logged = 3
    assert [saves(), saves()] == [1, 0]
    trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert saves() == 1


def test_deepspeed_is_refused_in_one_sentence(model_folder, data_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="launched with DeepSpeed, which is not supported"):
        run_file(model_folder, data_folder, tmp_path)


OVERRIDDEN = {
    "_get_train_sampler": "(self, train_dataset",
    "_save_checkpoint": "(self, model, trial",
    "_load_best_model": "(self",
    "_load_from_checkpoint": "(self, resume_from_checkpoint, model",
    "_load_optimizer_and_scheduler": "(self, checkpoint",
    "_load_scaler": "(self, checkpoint",
    "_load_rng_state": "(self, checkpoint",
    "_evaluate": "(self, trial, ignore_keys_for_eval, skip_scheduler",
    "_determine_best_metric": "(self, metrics, trial",
}
"""Private methods of transformers' Trainer that ours overrides, and their parameters."""


def test_the_private_methods_that_are_overridden_are_those_upstream_has():
    """A release that renames one, or changes its parameters, fails here and not in a run."""
    ours = {
        name
        for kind in (RotMoleTrainer, ValidatingTrainer)
        for name, value in vars(kind).items()
        if name.startswith("_") and hasattr(Trainer, name) and not hasattr(object, name)
    }
    assert ours - {"__module__", "__annotations__"} == set(OVERRIDDEN)
    for name, parameters in OVERRIDDEN.items():
        signature = inspect.signature(getattr(Trainer, name)).parameters
        assert "(" + ", ".join(signature) == parameters, name
