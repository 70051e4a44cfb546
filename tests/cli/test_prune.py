"""rotmole prune as a user runs it: what it writes, what it says, and when it writes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rotmole import RotMoleConfig
from rotmole_cli import main
from training_cases import settings, write_data, write_model

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two updates; no token chooses expert 2 of the first layer, and 0 and 1 are twins."""
    root = tmp_path_factory.mktemp("prune")
    model, data = write_model(root / "model"), root / "data"
    data.mkdir()
    content = settings(
        model, write_data(data), root / "run", max_steps=2, save_steps=2, eval_steps=2
    )
    content["adapter"] |= {"num_experts": 4, "router_bias_rate": 1e-6, "rotation": "none"}
    path = root / "run.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    assert main(["train", str(path)]) == 0
    weights = root / "run" / "adapter" / WEIGHTS
    tensors = load_file(weights)
    first = next(name for name in tensors if name.endswith("router_bias"))
    tensors[first][2] = -1e3
    for name in tensors:
        if name.endswith(("expert_A", "expert_B")):
            tensors[name][1] = tensors[name][0]
    save_file(tensors, weights, metadata={"format": "pt"})
    return root / "run"


def test_what_is_unused_goes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "pruned"
    assert main(["prune", str(run), "--output", str(output), "--limit", "20"]) == 0
    said = capsys.readouterr().out
    assert "4 -> 3" in said
    assert said.count("4 -> 4") == said.count(" -> ") - 2  # the other routers, and the parameters
    assert "KL" in said
    figures = json.loads((output / "prune.json").read_text(encoding="utf-8"))
    assert [router["unused"] for router in figures["routers"] if router["unused"]] == [[2]]
    assert figures["difference"]["kl"] < 1e-6
    assert (output / "README.md").is_file()
    config = RotMoleConfig.from_pretrained(str(output))
    assert list(config.num_experts_pattern.values()) == [3]
    assert main(["generate", str(output), "red 0 then ", "--max-new-tokens", "2"]) == 0
    assert main(["eval", str(output), "--config", str(run / "run.yaml"), "--limit", "2"]) == 0


def test_a_pruned_adapter_is_trained_on(run: Path, tmp_path: Path) -> None:
    pruned, on = tmp_path / "pruned", tmp_path / "on"
    assert main(["prune", str(run), "--output", str(pruned), "--limit", "20"]) == 0
    content = yaml.safe_load((run / "run.yaml").read_text(encoding="utf-8"))
    content |= {"adapter": {}, "init_from": str(pruned), "output_dir": str(on)}
    content["training"]["learning_rate"] = 0.0
    file = tmp_path / "on.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    assert main(["train", str(file)]) == 0
    before, after = (load_file(folder / WEIGHTS) for folder in (pruned, on / "adapter"))
    assert before.keys() == after.keys()
    assert all(before[n].shape == after[n].shape for n in before)
    same = [n for n in before if not n.endswith("router_bias")]  # which moves by loads, not rates
    assert all(torch.equal(before[n], after[n]) for n in same)


def test_twins_are_merged_and_too_much_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["prune", str(run), "--limit", "10", "--output"]
    merged = tmp_path / "merged"
    options = ["--similarity", "0.99", "--max-difference", "0.5"]
    assert main([*words, str(merged), *options]) == 0
    routers = json.loads((merged / "prune.json").read_text(encoding="utf-8"))["routers"]
    assert all({frozenset(pair) for pair in router["merged"].items()} for router in routers)
    capsys.readouterr()
    refused = tmp_path / "refused"
    options = ["--similarity", "0.99", "--max-difference", "0"]
    assert main([*words, str(refused), *options]) == 1
    said = capsys.readouterr()
    assert "more than --max-difference 0" in said.err
    assert "predictions" in said.out  # what was measured
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]


def test_an_adapter_folder_needs_rows(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(run / "adapter", alone)
    words = ["prune", str(alone), "--limit", "4", "--output", str(tmp_path / "pruned")]
    assert main(words) == 2
    assert "--data RUN.yaml" in capsys.readouterr().err
    assert main([*words, "--data", str(run / "run.yaml")]) == 0
    assert main([*words, "--data", str(run / "run.yaml")]) == 4  # it is there already


def test_nothing_to_prune_and_what_is_no_mixture(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(run / "adapter", whole)
    tensors = load_file(whole / WEIGHTS)
    zeros = {n: torch.zeros_like(t) for n, t in tensors.items() if n.endswith("router_bias")}
    save_file(tensors | zeros, whole / WEIGHTS, metadata={"format": "pt"})
    data = ["--data", str(run / "run.yaml"), "--output", str(tmp_path / "pruned")]
    assert main(["prune", str(whole), *data]) == 2
    assert "nothing can go: every expert is chosen by some token" in capsys.readouterr().err
    content = yaml.safe_load((run / "run.yaml").read_text(encoding="utf-8"))
    base = AutoModelForCausalLM.from_pretrained(content["model"]["name"])
    lora = tmp_path / "lora"
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(lora)
    assert main(["prune", str(lora), *data]) == 2
    assert "is a LORA adapter; rotmole prune takes RotMoLE's" in capsys.readouterr().err
    assert not (tmp_path / "pruned").exists()
