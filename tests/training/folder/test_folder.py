"""The run folder: whose it is, and what goes when a new run takes it."""

from __future__ import annotations

import pytest

from checkpoint_cases import checkpoint, unfinished
from rotmole.errors import InputError
from rotmole.training.checkpoints.seal import begin
from rotmole.training.folder.layout import UNFINISHED, check_free, clear


def test_a_finished_run_gives_way_whole(tmp_path):
    checkpoint(tmp_path, 5)
    scores = ("eval.json", "predictions.jsonl", "evaluation.json")  # the last one is of 0.1.0
    for name in ("manifest.json", "metrics.jsonl", *scores, "notes.txt"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    (tmp_path / "adapter").mkdir()
    check_free(tmp_path)
    clear(tmp_path, resuming=False)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_checkpoints_of_others_and_unfinished_runs_stay(tmp_path):
    kept = checkpoint(tmp_path, 5)
    unfinished(tmp_path, 10)
    with pytest.raises(InputError, match="--resume auto to go on from checkpoint-5"):
        check_free(tmp_path)
    (tmp_path / "adapter").mkdir()
    with pytest.raises(InputError, match="not rotmole's"):
        check_free(tmp_path)
    clear(tmp_path, resuming=True)
    assert kept.is_dir()


def test_a_finished_run_that_was_taken_up_again_is_unfinished(tmp_path):
    checkpoint(tmp_path, 5)
    (tmp_path / "manifest.json").touch()
    (tmp_path / "adapter").mkdir()
    check_free(tmp_path)
    (tmp_path / UNFINISHED).touch()
    with pytest.raises(InputError, match="an unfinished run with checkpoint checkpoint-5"):
        check_free(tmp_path)


def test_figures_of_the_base_model_are_no_reason_to_refuse_and_stay(tmp_path):
    scores = tmp_path / "eval.json"
    scores.touch()
    check_free(tmp_path)
    clear(tmp_path, resuming=False)
    assert scores.exists()


def test_what_a_crash_left_goes(tmp_path):
    (tmp_path / ".adapter-0a1b").mkdir()
    (tmp_path / ".run.yaml.17.ab.tmp").write_text("half", encoding="utf-8")
    (tmp_path / "failure.json").write_text("{}", encoding="utf-8")
    clear(tmp_path, resuming=True)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_died_in_its_first_checkpoint_may_start_anew(tmp_path):
    begin(tmp_path / "checkpoint-5")
    (tmp_path / "checkpoint-10").mkdir()
    check_free(tmp_path)
    clear(tmp_path, resuming=False)
    assert list(tmp_path.iterdir()) == []
