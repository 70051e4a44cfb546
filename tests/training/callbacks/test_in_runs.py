"""Callbacks in whole runs: early stopping, found batch sizes, silent layers, trackers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import linear
from transformers import TrainerControl, TrainerState

import rotmole
import tiny
from rotmole.errors import ConfigError
from rotmole.training.build import build
from rotmole.training.callbacks.gradients import GradientCallback
from rotmole.training.callbacks.metrics import read_metrics
from rotmole.training.run import train
from rotmole.training.trainer import RotMoleTrainer
from training_cases import run_file

# ---- early stopping

STILL = {"learning_rate": 0.0, "eval_steps": 1, "save_steps": 1, "max_steps": 9}
"""Nothing is learnt, so no validation is better than the first."""


def test_training_stops_when_validation_finds_nothing_better(model_folder, data_folder, tmp_path):
    def run(name: str, **options):
        given = run_file(
            model_folder, data_folder, tmp_path / name, "evaluation.early_stopping_patience=2",
            **STILL,
        )  # fmt: skip
        return train(given, progress=False, **options)

    first = run("run")
    assert (first.steps, first.stopped_early, first.interrupted) == (3, True, None)
    assert Path(first.best_checkpoint).name == "checkpoint-1"
    assert first.weights_step == 1
    assert first.adapter_dir.is_dir()

    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-3")
    shutil.rmtree(tmp_path / "cut" / "adapter")
    resumed = run("cut", resume="auto")
    assert (resumed.steps, resumed.stopped_early) == (3, True)

    again = run("run", resume="auto")
    assert (again.steps, again.stopped_early) == (3, True)
    assert Path(again.best_checkpoint).name == "checkpoint-1"


def test_a_larger_patience_goes_on(model_folder, data_folder, tmp_path):
    folders = model_folder, data_folder, tmp_path / "run"
    train(run_file(*folders, "evaluation.early_stopping_patience=1", **STILL), progress=False)
    longer = run_file(*folders, "evaluation.early_stopping_patience=4", **STILL)
    assert train(longer, progress=False, resume="auto").steps == 5


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["data.tasks.{task}.files={{train: {train}}}"], "needs validation rows, but no task has"),
        (["training.eval_strategy=no"], "training.eval_strategy is no"),
        (["training.load_best_model_at_end=false"], "load_best_model_at_end must not be false"),
        (["training.save_steps=7"], "save_strategy and save_steps must follow eval_strategy"),
        (["training.save_strategy=no"], "save_strategy and save_steps must follow eval_strategy"),
    ],
)
def test_what_early_stopping_needs_is_said_at_once(
    model_folder, data_folder, tmp_path, overrides, told
):
    given = [
        override.format(task=task, train=data_folder / f"{task}.train.jsonl")
        for override in overrides for task in ("colours", "sums")
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="early_stopping_patience: 3 needs") as caught:
        run_file(
            model_folder, data_folder, tmp_path, "evaluation.early_stopping_patience=3", *given
        )
    assert told in str(caught.value)
    assert len(caught.value.problems) == 1


# ---- validation on a part of the rows


def test_validation_scores_no_more_rows_than_it_may(model_folder, data_folder, tmp_path):
    """6 rows of each of two tasks; the same ones every time, and all stay for `rotmole eval`."""

    def scored(seed: int) -> list[str]:
        overrides = "evaluation.validation_limit=2", f"seed={seed}"
        built = build(run_file(model_folder, data_folder, tmp_path, *overrides))
        assert [len(rows) for rows in built.examples["validation"].values()] == [6, 6]
        assert {task: len(rows) for task, rows in built.trainer.eval_dataset.items()} == {
            "colours": 2, "sums": 2,
        }  # fmt: skip
        return [row.id for rows in built.validation.values() for row in rows]

    assert scored(1) == scored(1) != scored(2)


# ---- speed


def test_validation_and_checkpoints_are_no_part_of_the_speed(
    model_folder, data_folder, tmp_path, monkeypatch
):
    """A second for each of two validations; the updates take far less."""
    import time

    evaluate = RotMoleTrainer.evaluate
    monkeypatch.setattr(
        RotMoleTrainer, "evaluate", lambda *a, **k: (time.sleep(1.0), evaluate(*a, **k))[1]
    )
    layout = {"max_steps": 4, "eval_steps": 2, "save_steps": 2}
    result = train(run_file(model_folder, data_folder, tmp_path, **layout), progress=False)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    tokens = result.metrics["num_input_tokens_seen"]
    alone = tokens / result.metrics["train_tokens_per_second"]
    last = next(row for row in rows if "train_loss" in row)
    assert last["train_runtime"] - alone > 2.0
    assert last["train_steps_per_second"] == pytest.approx(4 / alone, rel=0.02)
    fourth = next(row for row in rows if row["step"] == 4 and "loss" in row)
    assert tokens / fourth["train_tokens_per_second"] < last["train_runtime"] - 1.0


# ---- batch sizes


def test_a_batch_size_that_was_found_is_in_the_manifest(
    model_folder, data_folder, tmp_path, monkeypatch, caplog
):
    compute, sizes = RotMoleTrainer.compute_loss, []

    def little_memory(self, model, inputs, *args, **kwargs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(RotMoleTrainer, "compute_loss", little_memory)
    given = run_file(
        model_folder, data_folder, tmp_path, max_steps=3, auto_find_batch_size=True,
        eval_steps=3, save_steps=3,
    )  # fmt: skip
    result = train(given, progress=False)
    assert sizes == [4, 3, 2, 2, 2]
    manifest = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["per_device_train_batch_size_found"] == 2
    assert caplog.text.count("did not fit into memory; training goes on with 2") == 1
    assert [len(result.built.trainer.rows_of_update(step)) for step in range(3)] == [2, 2, 2]
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert {row["experts_total"] for row in rows} == {12}


# ---- layers without a gradient


def silence(model: torch.nn.Module, how: str) -> None:
    """Cut the gradient of one adapted layer in one way."""
    mlp = model.get_base_model().model.layers[1].mlp
    layer = mlp.up_proj
    forward = layer.forward
    if how == "not called":
        mlp.up_proj.forward = lambda x: layer.base_layer(x)
    elif how == "read as a weight":
        mlp.up_proj.forward = lambda x: linear(x, layer.base_layer.weight)
    elif how == "without autograd":
        mlp.up_proj.forward = lambda x: torch.no_grad()(forward)(x)
    elif how == "detached":
        mlp.up_proj.forward = lambda x: forward(x).detach()


@pytest.mark.parametrize("how", ["not called", "read as a weight", "without autograd", "detached"])
@pytest.mark.parametrize("rotation", ["none", "tangent"])
def test_layers_that_do_not_learn_are_named_once(caplog, how, rotation):
    config = rotmole.RotMoleConfig(
        r=4, target_modules=["q_proj", "up_proj"], rotation=rotation, task_type="CAUSAL_LM"
    )
    model, ids = get_peft_model(tiny.llama(), config).train(), tiny.tokens(2, 6)
    silence(model, how)
    model(input_ids=ids, labels=ids).loss.backward()
    callback = GradientCallback()
    for _ in range(2):
        callback.on_pre_optimizer_step(None, TrainerState(), TrainerControl(), model=model)
    assert caplog.text.count("had no gradient in the first update") == 1
    assert "1 of 4 adapted layers" in caplog.text
    assert "so they do not learn: model.layers.1.mlp.up_proj." in caplog.text


def test_a_run_whose_layers_all_learn_says_nothing(model_folder, data_folder, tmp_path, caplog):
    given = run_file(model_folder, data_folder, tmp_path, max_steps=1, save_steps=1, eval_steps=1)
    result = train(given, progress=False)
    assert "no gradient" not in caplog.text
    assert any(
        isinstance(callback, GradientCallback) and callback.done
        for callback in result.built.trainer.callback_handler.callbacks
    )


# ---- trackers


def test_tensorboard_has_the_names_of_metrics_jsonl(
    model_folder, data_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    layout = {"max_steps": 2, "save_steps": 1, "eval_steps": 1, "report_to": "tensorboard"}
    train(run_file(model_folder, data_folder, tmp_path / "run", **layout), progress=False)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    names = {name for row in rows for name in row} - {"step"}
    assert set(events.Tags()["scalars"]) == names >= {"loss", "eval_sums_loss", "experts_unused"}
    for name in ("loss", "eval_loss", "largest_expert_share"):
        logged = [(row["step"], row[name]) for row in rows if name in row]
        points = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in points] == [step for step, _ in logged]
        assert [value for _, value in points] == pytest.approx([value for _, value in logged])


# ---- what transformers says


def test_a_plain_resume_says_nothing_of_arguments(model_folder, data_folder, tmp_path, caplog):
    """Shares of a run are whole numbers in a checkpoint; other log steps change no result."""

    def run(resume=None, **more):
        layout = {"max_steps": 10, "save_steps": 0.2, "eval_steps": 0.2} | more
        return train(
            run_file(model_folder, data_folder, tmp_path / "run", **layout), progress=False,
            resume=resume,
        )  # fmt: skip

    run()
    shutil.rmtree(tmp_path / "run" / "adapter")
    shutil.rmtree(tmp_path / "run" / "checkpoint-10")
    run("auto", logging_steps=2)
    assert "do not match" not in caplog.text
