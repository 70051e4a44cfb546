from __future__ import annotations

import json
import sys
from importlib.metadata import metadata
from pathlib import Path

import peft
import pytest
import torch
from peft import LilyConfig, LoraConfig, PolyConfig, get_peft_model
from transformers import LlamaForCausalLM

import rotmole
import rotmole.cli.doctor as module
import tiny
from rotmole_cli import main
from tiny_folders import write_model


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
    for_developers = {"dev", "docs", "pages", "notebooks", "release", "mutation", "conformance"}
    assert extras == {*module.USERS_EXTRAS, *for_developers} - {""}


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


LAWS = {"lora": LoraConfig, "lily": LilyConfig}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def trained(base, tmp_path):
    """Save an adapter of PEFT's for the base model, with weights that do something."""

    def save(method: str, std: float = 0.5) -> Path:
        config = LAWS[method](r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
        torch.manual_seed(0)
        model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, std)
        model.save_pretrained(tmp_path / method, save_embedding_layers=False)
        return tmp_path / method

    return save


def test_laws_of_an_adapter_that_keeps_them(trained, capsys):
    assert main(["doctor", "--laws", str(trained("lora"))]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == "all laws are kept."
    assert [line.split()[-1] for line in shown if line.endswith(("kept", "BROKEN"))] == ["kept"] * 9
    assert max(map(len, shown[2:])) <= 80  # the lines before have paths


def test_laws_of_an_adapter_that_breaks_them(trained, base, capsys):
    adapter = trained("lily")
    file = adapter / "adapter_config.json"
    content = json.loads(file.read_text()) | {"base_model_name_or_path": None}
    file.write_text(json.dumps(content))
    assert main(["doctor", "--laws", str(adapter)]) == 2
    assert "does not name its base model; add --base MODEL." in capsys.readouterr().err
    assert main(["doctor", "--laws", str(adapter), "--base", str(base), "--dtype", "float16"]) == 2
    shown = capsys.readouterr().out
    assert "method LILY" in shown
    assert "float16 on " in shown
    named = [line.split(": ")[1] for line in shown.splitlines() if line.startswith("problem: ")]
    assert named == ["other rows", "padding left", "padding right", "cache", "later tokens"]


def test_laws_of_an_adapter_that_does_nothing(trained, capsys):
    assert main(["doctor", "--laws", str(trained("lily", std=0.0))]) == 2
    assert "no fault of it could be seen; test it after training" in capsys.readouterr().out


def test_laws_of_an_adapter_that_needs_what_a_forward_pass_does_not_have(base, tmp_path, capsys):
    config = PolyConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    model.save_pretrained(tmp_path / "poly", save_embedding_layers=False)
    assert main(["doctor", "--laws", str(tmp_path / "poly")]) == 2
    shown = capsys.readouterr().out
    (problem,) = [line for line in shown.splitlines() if line.startswith("problem: ")]
    assert "the model ended in an error (ValueError: task_ids should not be None.)" in problem


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--laws"], "--laws needs an adapter; give its folder."),
        (["--base", "x"], "--base has no effect without --laws."),
        (["--laws", "x", "--dtype", "int8"], "--dtype is 'int8'; it must be one of float32"),
        (["--laws", "nowhere"], "there is no file or folder nowhere"),
    ],
)
def test_laws_that_cannot_be_measured(words, said, capsys):
    assert main(["doctor", *words]) == 2
    assert said in capsys.readouterr().err
