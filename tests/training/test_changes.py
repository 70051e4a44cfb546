"""What may change between a checkpoint and the run that goes on from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from checkpoint_cases import checkpoint
from rotmole.config.load import load_run
from rotmole.errors import InputError
from rotmole.training.changes import check_changes, facts_of, loaded_facts
from training_cases import settings


def facts(folder: Path, *overrides: str) -> dict:
    text = yaml.safe_dump(settings(folder / "model", folder, folder / "run"))
    return facts_of(load_run(None, overrides, text=text))


@pytest.fixture
def saved(tmp_path) -> Path:
    return checkpoint(tmp_path, 5, **facts(tmp_path))


def test_the_same_run_file_has_no_changes(tmp_path, saved, caplog):
    assert check_changes(saved, facts(tmp_path), allow=False) == []
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("adapter.r=6", "adapter.r is 6, the checkpoint has 4"),
        ("adapter.num_experts=2", "adapter.num_experts is 2, the checkpoint has 3"),
        ("adapter.rotation=plane", "adapter.rotation is 'plane', the checkpoint has 'tangent'"),
        ("adapter.target_modules=[q_proj]", "adapter.target_modules is"),
        ("adapter.rank_pattern={q_proj: 2}", "adapter.rank_pattern is"),
        ("adapter.num_experts_pattern={q_proj: 2}", "adapter.num_experts_pattern is"),
        ("adapter.share_A=true", "adapter.share_A is True, the checkpoint has False"),
    ],
)
def test_other_shapes_are_refused_whatever_is_allowed(tmp_path, saved, override, told):
    now = facts(tmp_path, override, "adapter.top_k=2")
    for allow in (False, True):
        with pytest.raises(InputError, match="tensors of other shapes") as caught:
            check_changes(saved, now, allow=allow)
        assert told in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "adapter.top_k=3", "adapter.lora_alpha=3", "adapter.lora_dropout=0", "seed=4",
        "adapter.router_aux_loss_coef=0", "training.learning_rate=0.1", "training.optim=sgd",
        "training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2",
        "training.max_length=32", "optimizer.rotation_gate_lr=1", "model.dtype=bfloat16",
        "model.name=elsewhere", "data.temperature=2", "data.tasks.sums.weight=2",
        "training.lr_scheduler_type=constant",
    ],
)  # fmt: skip
def test_what_changes_the_numbers_needs_to_be_allowed(tmp_path, saved, override, caplog):
    now = facts(tmp_path, override)
    with pytest.raises(InputError, match="--allow-change") as caught:
        check_changes(saved, now, allow=False)
    name, _, value = override.partition("=")
    assert f"{name} is " in str(caught.value)
    assert value in str(caught.value)
    (told,) = check_changes(saved, now, allow=True, weights_only=True)
    assert told in caplog.text


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.optim=sgd"], ["training.optim_args=amsgrad=True"],
        ["optimizer.name=riemannian_adamw"],
        ["training.lr_scheduler_type=reduce_lr_on_plateau"],
    ],
)  # fmt: skip
def test_state_of_another_optimizer_is_never_taken_up(tmp_path, saved, overrides):
    now = facts(tmp_path, *overrides)
    for allow in (False, True):
        with pytest.raises(InputError, match="add --allow-change and --weights-only") as caught:
            check_changes(saved, now, allow=allow)
        assert f"{overrides[0].partition('=')[0]} is " in str(caught.value)
    with pytest.raises(InputError, match="add --allow-change to go on"):
        check_changes(saved, now, allow=False, weights_only=True)
    assert check_changes(saved, now, allow=True, weights_only=True)


def test_a_schedule_that_keeps_the_rates_takes_no_other(tmp_path):
    """Under the others a new rate takes effect, so allowing it is enough."""
    plateau = "training.lr_scheduler_type=reduce_lr_on_plateau"
    saved = checkpoint(tmp_path, 5, **facts(tmp_path, plateau))
    for change in ("training.learning_rate=0.1", "optimizer.rotation_gate_lr=1"):
        with pytest.raises(InputError, match="and --weights-only"):
            check_changes(saved, facts(tmp_path, plateau, change), allow=True)
    assert check_changes(saved, facts(tmp_path, plateau, "seed=4"), allow=True)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("training.gradient_accumulation_steps=4", "accumulation_steps is 1, the checkpoint has 4"),
        ("training.weight_decay=0.1", "weight_decay is 0.0, the checkpoint has 0.1"),
        ("training.lr_scheduler_type=cosine", "is 'linear', the checkpoint has 'cosine'"),
        ("data.tasks.more={source: locale}", "order of data.tasks is ['colours', 'sums']"),
        ("data.tasks.sums.task_group=1", "task_group is None, the checkpoint has 1"),
    ],
)
def test_what_was_there_and_is_gone_needs_to_be_allowed(tmp_path, override, told):
    groups = "adapter.router_task_loss_coef=1"
    saved = checkpoint(tmp_path, 5, **facts(tmp_path, groups, override))
    with pytest.raises(InputError, match="--allow-change") as caught:
        check_changes(saved, facts(tmp_path, groups), allow=False)
    assert told in str(caught.value)


def test_older_checkpoints_lack_what_was_left_to_its_default(tmp_path):
    then = facts(tmp_path)
    for name in ("order of data.tasks", "training.optim", "training.weight_decay"):
        del then[name]
    saved = checkpoint(tmp_path, 5, **then)
    assert check_changes(saved, facts(tmp_path), allow=False) == []
    with pytest.raises(InputError, match="seed is 4"):
        check_changes(saved, facts(tmp_path, "seed=4"), allow=False)


def test_a_setting_newer_than_the_checkpoint_counts_as_its_default(tmp_path):
    older = {k: v for k, v in facts(tmp_path).items() if k != "adapter.kernels"}
    saved = checkpoint(tmp_path, 5, **older)
    assert check_changes(saved, facts(tmp_path), allow=False) == []
    with pytest.raises(InputError, match="kernels is 'compiled'"):
        check_changes(saved, facts(tmp_path, "adapter.kernels=compiled"), allow=False)


def test_a_task_that_is_gone_is_told_with_its_rows(tmp_path):
    rows = {task: {"rows": 30, "sha256": "a" * 64} for task in ("sums", "more")}
    saved = checkpoint(
        tmp_path, 5, **facts(tmp_path), **loaded_facts({"splits": {"train": rows}}, "torch.float32")
    )
    assert check_changes(saved, facts(tmp_path), allow=False) == []
    del rows["more"]
    now = loaded_facts({"splits": {"train": rows}}, "torch.float32")
    with pytest.raises(InputError, match="rows of more is None, the checkpoint has '30 rows"):
        check_changes(saved, now, allow=False)


def test_other_versions_processes_and_data_need_to_be_allowed(tmp_path, monkeypatch):
    now = facts(tmp_path)
    rows = {"splits": {"train": {"sums": {"rows": 30, "sha256": "a" * 64}}}}
    more = {"splits": {"train": {"sums": {"rows": 31, "sha256": "b" * 64}}}}
    old = now | {"version of torch": "1.0"} | loaded_facts(rows, "torch.float32")
    saved = checkpoint(tmp_path, 5, **old)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError) as caught:
        check_changes(saved, facts(tmp_path), allow=False)
    assert "version of torch is '2." in str(caught.value)
    assert "processes is 2, the checkpoint has 1" in str(caught.value)
    with pytest.raises(InputError) as caught:
        check_changes(saved, loaded_facts(more, "torch.bfloat16"), allow=False)
    assert "rows of sums is '31 rows, sha256 bbbb" in str(caught.value)
    assert "the checkpoint has '30 rows, sha256 aaaa" in str(caught.value)
    assert "dtype of the base model is 'bfloat16'" in str(caught.value)


def test_a_longer_run_is_only_told(tmp_path, saved, caplog):
    (told,) = check_changes(saved, facts(tmp_path, "training.max_steps=90"), allow=False)
    assert told == "training.max_steps is 90, the checkpoint has 20"
    assert told in caplog.text


@pytest.mark.parametrize(
    "override",
    ["training.save_steps=9", "training.logging_steps=7", "training.eval_steps=4",
     "output_dir=elsewhere", "evaluation.limit=3", "data.root=elsewhere"],
)  # fmt: skip
def test_what_changes_no_number_is_not_compared(tmp_path, saved, override, caplog):
    assert check_changes(saved, facts(tmp_path, override), allow=False) == []
    assert caplog.text == ""
