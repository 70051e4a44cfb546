"""The run file holds the adapter's configuration, which is made and warns once in a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rotmole import ConfigError, RotMoleConfig
from rotmole_cli import main
from training_cases import run_file, settings, write_data, write_model


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[RotMoleConfig]:
    """Every RotMoleConfig that is made while the test runs."""
    configs: list[RotMoleConfig] = []
    check = RotMoleConfig.__post_init__

    def count(config: RotMoleConfig) -> None:
        configs.append(config)
        check(config)

    monkeypatch.setattr(RotMoleConfig, "__post_init__", count)
    return configs


def test_a_run_makes_it_once_and_warns_once(
    made: list[RotMoleConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = write_model(tmp_path / "model"), tmp_path / "data"
    data.mkdir()
    run = settings(model, write_data(data), tmp_path / "run")
    run["adapter"]["radar_rank"] = 2  # without a radar rotation
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    words = ["train", str(tmp_path / "run.yaml")]
    assert main([*words, "training.max_steps=5"]) == 0
    assert len(made) == 1
    assert capsys.readouterr().err.count("has no effect") == 1
    made.clear()
    assert main([*words, "training.max_steps=10", "--resume", "auto"]) == 0
    assert len(made) <= 2  # PEFT may make one when it loads a checkpoint
    assert capsys.readouterr().err.count("has no effect") == 1


def test_an_adapter_section_that_changed_after_the_check_is_refused(tmp_path: Path) -> None:
    run = run_file(tmp_path, tmp_path, tmp_path / "run")
    assert run.adapter_config.r == run.adapter["r"] == 4
    changed = run.model_copy(update={"adapter": run.adapter | {"r": 6}})
    with pytest.raises(ConfigError, match="load_run"):
        _ = changed.adapter_config
