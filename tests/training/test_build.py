"""What the wiring decides by itself: validation, the best checkpoint, and what it refuses."""

from __future__ import annotations

import json
import subprocess

import pytest
import yaml
from trl import SFTConfig

from rotmole.config.load import load_run
from rotmole.errors import ConfigError, InputError
from rotmole.training.build import build, training_arguments
from rotmole.training.figures import final_metrics
from rotmole.training.folder.manifest import git_commit, machine
from training_cases import run_file, settings


def test_the_best_checkpoint_is_kept_where_validation_and_saving_go_together(tmp_path):
    arguments = training_arguments(run_file(tmp_path, tmp_path, tmp_path / "run"), validated=["t"])
    assert arguments.load_best_model_at_end
    assert arguments.metric_for_best_model == "eval_loss"
    assert not arguments.greater_is_better


def test_the_best_checkpoint_cannot_be_known_where_they_do_not(tmp_path):
    run = run_file(tmp_path, tmp_path, tmp_path / "run", save_steps=7)
    with pytest.warns(UserWarning, match="not the best"):
        assert not training_arguments(run, validated=["t"]).load_best_model_at_end


def test_validation_is_off_without_rows(tmp_path):
    arguments = training_arguments(run_file(tmp_path, tmp_path, tmp_path / "run"), validated=[])
    assert arguments.eval_strategy == "no"
    assert not arguments.load_best_model_at_end


@pytest.mark.parametrize("name", ["loss_type", "activation_offloading"])
def test_settings_of_another_trainer_are_refused(tmp_path, name):
    run = run_file(tmp_path, tmp_path, tmp_path / "run")
    value = {"loss_type": "dft", "activation_offloading": True}[name]
    run = run.model_copy(update={"training": run.training | {name: value}})
    with pytest.raises(ConfigError, match=name):
        training_arguments(run, validated=["t"])


def test_the_seed_alone_decides_the_start(model_folder, data_folder, tmp_path):
    def start(seed: int) -> list[float]:
        content = settings(model_folder, data_folder, tmp_path) | {"seed": seed}
        model = build(load_run(None, text=yaml.safe_dump(content))).model
        return [p.sum().item() for p in model.parameters() if p.requires_grad]

    first = start(1)
    assert start(1) == first
    assert start(2) != first


@pytest.mark.parametrize("peft_type", ["ROTMOLE", "LORA"])
def test_modules_that_the_model_lacks_are_wrong_input(
    peft_type, model_folder, data_folder, tmp_path
):
    adapter = f"adapter={{peft_type: {peft_type}, target_modules: [no_such_module]}}"
    run = run_file(model_folder, data_folder, tmp_path, adapter)
    with pytest.raises(InputError, match="no_such_module"):
        build(run)


def test_only_our_progress_is_shown(model_folder, data_folder, tmp_path):
    trainer = build(run_file(model_folder, data_folder, tmp_path)).trainer
    names = {type(callback).__name__ for callback in trainer.callback_handler.callbacks}
    assert "JsonLinesCallback" in names
    assert not {"PrinterCallback", "ProgressCallback"} & names


def test_task_names_stay_with_the_rows(model_folder, data_folder, tmp_path):
    data = build(run_file(model_folder, data_folder, tmp_path)).trainer.train_dataset
    assert sorted(set(data["task"])) == ["colours", "sums"]
    assert len(data) == 60


def test_the_commit_is_told_with_a_mark_for_changes(tmp_path):
    def git(*words: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("1", encoding="utf-8")
    git("add", "file")
    git("commit", "-m", "first")
    clean = git_commit(tmp_path)
    assert clean is not None
    assert len(clean) >= 40
    (tmp_path / "file").write_text("2", encoding="utf-8")
    assert git_commit(tmp_path) == f"{clean}+changes"


def test_there_is_no_commit_outside_a_repository(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit(tmp_path) is None


def test_the_machine_is_told_in_plain_values():
    assert json.loads(json.dumps(machine())) == machine()


def test_a_process_without_a_launcher_takes_one_gpu(
    model_folder, data_folder, tmp_path, monkeypatch
):
    """Two GPUs cannot be had here, so the count is made up."""
    given = run_file(model_folder, data_folder, tmp_path)
    monkeypatch.setattr(SFTConfig, "n_gpu", property(lambda self: 2))
    with pytest.warns(UserWarning, match="one of 2 GPUs is used; `torchrun --nproc-per-node 2"):
        arguments = training_arguments(given, validated=["t"])
    assert arguments._n_gpu == 1


def test_figures_are_those_of_the_result():
    rows = [
        {"step": 1, "loss": 3.0, "train_tokens_per_second": 5.0},  # of the first update alone
        {"step": 1, "eval_loss": 1.0, "eval_a_loss": 1.0, "eval_runtime": 5.0},
        {"step": 2, "eval_loss": 2.0, "eval_a_loss": 2.0},
        {"step": 2, "train_loss": 2.5, "peak_memory_bytes": 7, "train_tokens_per_second": 9.0},
    ]
    common = {"train_tokens_per_second": 9.0, "train_loss": 2.5, "peak_memory_bytes": 7}
    assert final_metrics(rows, 1) == common | {
        "eval_loss": 1.0, "eval_a_loss": 1.0, "eval_step": 1,
    }  # fmt: skip
    assert final_metrics(rows, 3)["eval_loss"] == 2.0
