"""Callbacks: the balance loss's scale, metric lines, and words for a log."""

from __future__ import annotations

import io
import math
import re
import resource
import signal
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from rotmole.errors import StorageError
from rotmole.training.callbacks.balance import micro_batches
from rotmole.training.callbacks.batch_size import BatchSizeCallback
from rotmole.training.callbacks.early import EarlyStopping, validations_without_a_better
from rotmole.training.callbacks.metrics import JsonLinesCallback, read_metrics
from rotmole.training.callbacks.progress import Clock, ProgressCallback, describe
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
    logs = {
        "loss": 1.25, "learning_rate": 5e-4, "grad_norm": 0.8765, "router_aux_loss": 1.0,
        "epoch": 1,
        "train_tokens_per_second": 774.2, "experts_unused": 3, "experts_total": 480,
        "largest_expert_share": 0.5, "largest_expert_share_mean": 0.31, "expert_share_even": 0.25,
        "expert_share_ceiling": 0.5, "rotation_angle": 0.1234,
    }  # fmt: skip
    assert describe(logs) == [
        "loss 1.2500", "rate 5.00e-04", "gradient 0.876", "balance 1.000", "774 tokens/s",
        "3 of 480 experts unused",
        "most used expert of any layer 50 % of choices (even 25 %, at most 50 %)",
        "turned by 0.12 rad (at most 3.14)",
    ]  # fmt: skip
    tasks = {"eval_loss": 1.5, "eval_sums_loss": 1.0, "eval_dates_loss": 2.0, "eval_runtime": 95.0}
    assert describe(tasks) == ["loss 1.5000", "sums 1.0000", "dates 2.0000", "in 1 min 35 s"]
    assert describe({"eval_loss": 1.5, "eval_sums_loss": 1.5}) == ["loss 1.5000"]
    assert describe({"train_runtime": 3.0}) == []


def training_args(**settings) -> SimpleNamespace:
    strategies = {"save_strategy": "no", "eval_strategy": "steps", "auto_find_batch_size": False}
    return SimpleNamespace(**(strategies | settings))


def test_progress_is_plain_lines_where_nobody_watches(capsys, monkeypatch):
    """Updates take 2 seconds, a validation 30: the time left counts the two that are to come."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress, args, control = ProgressCallback("training"), training_args(), TrainerControl()
    progress.validation_batches = 9
    state = TrainerState(global_step=0, max_steps=12, eval_steps=4)

    def update(step: int) -> None:
        now[0] += 2.0
        state.global_step = step
        progress.on_step_end(args, state, control)

    progress.on_train_begin(args, state, control)
    for step in range(1, 5):
        update(step)
    for _ in range(3):
        now[0] += 10.0
        progress.on_prediction_step(args, state, control)
    progress.on_log(args, state, control, logs={"eval_loss": 1.5, "eval_runtime": 30.0})
    progress.on_evaluate(args, state, control)
    update(5)
    progress.on_log(args, state, control, logs={"loss": 1.0})
    progress.close()
    screen = capsys.readouterr()
    assert screen.err.splitlines() == [
        "validation: batch 2 of 9",
        "validation   4/12  loss 1.5000  in 30 s",
        "update       5/12  loss 1.0000  1 min 14 s left (1 min validation)",
    ]
    assert screen.out == ""


@pytest.mark.parametrize("width", [80, 120])
def test_progress_on_a_terminal_keeps_a_history_that_fits(monkeypatch, width):
    """Lines break between figures; the bar is gone at the end; NO_COLOR leaves no colour."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    for name, value in (("COLUMNS", str(width)), ("LINES", "40"), ("NO_COLOR", "1"),
                        ("TERM", "xterm")):  # fmt: skip
        monkeypatch.setenv(name, value)
    progress, args, control = ProgressCallback(), training_args(), TrainerControl()
    state = TrainerState(global_step=0, max_steps=2, eval_steps=1)
    progress.on_train_begin(args, state, control)
    logs = {"loss": 1.25, "learning_rate": 5e-4, "grad_norm": 0.8765, "router_aux_loss": 1.0,
            "train_tokens_per_second": 774.2, "experts_unused": 3, "experts_total": 480,
            "largest_expert_share": 0.31, "expert_share_even": 0.25,
            "expert_share_ceiling": 0.5}  # fmt: skip
    state.global_step = 1
    progress.on_step_end(args, state, control)
    progress.on_log(args, state, control, logs=logs)
    progress.on_prediction_step(args, state, control)
    progress.on_log(args, state, control, logs={"eval_loss": 1.0, "eval_runtime": 3.0})
    progress.on_evaluate(args, state, control)
    progress.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-ln-z]", "", screen.getvalue())
    assert "\x1b[3" not in text
    lines = text.replace("\r", "\n").splitlines()
    figures = [line.rstrip() for line in lines if "loss" in line or "experts" in line]
    if width == 80:
        assert figures[:2] == [
            "update        1/2  loss 1.2500  rate 5.00e-04  gradient 0.876  balance 1.000",
            "                   774 tokens/s  3 of 480 experts unused",
        ]
    assert figures[-1] == "validation    1/2  loss 1.0000  in 3 s"
    assert max(map(len, figures)) <= width


@pytest.mark.parametrize(
    ("strategy", "every", "step", "epoch", "times"),
    [("no", 4, 0, 0, 0), ("steps", 4, 0, 0, 3), ("steps", 4, 4, 0, 2), ("steps", 4, 10, 0, 0),
     ("epoch", None, 5, 0.5, 2)],
)  # fmt: skip
def test_validations_to_come_are_counted(strategy, every, step, epoch, times):
    state = TrainerState(
        global_step=step, max_steps=10, eval_steps=every, num_train_epochs=2, epoch=epoch
    )
    clock = Clock(rows_an_update=8, validation_rows=48)
    clock.updates.append(2.0)
    training, validation = clock.left(training_args(eval_strategy=strategy), state)
    assert training == 2.0 * (10 - step)
    assert validation == pytest.approx(times * 2.0 / 3 * 48 / 8)  # none was made yet


def test_a_batch_size_that_was_found_is_told_once(caplog):
    told: list[tuple[int, int]] = []
    callback = BatchSizeCallback(lambda *sizes: told.append(sizes))
    for size, finds in ((4, True), (2, True), (2, True), (1, True), (3, False)):
        args = training_args(auto_find_batch_size=finds, per_device_train_batch_size=4)
        state = TrainerState(train_batch_size=size)
        callback.on_step_end(args, state, TrainerControl())
    assert told == [(4, 2), (4, 1)]


def state_at(step: int, best: float | None = 1.0) -> TrainerState:
    state = TrainerState(global_step=step, best_metric=best)
    state.stateful_callbacks = {}
    return state


def test_early_stopping_goes_on_counting_after_a_resume():
    args = SimpleNamespace(greater_is_better=False, metric_for_best_model="eval_loss")
    control, state = TrainerControl(), state_at(4)
    first = EarlyStopping(2)
    first.on_train_begin(args, state, control)
    first.on_evaluate(args, state, control, metrics={"eval_loss": 1.5})
    assert not control.should_training_stop
    state.stateful_callbacks["EarlyStopping"] = first.state()  # as the Trainer saves it
    assert validations_without_a_better(state) == 1
    for best, stops in ((1.0, True), (None, False)):  # the best may have been forgotten
        resumed, control = EarlyStopping(2), TrainerControl()
        again = state_at(4, best)
        again.stateful_callbacks = dict(state.stateful_callbacks)
        resumed.on_train_begin(args, again, control)
        resumed.on_evaluate(args, again, control, metrics={"eval_loss": 1.5})
        assert control.should_training_stop == stops
    fresh, control = EarlyStopping(1), TrainerControl()
    fresh.on_train_begin(args, state_at(4), control)  # of a run without early stopping
    assert fresh.early_stopping_patience_counter == 0


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
