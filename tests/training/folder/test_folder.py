"""The run folder: whose it is, and what goes when a new run takes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoint_cases import checkpoint, unfinished
from rotmole.errors import InputError
from rotmole.training.checkpoints.seal import begin, faults
from rotmole.training.folder.layout import (
    UNFINISHED,
    check_free,
    clear,
    drop_previous,
    is_being_cleared,
)


def finished_run(folder: Path) -> list[str]:
    checkpoint(folder, 5)
    names = ["manifest.json", "metrics.jsonl", "evaluation.json", "eval.json", "predictions.jsonl"]
    for name in names:
        (folder / name).write_text("x", encoding="utf-8")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "weights").write_text("w", encoding="utf-8")
    return sorted([*names, "adapter", "checkpoint-5"])


@pytest.mark.parametrize("links", [True, False])
def test_a_finished_run_stays_whole_until_its_successor_is_complete(tmp_path, monkeypatch, links):
    if not links:  # a file system without them
        monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError(1, "no links")))
    names = finished_run(tmp_path)
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    check_free(tmp_path)
    clear(tmp_path, resuming=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        UNFINISHED, "notes.txt", "previous",
    ]  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "previous").iterdir()) == names
    assert not faults(tmp_path / "previous" / "checkpoint-5")
    check_free(tmp_path)  # the new one died before its first checkpoint
    clear(tmp_path, resuming=False)
    assert sorted(path.name for path in (tmp_path / "previous").iterdir()) == names
    drop_previous(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [UNFINISHED, "notes.txt"]


def test_a_folder_of_that_name_that_somebody_else_made_stays(tmp_path):
    finished_run(tmp_path)
    (tmp_path / "previous").mkdir()
    with pytest.raises(InputError, match="previous' is where a finished run would be kept"):
        check_free(tmp_path)


def test_a_second_successor_keeps_the_newest_finished_run(tmp_path):
    """The first one was complete, and died before it removed its predecessor."""
    finished_run(tmp_path)
    clear(tmp_path, resuming=False)
    finished_run(tmp_path)
    (tmp_path / "manifest.json").write_text("newer", encoding="utf-8")
    (tmp_path / UNFINISHED).unlink()
    clear(tmp_path, resuming=False)
    assert (tmp_path / "previous" / "manifest.json").read_text(encoding="utf-8") == "newer"


def test_what_is_left_of_a_run_that_was_being_removed_is_no_run(tmp_path):
    finished_run(tmp_path)
    clear(tmp_path, resuming=False)
    assert not is_being_cleared(tmp_path)
    (tmp_path / UNFINISHED).write_text("clearing", encoding="utf-8")
    assert is_being_cleared(tmp_path)
    checkpoint(tmp_path, 5)
    clear(tmp_path, resuming=False)
    assert not is_being_cleared(tmp_path)
    assert not (tmp_path / "checkpoint-5").exists()


def test_a_run_that_died_before_its_manifest_may_start_anew(tmp_path):
    clear(tmp_path, resuming=False)
    (tmp_path / "run.yaml").write_text("seed: 0", encoding="utf-8")
    check_free(tmp_path)
    (tmp_path / UNFINISHED).unlink()
    with pytest.raises(InputError, match=r"holds run\.yaml, which a run"):
        check_free(tmp_path)


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
    assert [path.name for path in tmp_path.iterdir()] == [UNFINISHED]


def test_a_run_that_died_in_its_first_checkpoint_may_start_anew(tmp_path):
    begin(tmp_path / "checkpoint-5")
    (tmp_path / "checkpoint-10").mkdir()
    check_free(tmp_path)
    clear(tmp_path, resuming=False)
    assert [path.name for path in tmp_path.iterdir()] == [UNFINISHED]
