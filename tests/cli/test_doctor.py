from __future__ import annotations

import json
import sys
from importlib.metadata import metadata

import peft
import pytest
import torch
from peft import get_peft_model

import rotmole
import rotmole.cli.doctor as module
import tiny
from rotmole_cli import main


@pytest.fixture
def adapter(tmp_path):
    """A RotMoLE adapter as PEFT saves it."""
    config = rotmole.RotMoleConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny.llama(), config)
    model.peft_config["default"].base_model_name_or_path = "organisation/name"
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return tmp_path / "adapter"


def test_it_lists_versions_ranges_devices_and_caches(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ROTMOLE_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["doctor"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["peft", peft.__version__, ">=0.20"] in lines
    assert ["torch", torch.__version__, ">=2.6"] in lines
    assert ["HF_HUB_OFFLINE", "1"] in lines
    assert ["cache", str(tmp_path)] in lines
    assert lines[[line[:1] for line in lines].index(["threads"])][:2] == ["threads", "1"]
    packages = [line[0] for line in lines if line[2:] and line[2][0] == ">"]
    assert len(packages) == len(set(packages))
    assert lines[-1] == ["no", "problems", "found."]
    shown = {line[0] for line in lines if line} | {line[1] for line in lines if line[1:]}
    assert {"trl", "babel", "bitsandbytes"} <= shown
    assert not {"ruff", "pytest", "mypy", "hypothesis", "mutation", "conformance"} & shown


def test_every_extra_is_a_users_or_a_developers():
    extras = set(metadata("rotmole").get_all("Provides-Extra"))
    assert extras == {*module.USERS_EXTRAS, "dev", "mutation", "conformance"} - {""}


def test_a_version_out_of_range(monkeypatch, capsys):
    real = module.version
    monkeypatch.setattr(module, "version", lambda name: "0.1" if name == "peft" else real(name))
    assert main(["doctor"]) == 2
    assert (
        "problem: peft 0.1 is outside >=0.20: pip install 'peft>=0.20'." in capsys.readouterr().out
    )


def test_a_missing_extra_is_no_fault_but_named(monkeypatch, capsys):
    real = module.version

    def version(name):
        if name == "trl":
            raise module.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(module, "version", version)
    assert main(["doctor"]) == 0
    assert (
        "missing       trl\n                pip install 'rotmole[train]'" in capsys.readouterr().out
    )


def test_a_cache_that_cannot_be_written(monkeypatch, capsys):
    monkeypatch.setenv("ROTMOLE_CACHE", "/proc/rotmole" if sys.platform == "linux" else "/nowhere")
    assert main(["doctor"]) == 2
    assert "set ROTMOLE_CACHE" in capsys.readouterr().out


def test_a_good_adapter_and_the_line_it_needs(adapter, capsys):
    assert main(["doctor", str(adapter)]) == 0
    shown = capsys.readouterr().out
    assert "method ROTMOLE, base model organisation/name" in shown
    assert "`import rotmole`" in shown
    assert "KeyError: 'ROTMOLE'" in shown


def test_a_broken_adapter(adapter, capsys):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": -4, "top_k": "x"}))
    assert main(["doctor", str(adapter)]) == 2
    shown = capsys.readouterr().out
    assert "r is -4; it must be a whole number of at least 1" in shown
    assert "top_k: 'x' is not a whole number" in shown


def test_an_adapter_whose_base_is_elsewhere(adapter, capsys):
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text()) | {"base_model_name_or_path": "/gone/model"}
    file.write_text(json.dumps(config))
    assert main(["doctor", str(adapter)]) == 2
    assert "/gone/model named in" in capsys.readouterr().out
