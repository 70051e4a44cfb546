"""Which rows are looked at: an equal share of the tokens for each task and group."""

from __future__ import annotations

from pathlib import Path

import pytest

import rotmole
from planted_cases import Words
from rotmole.data import load_splits
from rotmole.inspection.pages.curves import curves_of
from rotmole.inspection.sample import sample_of, sample_of_text, tokens_of
from rotmole.models.load import load_tokenizer
from training_cases import run_file, write_data, write_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("sample")
    data = root / "data"
    data.mkdir()
    return write_model(root / "model"), write_data(data)


def sample(folders: tuple[Path, Path], limit: int, *overrides: str):
    model, data = folders
    run = run_file(model, data, data / "run", *overrides)
    tokenizer = load_tokenizer(run.model)
    return sample_of(run, load_splits(run.data, seed=0, tokenizer=tokenizer), tokenizer, limit)


def test_tasks_get_equal_shares_and_the_same_rows_each_time(folders) -> None:
    found = sample(folders, 60)
    assert found.words == "validation rows"
    for part in (found.calibration, found.held_out):
        assert part.keys() == {"colours", "sums"}
        for tokens in tokens_of(part).values():
            assert 30 <= tokens < 45
    assert sample(folders, 60) == found
    assert all(len(rows) == 1 for rows in sample(folders, 1).held_out.values())
    assert all("labels" in row for rows in found.held_out.values() for row in rows)


def test_training_rows_are_halved_if_there_are_no_others(folders) -> None:
    data = folders[1]
    words = [f"data.tasks.{task}.files={{train: {data}/{task}.train.jsonl}}"
             for task in ("colours", "sums")]  # fmt: skip
    words += ["training.eval_steps=null"]
    with pytest.warns(UserWarning, match="half of the training rows are looked at"):
        found = sample(folders, 200, *words)
    assert found.words == "training rows"
    for task, rows in found.held_out.items():
        assert 0 <= len(rows) - len(found.calibration[task]) <= 1


def test_groups_are_tasks_of_their_own(folders) -> None:
    words = ["data.tasks={d: {source: locale, kind: units, languages: [de, fr], "
             "limit: {train: 2, validation: 1}}}"]  # fmt: skip
    assert sample(folders, 1000, *words).held_out.keys() == {"d/de", "d/fr"}


def test_a_text_is_divided_at_blank_lines() -> None:
    found = sample_of_text("1 2 3\n\n4 5\n\n6\n\n7 8 9 10", Words(), longest=3)
    assert found.held_out == {"text": [{"input_ids": [1, 2, 3]}, {"input_ids": [7, 8, 9]}]}
    assert found.calibration == {"text": [{"input_ids": [4, 5]}]}
    assert sample_of_text("1 2", Words()).calibration == {}
    with pytest.raises(rotmole.ConfigError, match="no two tokens"):
        sample_of_text("1\n\n2", Words())


def test_losses_of_a_run_are_read_by_task(tmp_path: Path) -> None:
    lines = [
        '{"step": 1, "loss": 3.0}', '{"step": 2, "loss": 2.0, "train_loss": 9.0}',
        '{"step": 2, "eval_loss": 2.5, "eval_sums_loss": 2.25, "eval_runtime": 1.0}',
        '{"step": 2, "eval_loss": 2.4}',
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert curves_of(tmp_path) == {
        "": ((1.0, 3.0), (2.0, 2.0)), "all": ((2.0, 2.4),), "sums": ((2.0, 2.25),)
    }  # fmt: skip
    assert curves_of(tmp_path / "none") == {}
