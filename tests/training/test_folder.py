"""The run folder: whose it is, and which checkpoint counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from rotmole.errors import InputError, StorageError
from rotmole.training.folder import checkpoints, claim, find_resume

FILES = (
    "trainer_state.json", "adapter_model.safetensors", "adapter_config.json", "optimizer.pt",
    "scheduler.pt",
)  # fmt: skip


def checkpoint(run_dir: Path, step: int, leave_out: str = "", empty: str = "") -> Path:
    folder = run_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in FILES:
        if name != leave_out:
            (folder / name).write_text("" if name == empty else "x", encoding="utf-8")
    return folder


def test_auto_takes_the_newest_complete_checkpoint(tmp_path, caplog):
    checkpoint(tmp_path, 90)
    right = checkpoint(tmp_path, 100)
    checkpoint(tmp_path, 110, leave_out="optimizer.pt")
    checkpoint(tmp_path, 120, empty="trainer_state.json")
    (tmp_path / "checkpoint-best").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == [
        f"checkpoint-{step}" for step in (90, 100, 110, 120)
    ]
    assert find_resume(tmp_path, "auto") == right
    assert "checkpoint-110" in caplog.text
    assert "optimizer.pt" in caplog.text


def test_auto_starts_anew_where_there_is_nothing(tmp_path):
    assert find_resume(tmp_path / "missing", "auto") is None
    assert find_resume(tmp_path, None) is None


@pytest.mark.parametrize("name", FILES)
def test_a_named_checkpoint_must_be_complete(tmp_path, name):
    folder = checkpoint(tmp_path, 5, leave_out=name)
    with pytest.raises(InputError, match=name):
        find_resume(tmp_path, str(folder))
    with pytest.raises(InputError, match="no such folder"):
        find_resume(tmp_path, str(tmp_path / "nowhere"))


def test_a_finished_run_gives_way_whole(tmp_path):
    checkpoint(tmp_path, 5)
    for name in ("manifest.json", "metrics.jsonl", "evaluation.json", "notes.txt"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    (tmp_path / "adapter").mkdir()
    claim(tmp_path, resuming=False)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_checkpoints_of_others_and_unfinished_runs_stay(tmp_path):
    kept = checkpoint(tmp_path, 5)
    with pytest.raises(InputError, match="--resume auto"):
        claim(tmp_path, resuming=False)
    (tmp_path / "adapter").mkdir()
    with pytest.raises(InputError, match="not rotmole's"):
        claim(tmp_path, resuming=False)
    claim(tmp_path, resuming=True)
    assert kept.is_dir()


def test_a_file_in_the_way_is_a_storage_error(tmp_path):
    (tmp_path / "run").write_text("x", encoding="utf-8")
    with pytest.raises(StorageError):
        claim(tmp_path / "run", resuming=False)
