"""What a path means: a run.yaml beside an adapter counts only where a run wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from peft import get_peft_model

import tiny_folders
from rotmole import RotMoleConfig
from rotmole.config.load import load_run, resolved_yaml
from rotmole.errors import ConfigError
from rotmole.evaluation.target import find_target


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with an adapter of the model `base`, and a run file that names `other`."""
    base = tiny_folders.write_model(tmp_path / "base")
    words = tiny_folders.tokenizer()
    model = tiny_folders.llama(words)
    model.config._name_or_path = model.name_or_path = str(base)
    config = RotMoleConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    other = tiny_folders.write_model(tmp_path / "other")
    (tmp_path / "rows.jsonl").write_text(
        '{"prompt": "a", "completion": "b"}\n' * 3, encoding="utf-8"
    )
    files = {split: str(tmp_path / "rows.jsonl") for split in ("train", "validation")}
    run = {
        "output_dir": str(tmp_path),
        "model": {"name": str(other)},
        "data": {"tasks": {"letters": {"source": "jsonl", "files": files}}},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    assert load_run(tmp_path / "run.yaml").model.name == str(other)
    return tmp_path


def test_a_stray_run_file_beside_an_adapter_is_not_its_own(place: Path) -> None:
    target = find_target(place / "adapter")
    assert target.run is None
    assert target.model.name == str(place / "base")
    assert target.folder == place / "adapter"
    with pytest.raises(ConfigError, match="is not in a run folder"):
        find_target(place / "adapter", overrides=["seed=3"])


def test_the_run_file_of_the_run_folder_is(place: Path) -> None:
    (place / "manifest.json").write_text("{}", encoding="utf-8")
    target = find_target(place / "adapter")
    assert target.run is not None
    assert target.model.name == str(place / "other")
    assert target.folder == place


def test_generating_needs_neither_the_data_nor_the_run_file(place: Path) -> None:
    (place / "manifest.json").write_text("{}", encoding="utf-8")
    (place / "rows.jsonl").unlink()
    with pytest.raises(ConfigError, match="no file"):
        find_target(place)
    assert find_target(place, needs_data=False).adapter == place / "adapter"
    (place / "run.yaml").unlink()
    target = find_target(place)
    assert (target.adapter, target.run) == (place / "adapter", None)
    assert target.model.name == str(place / "base")


def test_a_moved_run_folder_is_the_same_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its run.yaml has absolute paths; rotmole 0.1 wrote those of the working directory."""
    folder = place / "runs" / "1"
    folder.mkdir(parents=True)
    (place / "adapter").rename(folder / "adapter")
    (folder / "manifest.json").write_text("{}", encoding="utf-8")
    monkeypatch.chdir(place)
    run = load_run(place / "run.yaml", ["data.root=.", "data.tasks.letters.files.train=rows.jsonl"])
    (folder / "run.yaml").write_text(resolved_yaml(run), encoding="utf-8")
    moved = folder.rename(place / "moved")
    monkeypatch.chdir("/")
    target = find_target(moved)
    assert target.run is not None
    assert target.run.data.root == str(place)
    old = run.model_dump(mode="json")  # with relative paths
    (moved / "run.yaml").write_text(yaml.safe_dump(old), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"there is no file rows.jsonl \(data.root is \."):
        find_target(moved)
    monkeypatch.chdir(place)
    assert find_target(moved).run is not None
