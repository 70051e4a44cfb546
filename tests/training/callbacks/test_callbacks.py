"""Callbacks: the balance loss's scale, metric lines, and words for a log."""

from __future__ import annotations

import math
import resource
import signal
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from rotmole.errors import StorageError
from rotmole.training.callbacks.balance import micro_batches
from rotmole.training.callbacks.metrics import JsonLinesCallback, read_metrics
from rotmole.training.callbacks.progress import ProgressCallback, describe
from rotmole.training.callbacks.stop import AGAIN_AFTER, StopOnSignal


@pytest.mark.parametrize("batches", [1, 3, 4, 8, 9, 11])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_micro_batches_add_up_to_the_epochs(batches, accumulation):
    args = SimpleNamespace(gradient_accumulation_steps=accumulation)
    updates = math.ceil(batches / accumulation)
    found = [
        micro_batches(args, TrainerState(global_step=step), range(batches))
        for step in range(3 * updates)
    ]
    assert sum(found) == 3 * batches
    assert max(found) <= accumulation
    assert found[:updates] == found[updates : 2 * updates]


def test_an_endless_dataloader_has_full_updates():
    args = SimpleNamespace(gradient_accumulation_steps=4)
    assert micro_batches(args, TrainerState(global_step=5), iter(())) == 4


def test_metric_lines_that_a_resume_repeats_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = JsonLinesCallback(path)
    lines.on_train_begin(None, TrainerState(global_step=0), TrainerControl())
    for step in (1, 2, 3):
        state = TrainerState(global_step=step)
        lines.on_log(None, state, TrainerControl(), logs={"loss": float(step)})
    with path.open("a", encoding="utf-8") as stream:
        stream.write('{"step": 4, "lo')  # killed while writing
    lines.on_train_begin(None, TrainerState(global_step=2), TrainerControl())
    assert read_metrics(path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]


def test_what_is_not_finite_stays_json(tmp_path):
    lines = JsonLinesCallback(tmp_path / "metrics.jsonl")
    logs = {"eval_loss": math.nan, "loss": math.inf}
    lines.on_log(None, TrainerState(global_step=1), TrainerControl(), logs=logs)
    assert read_metrics(lines.path) == [{"step": 1, "eval_loss": None, "loss": None}]


def test_a_log_in_words():
    assert describe({"loss": 1.25, "train_tokens_per_second": 774.2}) == "loss 1.2500  774 tokens/s"
    assert describe({"eval_loss": 1.5}) == "validation loss 1.5000"
    assert describe({"train_runtime": 3.0}) == ""


def test_progress_is_plain_lines_where_nobody_watches(capsys):
    progress = ProgressCallback("training")
    state = TrainerState(global_step=0, max_steps=4)
    progress.on_train_begin(None, state, TrainerControl())
    state.global_step = 2
    progress.on_step_end(None, state, TrainerControl())
    progress.on_log(None, state, TrainerControl(), logs={"loss": 1.0})
    progress.close()
    screen = capsys.readouterr()
    assert screen.err == "training: step 2/4  loss 1.0000\n"
    assert screen.out == ""


def test_only_a_persons_second_ctrl_c_stops_without_saving():
    """A launcher passes on what its children have had from the terminal; schedulers repeat."""
    said: list[str] = []
    stop = StopOnSignal(said.append)
    with stop.listening():
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            signal.raise_signal(number)
        assert stop.signum == signal.SIGINT
        stop.asked -= 2 * AGAIN_AFTER
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert said == ["saving a checkpoint after this update; Ctrl-C once more stops without saving"]


def test_a_stop_is_asked_for_while_there_is_work_left():
    args = SimpleNamespace(device="cpu")
    for step, stops in ((3, True), (4, False)):
        stop = StopOnSignal()
        stop.signum = signal.SIGTERM
        control = TrainerControl()
        state = TrainerState(global_step=step, max_steps=4, epoch=step / 8)
        stop.on_step_end(args, state, control)
        assert (control.should_save, control.should_training_stop) == (stops, stops)


def test_a_signal_after_the_ranks_agreed_waits_for_the_next_time():
    """Between two meetings one process must not go another way than the others."""
    args, stop, control = SimpleNamespace(device="cpu"), StopOnSignal(), TrainerControl()
    state = TrainerState(global_step=3, max_steps=9, epoch=1.0)
    stop.on_step_end(args, state, control)
    stop.signum = signal.SIGTERM
    stop.on_epoch_end(args, state, control)
    assert not control.should_save
    stop.on_step_end(args, state, control)
    assert control.should_training_stop
    assert not control.should_save  # at the end of the epoch, which this is
    stop.on_epoch_end(args, state, control)
    assert control.should_save
    assert stop.agreed == signal.SIGTERM


def test_a_line_cut_short_costs_only_itself(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo\xff\n[1]\n{"step": 3}\n{"st')
    assert read_metrics(path) == [{"step": 1}, {"step": 3}]


def test_the_closing_line_of_an_interrupted_run_is_dropped(tmp_path):
    lines = JsonLinesCallback(tmp_path / "metrics.jsonl")
    for logs in ({"loss": 1.0}, {"train_loss": 1.0}):
        lines.on_log(None, TrainerState(global_step=2), TrainerControl(), logs=logs)
    lines.on_train_begin(None, TrainerState(global_step=2), TrainerControl())
    assert read_metrics(lines.path) == [{"step": 2, "loss": 1.0}]


def test_a_line_that_does_not_fit_leaves_no_part_of_itself(tmp_path):
    lines = JsonLinesCallback(tmp_path / "metrics.jsonl")
    lines.on_log(None, TrainerState(global_step=1), TrainerControl(), logs={"loss": 1.0})
    before = lines.path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, limits[1]))
    try:
        with pytest.raises(StorageError):
            lines.on_log(None, TrainerState(global_step=2), TrainerControl(), logs={"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert lines.path.read_bytes() == before
