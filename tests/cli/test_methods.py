"""rotmole methods, and every preset through rotmole train as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lanes import first_then_slow
from rotmole import RotMoleConfig
from rotmole.config.load import load_run
from rotmole.models.preview import preview, trainable_by_role
from rotmole.training.build import add_adapter
from rotmole.training.callbacks.metrics import read_metrics
from rotmole.tuner.settings.presets import PRESETS
from rotmole_cli import main
from training_cases import settings, write_data, write_model


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file on disk, with its model and rows; its adapter is to be given."""
    root = tmp_path_factory.mktemp("methods")
    model, data = write_model(root / "model"), root / "data"
    data.mkdir()
    content = settings(model, write_data(data), root / "run", eval_steps=20, save_steps=20)
    path = root / "run.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def adapter_section(name: str) -> str:
    fields = {"preset": name}
    if "r" not in PRESETS[name].fields:
        fields["r"] = 2
    if "target_modules" not in PRESETS[name].fields:
        fields["target_modules"] = ["q_proj", "v_proj"]
    return json.dumps(fields)


@pytest.mark.parametrize("name", first_then_slow(PRESETS))
def test_every_preset_trains_twenty_steps(name: str, run_yaml: Path, tmp_path: Path) -> None:
    """The loss falls, what is trained moves, what is frozen does not, and all of it is saved."""
    words = [f"output_dir={tmp_path / 'run'}", f"adapter={adapter_section(name)}"]
    assert main(["train", str(run_yaml), *words]) == 0
    losses = [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")
              if "loss" in row]  # fmt: skip
    assert len(losses) == 20
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])

    run = load_run(run_yaml, words)
    start = add_adapter(run, AutoModelForCausalLM.from_pretrained(run.model.name))
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    for key, value in start.named_parameters():
        if ".rotmole_" in key:
            moved = not torch.equal(saved[key.replace(".default", "")], value)
            assert moved == value.requires_grad, key
    for key, value in start.named_buffers():  # FlyLoRA's bias
        if ".rotmole_" in key:
            assert not torch.equal(saved[key.replace(".default", "")], value), key

    base = AutoModelForCausalLM.from_pretrained(run.model.name)
    again = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").state_dict()
    for key, value in saved.items():
        parts = key.split(".")
        assert torch.equal(again[".".join([*parts[:-1], "default", parts[-1]])], value)


def test_the_table_has_every_preset_and_counts_lora_by_hand(
    run_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["methods", str(run_yaml), "adapter={r: 2, target_modules: [q_proj, v_proj]}"]
    assert main([*words, "--json"]) == 0
    entries = {row["method"]: row for row in json.loads(capsys.readouterr().out)["methods"]}
    assert list(entries) == ["this run", *PRESETS]
    assert not [name for name, row in entries.items() if "problem" in row]
    factors = 2 * (2 * (32 + 32) + 2 * (32 + 16))  # two layers of q (32 -> 32) and v (32 -> 16)
    lora = entries["lora"]
    assert (lora["trainable"], lora["gates"], lora["modules"]) == (factors, 0, 4)
    assert lora["flops_per_token"] == 2 * factors  # one multiplication and one addition a weight
    moe = entries["moe_lora"]
    router = 4 * 4 * 32
    assert (moe["experts"], moe["gates"]) == (4 * factors, router)
    assert moe["flops_per_token"] == 2 * (4 * factors + router)
    shared_A = 4 * 2 * 32
    assert entries["hydralora"]["experts"] == 4 * factors - 3 * shared_A
    goat = entries["goat"]
    assert goat["trainable"] == 8 * factors + 8 * 4 * 32  # what it subtracts is not trained
    mix = entries["mixlora"]
    assert (mix["gates"], mix["modules"]) == (2 * 8 * 32, 14)  # one router a block
    fly = entries["flylora"]
    assert (fly["gates"], fly["trainable"]) == (0, 2 * 32 * (32 + 16))
    assert main(words) == 0
    table = capsys.readouterr().out
    assert "flylora" in table
    assert "gates included" in table


def test_what_is_frozen_counts_in_no_role(run_yaml: Path) -> None:
    model = load_run(run_yaml).model
    sizes = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    fly = RotMoleConfig.preset("flylora", **sizes | {"r": 1})
    roles = trainable_by_role(preview(model, fly, torch.float32))
    assert roles == {"expert": 2 * 32 * 48, "scaling_gate": 0, "rotation_gate": 0, "other": 0}
    svd = RotMoleConfig.preset("goat", **sizes)
    goat = trainable_by_role(preview(model, svd, torch.float32))
    assert (goat["expert"], goat["other"]) == (2 * 8 * 2 * (64 + 48), 0)


def test_a_preset_that_does_not_fit_says_why_and_the_others_stay(
    run_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = "adapter={r: 16, target_modules: [q_proj]}"
    assert main(["methods", str(run_yaml), wide]) == 0
    printed = capsys.readouterr().out
    assert "goat does not fit this model: init_weights is 'svd': 8 experts of rank 16" in printed
    assert "hydralora" in printed
    assert main(["methods", str(run_yaml), "--model", "smollm2-135m"]) == 2
    assert "not both" in capsys.readouterr().err


def test_a_wrong_preset_is_told_with_the_nearest(
    run_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [str(run_yaml), f"output_dir={tmp_path / 'run'}"]
    assert main(["train", *run, "adapter.preset=goatt", "adapter.top_k=99"]) == 2
    printed = capsys.readouterr().err
    assert "did you mean 'goat'?" in printed
    assert "top_k is 99" in printed
    assert main(["train", *run, "adapter.frozen=AB"]) == 2
    assert "experts_from" in capsys.readouterr().err
