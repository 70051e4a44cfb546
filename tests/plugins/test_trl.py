"""`python -m rotmole.plugins.trl` trains as `trl sft` does, with this method in LoRA's place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import tiny_folders
from rotmole.plugins.trl import main

SETTINGS = "{r: 4, num_experts: 3, top_k: 2, rotation: plane, target_modules: [q_proj]}"


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Arguments of the command, on a tiny model and rows of a folder."""
    tiny_folders.write_model(tmp_path / "model", pad_token_id=0)
    (tmp_path / "rows").mkdir()
    row = json.dumps({"prompt": "the film is ", "completion": "good"}) + "\n"
    (tmp_path / "rows" / "train.jsonl").write_text(row * 8, encoding="utf-8")
    return [
        "--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "rows"),
        "--output_dir", str(tmp_path / "out"), "--adapter", SETTINGS, "--max_steps", "2",
        "--per_device_train_batch_size", "2", "--learning_rate", "1e-2", "--report_to", "none",
        "--bf16", "false", "--gradient_checkpointing", "false", "--dtype", "float32",
        "--dataloader_pin_memory", "false",
    ]  # fmt: skip


def test_it_trains_and_saves_an_adapter_with_the_settings(tmp_path: Path, words: list[str]) -> None:
    assert main(words) == 0
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model = PeftModel.from_pretrained(base, tmp_path / "out")
    config = model.peft_config["default"]
    assert (config.r, config.num_experts, config.rotation) == (4, 3, "plane")
    ids = torch.arange(9)[None]
    with model.disable_adapter():
        before = model(ids).logits
    assert (model(ids).logits - before).abs().max() > 1e-4  # trained: B is no longer zero


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--lora_r", "8"], "--lora_r is 8, a setting of TRL's own adapters"),
        (["--use_peft"], "--use_peft is True"),
        (["--adapter", "{r: 0}"], "--adapter.r is 0"),
        (["--dataset_name", ""], "give --dataset_name"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    words: list[str], more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, *more]) == 2
    assert said in capsys.readouterr().err
