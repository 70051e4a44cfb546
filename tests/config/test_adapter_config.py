"""The run file holds the adapter's configuration, which is made and warns once in a run."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from rotmole import ConfigError, RotMoleConfig
from rotmole.models.preview import adapter_problems
from rotmole.training.build import add_adapter
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
    copied = run.model_copy(update={"adapter": run.adapter | {"r": 6}})
    with pytest.raises(ConfigError, match="load_run"):
        _ = copied.adapter_config
    run.adapter["r"] = 6
    with pytest.raises(ConfigError, match="load_run"):
        _ = run.adapter_config


def test_another_process_gets_the_configuration_with_the_run(tmp_path: Path) -> None:
    run = run_file(tmp_path, tmp_path, tmp_path / "run")
    assert pickle.loads(pickle.dumps(run)).adapter_config == run.adapter_config


def test_what_training_does_to_its_configuration_leaves_that_of_the_run(tmp_path: Path) -> None:
    run = run_file(write_model(tmp_path / "model"), tmp_path, tmp_path / "run")
    before = run.adapter_config.to_dict()
    base = AutoModelForCausalLM.from_pretrained(run.model.name)
    model = add_adapter(run, base)
    assert model.peft_config["default"].base_fingerprint is not None
    assert adapter_problems(run.model, run.adapter_config) == []
    assert run.adapter_config.to_dict() == before
