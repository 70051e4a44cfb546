"""`rotmole grow` and `init_from`: from a finished run to a grown one, its resume, its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback

import tiny
from rotmole.cli.grow import grow
from rotmole.config.load import load_run
from rotmole.errors import AdapterError, ConfigError
from rotmole.evaluation.scoring import evaluating
from rotmole.evaluation.target import find_target, load_target
from rotmole.training.run import TrainResult, train
from rotmole_cli import main
from training_cases import run_file

WEIGHTS = "adapter/adapter_model.safetensors"


class PowerCut(TrainerCallback):
    """Ends the run before its third update."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise RuntimeError("power cut")


@pytest.fixture(scope="module")
def old(model_folder, data_folder, tmp_path_factory) -> TrainResult:
    """A finished run, which tests only read."""
    output = tmp_path_factory.mktemp("runs") / "old"
    file = run_file(model_folder, data_folder, output, max_steps=3)
    return train(file, progress=False)


@pytest.fixture(scope="module")
def grown(old, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("grown") / "new"
    assert main(["grow", str(old.run_dir), "-n", "2", "--freeze-old", "-o", str(folder)]) == 0
    return folder


def logits(target: Path) -> torch.Tensor:
    model = load_target(find_target(target)).model
    with evaluating(model):
        return model(input_ids=torch.arange(3, 15).reshape(2, 6)).logits


@pytest.mark.slow
def test_the_folder_is_trained_on_and_scored_as_it_is(old, grown, capsys):
    torch.testing.assert_close(logits(grown), logits(old.run_dir), rtol=0, atol=1e-5)
    run = load_run(grown / "run.yaml")
    assert run.adapter["experts_added"] == [2]
    assert run.adapter["freeze_old"] == ["experts", "router"]  # there is no shared expert
    assert run.adapter["lora_dropout"] == 0.1
    assert run.data.tasks == old.built.run.data.tasks
    before, start = load_file(old.run_dir / WEIGHTS), load_file(grown / WEIGHTS)
    assert all(torch.equal(start[name], tensor) for name, tensor in before.items())
    capsys.readouterr()
    assert main(["check", str(grown / "run.yaml")]) == 0
    assert "no mistakes found" in capsys.readouterr().out
    result = train(run, progress=False)
    after = load_file(result.run_dir / WEIGHTS)
    for name, tensor in start.items():
        assert torch.equal(after[name], tensor) == (name in before), name
    resolved = yaml.safe_load((result.run_dir / "run.yaml").read_text())
    assert resolved["adapter"]["num_experts"] == 5


@pytest.mark.slow
def test_a_run_that_goes_on_resumes_bit_for_bit(grown, tmp_path):
    changed = ["training.save_steps=1", "training.eval_steps=1", "training.max_steps=4"]

    def run(name: str):
        return load_run(grown / "run.yaml", [*changed, f"output_dir={tmp_path / name}"])

    straight = train(run("straight"), progress=False)
    with pytest.raises(RuntimeError, match="power cut"):
        train(run("cut"), progress=False, callbacks=[PowerCut()])
    resumed = train(run("cut"), progress=False, resume="auto")
    ours, theirs = load_file(resumed.run_dir / WEIGHTS), load_file(straight.run_dir / WEIGHTS)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_finished_run_needs_its_start_no_more(grown, tmp_path):
    start = tmp_path / "start"
    (start / "adapter").mkdir(parents=True)
    for file in (grown / "adapter").iterdir():
        (start / "adapter" / file.name).write_bytes(file.read_bytes())
    changed = ["training.max_steps=1", f"init_from={start}"]
    result = train(
        load_run(grown / "run.yaml", [*changed, f"output_dir={tmp_path / 'run'}"]), progress=False
    )
    for file in (start / "adapter").iterdir():
        file.unlink()
    assert find_target(result.run_dir).run.adapter["num_experts"] == 5
    with pytest.raises(ConfigError, match="holds no adapter"):
        load_run(grown / "run.yaml", [*changed, f"output_dir={tmp_path / 'other'}"])


def test_the_run_file_may_change_what_acts_in_training_alone(grown):
    run = load_run(grown / "run.yaml", ["adapter.freeze_old=[]", "adapter.lora_dropout=0.0"])
    assert run.adapter_config.freeze_old == []
    assert run.adapter_config.lora_dropout == 0.0
    with pytest.raises(ConfigError, match=r"adapter.r is 8, but the adapter of init_from has 4"):
        load_run(grown / "run.yaml", ["adapter.r=8", "adapter.num_experts=5"])


def test_another_base_model_is_refused(grown, data_folder, tmp_path):
    from training_cases import tiny_folders

    words = tiny_folders.tokenizer(["a b c"], 320, pad_token=tiny_folders.END)
    folder = tiny_folders.write_pair(words, tiny_folders.llama(words, hidden_size=16), tmp_path)
    changed = [f"model.name={folder}", f"output_dir={tmp_path / 'run'}"]
    with pytest.raises(AdapterError, match="base model of other shapes"):
        train(load_run(grown / "run.yaml", changed), progress=False)


def test_growing_from_an_adapter_folder_and_what_is_refused(old, tmp_path, capsys):
    kept = tmp_path / "kept"
    assert grow(old.run_dir / "adapter", 1, kept, freeze_old=["router"]) == 0
    assert (kept / "run.yaml").is_file()  # the adapter lies in its run folder
    lone = tmp_path / "lone"
    lone.mkdir()
    for file in (old.run_dir / "adapter").iterdir():
        (lone / file.name).write_bytes(file.read_bytes())
    assert grow(lone, 1, tmp_path / "of_lone") == 0
    assert not (tmp_path / "of_lone" / "run.yaml").exists()
    capsys.readouterr()
    assert main(["grow", str(lone), "-n", "1", "-o", str(kept)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    lora = get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "x"}))
    assert main(["grow", str(tmp_path / "lora"), "-n", "1", "-o", str(tmp_path / "y")]) == 2
    assert "is a LORA adapter" in capsys.readouterr().err
    assert not (tmp_path / "y").exists()
    untrained = tmp_path / "run.yaml"
    untrained.write_text((old.run_dir / "run.yaml").read_text())
    text = [f"output_dir: {tmp_path / 'nothing'}" if line.startswith("output_dir") else line
            for line in untrained.read_text().splitlines()]  # fmt: skip
    untrained.write_text("\n".join(text))
    assert main(["grow", str(untrained), "-n", "1", "-o", str(tmp_path / "z")]) == 2
    assert "train it first" in capsys.readouterr().err
