from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

import rotmole.config
import rotmole_cli.init
from rotmole.comparison.study import load_study
from rotmole.config.load import load_run
from rotmole_cli import main

SHIPPED = Path(rotmole.config.__file__).parent / "templates"
LAUNCH = SHIPPED.parent / "launch"


def test_the_file_is_written_and_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    assert capsys.readouterr().out == "wrote run.yaml (template quickstart)\n"
    assert (tmp_path / "run.yaml").read_text() == (SHIPPED / "quickstart.yaml").read_text()
    assert load_run("run.yaml").model.name == "smollm2-135m"
    assert [file.name for file in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize("template", [path.stem for path in sorted(SHIPPED.glob("*.yaml"))])
def test_every_template_by_name(tmp_path, template):
    assert main(["init", str(tmp_path / "x.yaml"), "--template", template]) == 0
    assert (tmp_path / "x.yaml").read_text() == (SHIPPED / f"{template}.yaml").read_text()


@pytest.mark.slow
def test_the_template_of_a_study_is_a_study(tmp_path, capsys):
    assert main(["init", str(tmp_path), "--template", "compare"]) == 0
    (file,) = tmp_path.iterdir()
    assert file.name == "study.yaml"
    study = load_study(file)
    assert all(sized.equal for sized in study.sized.values())  # to two per cent
    assert list(study.file.methods) == ["lora", "moe_lora", "rotmole", "shared"]
    assert study.file.tune is None
    assert study.model.dtype == "float32"
    rows = study.file.base["training"]["per_device_train_batch_size"]
    limits = [task["limit"]["train"] for task in study.file.base["data"]["tasks"].values()]
    assert rows * study.file.base["training"]["max_steps"] == 3 * sum(limits)  # each row once


@pytest.mark.parametrize("name", [path.name for path in sorted(LAUNCH.iterdir())])
def test_a_launch_file_goes_beside_the_run_file(tmp_path, name):
    file = tmp_path / name
    assert main(["init", str(tmp_path), "--template", file.stem]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert file.read_text() == (LAUNCH / name).read_text()
    if file.suffix == ".yaml":
        assert type(load_config_from_file(str(file))).__name__ == "ClusterConfig"


def test_an_existing_file_is_kept_unless_forced(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("mine")
    assert main(["init", str(file)]) == 2
    assert file.read_text() == "mine"
    assert "exists already" in capsys.readouterr().err
    assert main(["init", str(file), "--force"]) == 0
    assert file.read_text() != "mine"


def test_a_folder_gets_a_run_yaml(tmp_path):
    assert main(["init", str(tmp_path)]) == 0
    assert (tmp_path / "run.yaml").is_file()


def test_an_unknown_template(tmp_path, capsys):
    assert main(["init", str(tmp_path / "x.yaml"), "-t", "quickstrat"]) == 2
    error = capsys.readouterr().err
    assert "did you mean 'quickstart'?" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_missing(tmp_path, capsys):
    assert main(["init", str(tmp_path / "no" / "x.yaml")]) == 4
    assert "cannot write" in capsys.readouterr().err


def test_the_list_names_every_template(capsys):
    assert main(["init", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(rotmole_cli.init.templates())
    assert all(len(line) <= 110 for line in lines)
