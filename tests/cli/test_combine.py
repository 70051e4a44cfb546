"""rotmole combine: trained adapters become named experts, their gates are trained, nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rotmole.config.load import load_run
from rotmole.training.callbacks.metrics import read_metrics
from rotmole_cli import main
from training_cases import settings, write_data, write_model

TARGETS = {"first": ["q_proj", "v_proj"], "second": ["q_proj", "down_proj"]}


def save_lora(model: Path, folder: Path, seed: int, **fields: object) -> None:
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model)
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **fields)
    get_peft_model(base, config).save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, a run file of two tasks, and two adapters of other shapes."""
    root = tmp_path_factory.mktemp("combine")
    model, data = write_model(root / "model"), root / "data"
    data.mkdir()
    content = settings(model, write_data(data), root / "run")
    (root / "run.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    save_lora(model, root / "first", 1, r=4, lora_alpha=6, target_modules=TARGETS["first"])
    save_lora(
        model, root / "second" / "adapter", 2, r=3, use_rslora=True,
        target_modules=TARGETS["second"],
    )  # fmt: skip
    return root


def combine(place: Path, output: Path, *words: str) -> int:
    adapters = [str(place / "first"), str(place / "second")]
    data = ["--data", str(place / "run.yaml"), "--output", str(output)]
    return main(["combine", *adapters, *words, *data])


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def combined(place: Path) -> Path:
    """Return the run folder of a short combination."""
    words = ["--rows", "8", "experts_from.trainable=gates", "training.max_steps=4"]
    words += ["training.logging_steps=1"]
    assert combine(place, place / "both", *words) == 0
    return place / "both"


def test_the_run_has_named_experts_whose_gates_alone_were_trained(combined: Path) -> None:
    config = json.loads((combined / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["expert_names"] == ["first", "second"]
    assert (config["num_experts"], config["r"], config["frozen"]) == (2, 4, "AB")
    run = load_run(combined / "run.yaml")
    assert [len(rows) for rows in run.experts_from.paths] == [
        len(str(combined.parent / name)) for name in ("first", "second")
    ]
    assert {task.limit["train"] for task in run.data.tasks.values()} == {8}
    source = load_file(combined.parent / "first" / "adapter_model.safetensors")
    stored = weights(combined)
    for name in ("q_proj", "v_proj"):
        module = f"base_model.model.model.layers.0.self_attn.{name}"
        A = source[f"{module}.lora_A.weight"]
        assert torch.equal(stored[f"{module}.rotmole_experts.expert_A"][0, : len(A)], A)
    lines = [row for row in read_metrics(combined / "metrics.jsonl") if "loss" in row]
    for line in lines:
        shares = [line["expert_share/first"], line["expert_share/second"]]
        assert sum(shares) == pytest.approx(1)
        assert all(0.05 < share < 0.95 for share in shares)


def test_eval_says_how_much_each_expert_is_used_on_each_task(combined: Path, capsys) -> None:
    capsys.readouterr()
    assert main(["eval", str(combined), "--limit", "4"]) == 0
    screen = capsys.readouterr().out
    assert "colours: first " in screen
    shares = json.loads((combined / "eval.json").read_text(encoding="utf-8"))["expert_shares"]
    assert set(shares) == {"colours", "sums"}
    for named in shares.values():
        assert set(named) == {"first", "second"}
        assert sum(named.values()) == pytest.approx(1)


def test_a_stopped_run_goes_on_without_the_adapters_it_began_with(
    place: Path, tmp_path: Path
) -> None:
    for name in ("first", "second"):
        shutil.copytree(place / name, tmp_path / name)
    words = ["training.max_steps=4", "training.save_steps=2", "training.eval_strategy=no"]
    assert combine(tmp_path_of(place, tmp_path), tmp_path / "whole", *words) == 0
    run = tmp_path / "whole"
    expected = weights(run)
    shutil.rmtree(run / "checkpoint-4")
    shutil.rmtree(run / "adapter")
    (run / ".unfinished").touch()
    for name in ("first", "second"):
        shutil.rmtree(tmp_path / name)
    assert main(["train", str(run / "run.yaml"), "--resume", "auto"]) == 0
    assert all(torch.equal(value, expected[name]) for name, value in weights(run).items())
    assert main(["train", str(run / "run.yaml")]) == 2  # anew, the adapters are needed


def tmp_path_of(place: Path, folder: Path) -> Path:
    """Copy the run file of a place beside adapters of its own."""
    shutil.copy(place / "run.yaml", folder / "run.yaml")
    return folder


def test_a_single_adapter_is_no_combination(place: Path, tmp_path: Path, capsys) -> None:
    words = [str(place / "first"), "--data", str(place / "run.yaml"), "--output", str(tmp_path)]
    assert main(["combine", *words]) == 2
    assert "1 adapter is named; name at least two" in capsys.readouterr().err


def test_check_names_every_adapter_and_what_it_was_trained_on(
    place: Path, tmp_path: Path, capsys
) -> None:
    content = yaml.safe_load((place / "run.yaml").read_text(encoding="utf-8"))
    content["experts_from"] = {"paths": ["first", "second"], "names": ["one", "two"]}
    content["adapter"] = {"selection": "dense", "rotation": "plane"}
    file = place / "check.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    assert main(["check", str(file)]) == 0
    screen = capsys.readouterr().out
    assert "experts     2 trained adapters; the gates alone are trained" in screen
    assert f"one: rank 4 in 4 modules, trained on {place / 'model'}" in screen
    assert "rotation gate" in screen


def test_check_reports_all_that_does_not_fit_at_once(place: Path, tmp_path: Path, capsys) -> None:
    other = write_model(tmp_path / "model")
    wider = AutoModelForCausalLM.from_pretrained(other).config
    wider.hidden_size, wider.intermediate_size = 48, 56
    base = AutoModelForCausalLM.from_config(wider)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2)
    get_peft_model(base, config).save_pretrained(tmp_path / "wide")
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], use_dora=True)
    get_peft_model(AutoModelForCausalLM.from_pretrained(other), config).save_pretrained(
        tmp_path / "dora"
    )
    content = yaml.safe_load((place / "run.yaml").read_text(encoding="utf-8"))
    paths = [str(tmp_path / "wide"), str(tmp_path / "dora"), "nothing", str(place / "first")]
    content["experts_from"] = {"paths": paths}
    content["adapter"] = {"r": 8}
    file = place / "wrong.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    assert main(["check", str(file), "training.learning_rate=-1"]) == 2
    text = capsys.readouterr().err
    assert "adapter.r cannot be set here" in text
    assert "use_dora is True (DoRA divides" in text
    assert "'nothing': there is no such folder" in text
    assert "maps 48 features to" in text
    assert "training.learning_rate is -1" in text


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--names", "a,a"], "different names"),
        (["--names", "a"], "has 1 names but experts_from.paths has 2 adapters"),
        (["experts_from.trainable=some"], "experts_from.trainable is 'some'"),
        (["adapter.share_A=true"], "share_A is True, which would change what the adapters"),
        (["adapter.num_experts=3"], "adapter.num_experts cannot be set here"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_settings_that_contradict_the_adapters_are_refused(
    place: Path, tmp_path: Path, capsys, words: list[str], problem: str
) -> None:
    assert combine(place, tmp_path / "run", *words) == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_without_a_model_section_the_model_is_the_one_that_the_adapters_name(
    place: Path, tmp_path: Path, capsys
) -> None:
    content = yaml.safe_load((place / "run.yaml").read_text(encoding="utf-8"))
    del content["model"]
    file = tmp_path / "data.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    words = ["--data", str(file), "--output", str(tmp_path / "run"), "training.max_steps=1"]
    adapters = [str(place / "first"), str(place / "second")]
    assert main(["combine", *adapters, *words]) == 0
    assert load_run(tmp_path / "run" / "run.yaml").model.name == str(place / "model")
    other = tmp_path / "other"
    shutil.copytree(place / "first", other)
    config = json.loads((other / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = "me/another"
    (other / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert main(["combine", adapters[0], str(other), *words]) == 2
    assert "name different base models" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "problem"), [(None, "cannot be read"), ("seed: 1", "has no section data")]
)
def test_data_must_be_a_run_file_with_tasks(
    place: Path, tmp_path: Path, capsys, text: str | None, problem: str
) -> None:
    file = tmp_path / "data.yaml"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    words = ["--data", str(file), "--output", str(tmp_path / "run")]
    assert main(["combine", str(place / "first"), str(place / "second"), *words]) == 2
    assert problem in capsys.readouterr().err
