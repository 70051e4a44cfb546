"""A signal during validation: it ends at once, and the resumed run makes up for it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

from rotmole.training import build
from rotmole.training.callbacks.metrics import TIMING_SUFFIXES, read_metrics
from rotmole.training.checkpoints import checkpoints as saving
from rotmole.training.checkpoints.find import checkpoints
from rotmole.training.run import TrainResult, train
from rotmole_cli import main
from training_cases import run_file

LAYOUT = {
    "max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 2, "save_steps": 2,
    "eval_steps": 2, "per_device_eval_batch_size": 1, "save_total_limit": 10,
}  # fmt: skip
WHOLE = {
    "max_steps": -1,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 12,
    "save_total_limit": 10,
}
WHOLE |= {f"{what}_strategy": "epoch" for what in ("save", "eval", "logging")}
BATCHES = 12  # of one validation


class Strike(TrainerCallback):
    """Sends this process a signal in the third batch of an update's validation; counts batches."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        self.step, self.number, self.batches = step, number, 0

    def on_prediction_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.batches += 1
            if self.batches == 3:
                os.kill(os.getpid(), self.number)


class Stop(TrainerCallback):
    """Sends this process a signal amid an update."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def comparable(run_dir: Path) -> list[dict]:
    return [
        {name: value for name, value in row.items() if not name.endswith(TIMING_SUFFIXES)}
        for row in read_metrics(run_dir / "metrics.jsonl")
        if "train_loss" not in row  # a run that had nothing left to do has no closing line
    ]


@pytest.fixture
def once(model_folder, data_folder) -> Callable[..., TrainResult]:
    def run(
        folder: Path, *callbacks: TrainerCallback, resume=None, layout=LAYOUT, **more
    ) -> TrainResult:
        given = run_file(model_folder, data_folder, folder, **(layout | more))
        return train(given, progress=False, callbacks=callbacks, resume=resume)

    return run


@pytest.mark.parametrize(("step", "updates"), [(2, 6), (6, 6), (7, 7)])  # 7: for the end's sake
@pytest.mark.slow
def test_a_cut_validation_is_made_up_for_to_the_last_bit(once, tmp_path, step, updates):
    straight = once(tmp_path / "straight", max_steps=updates)
    strike = Strike(step)
    cut = once(tmp_path / "cut", strike, max_steps=updates)
    assert strike.batches in (3, 4)  # whose callback comes first
    assert (cut.interrupted, cut.steps, cut.adapter_dir) == (signal.SIGTERM, step, None)
    newest = checkpoints(tmp_path / "cut")[-1]
    assert newest.name == f"checkpoint-{step}"
    assert not any("eval_loss" in row and row["step"] == step for row in comparable(cut.run_dir))
    resumed = once(tmp_path / "cut", resume="auto", max_steps=updates)
    assert resumed.interrupted is None
    assert comparable(resumed.run_dir) == comparable(straight.run_dir)
    assert Path(resumed.best_checkpoint).name == Path(straight.best_checkpoint).name
    ours, theirs = (
        load_file(f / "adapter" / "adapter_model.safetensors")
        for f in (resumed.run_dir, straight.run_dir)
    )
    assert all((value == theirs[name]).all() for name, value in ours.items())


@pytest.mark.filterwarnings("ignore:training.*has no effect:UserWarning")
@pytest.mark.parametrize("step", [2, 5])
@pytest.mark.slow
def test_a_stop_writes_one_checkpoint_and_leaves_it_in_peace(once, tmp_path, monkeypatch, step):
    """Also where the end of an epoch would log, validate and save: a stop amid one is no end."""
    begun = []
    begin = saving.begin
    monkeypatch.setattr(saving, "begin", lambda path: begun.append(path.name) or begin(path))
    once(tmp_path / "steps", Strike(2))
    assert begun == ["checkpoint-2"]
    begun.clear()
    straight = once(tmp_path / "straight", layout=WHOLE)
    assert begun == ["checkpoint-5", "checkpoint-10"]
    begun.clear()
    cut = once(tmp_path / "cut", Stop(step), layout=WHOLE)
    assert (cut.interrupted, cut.steps) == (signal.SIGTERM, step)
    assert begun == [f"checkpoint-{step}"]
    resumed = once(tmp_path / "cut", resume="auto", layout=WHOLE)
    assert comparable(resumed.run_dir) == comparable(straight.run_dir)
    ours, theirs = (
        load_file(f / "adapter" / "adapter_model.safetensors")
        for f in (resumed.run_dir, straight.run_dir)
    )
    assert all((value == theirs[name]).all() for name, value in ours.items())


def test_a_second_cut_validates_once_more(once, tmp_path):
    for resume in (None, "auto", "auto"):
        strike = Strike(2)
        cut = once(tmp_path / "cut", strike, resume=resume)
        assert (cut.interrupted, cut.steps) == (signal.SIGTERM, 2)
        assert strike.batches in (3, 4)
        assert [path.name for path in checkpoints(tmp_path / "cut")] == ["checkpoint-2"]


@pytest.mark.slow
def test_a_best_that_the_late_validation_finds_is_the_result(once, tmp_path):
    """The highest loss counts as the best here, so the first validation finds it."""
    more = {"metric_for_best_model": "eval_loss", "greater_is_better": True}
    straight = once(tmp_path / "straight", **more)
    assert Path(straight.best_checkpoint).name == "checkpoint-2"
    once(tmp_path / "cut", Strike(2), **more)
    resumed = once(tmp_path / "cut", resume="auto", save_total_limit=1, **more)
    assert resumed.best_checkpoint == str(tmp_path / "cut" / "checkpoint-2")
    assert {path.name for path in checkpoints(tmp_path / "cut")} == {"checkpoint-2", "checkpoint-6"}


@pytest.mark.slow
def test_a_cut_before_the_first_update_leaves_nothing_half_done(once, tmp_path):
    cut = once(tmp_path / "cut", Strike(0), eval_on_start=True)
    assert (cut.interrupted, cut.steps) == (signal.SIGTERM, 0)
    assert checkpoints(tmp_path / "cut") == []
    straight = once(tmp_path / "straight", eval_on_start=True)
    again = once(tmp_path / "cut", resume="auto", eval_on_start=True)
    assert comparable(again.run_dir) == comparable(straight.run_dir)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_says_so_and_exits_as_ever(
    model_folder, data_folder, tmp_path, monkeypatch, capsys, number, code
):
    import yaml

    from training_cases import settings

    content = settings(model_folder, data_folder, tmp_path / "run", **LAYOUT)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    wire, strike = build.build_trainer, Strike(4, number)

    def with_strike(*args, **kwargs):
        trainer = wire(*args, **kwargs)
        trainer.add_callback(strike)
        return trainer

    monkeypatch.setattr(build, "build_trainer", with_strike)
    assert main(["train", str(tmp_path / "run.yaml")]) == code
    said = capsys.readouterr()
    assert "stopped after update 4; a checkpoint is saved." in said.out
    assert "--resume auto" in said.out
    assert strike.batches == 3 < BATCHES
