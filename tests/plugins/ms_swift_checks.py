"""The plug-in in ms-swift itself, on a tiny model; run by tests/plugins/lane.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from swift.pipelines import infer_main, sft_main

import tiny_folders
from rotmole import ConfigError

PLUGIN = "import rotmole.plugins.ms_swift\n"
SETTINGS = "{r: 4, num_experts: 3, top_k: 2, rotation: plane, target_modules: [q_proj, v_proj]}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, rows, and the one-line file that loads the plug-in."""
    folder = tmp_path_factory.mktemp("swift")
    tiny_folders.write_model(folder / "model", max_position_embeddings=512)
    (folder / "plugin.py").write_text(PLUGIN, encoding="utf-8")
    turns = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}]
    rows = "".join(json.dumps({"messages": turns}) + "\n" for _ in range(8))
    (folder / "rows.jsonl").write_text(rows, encoding="utf-8")
    return folder


def words(place: Path, output: str, *more: str) -> list[str]:
    return [
        "--model", str(place / "model"), "--model_type", "llama", "--template", "dummy",
        "--external_plugins", str(place / "plugin.py"), "--tuner_type", "rotmole",
        "--dataset", str(place / "rows.jsonl"), "--torch_dtype", "float32",
        "--split_dataset_ratio", "0", "--max_steps", "3", "--save_steps", "3",
        "--per_device_train_batch_size", "2", "--learning_rate", "1e-2", "--report_to", "none",
        "--output_dir", str(place / output), "--add_version", "false", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    """The checkpoint that `swift sft` writes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROTMOLE_ADAPTER", SETTINGS)
        sft_main(words(place, "out"))
    return place / "out" / "checkpoint-3"


def test_the_checkpoint_is_an_adapter_with_these_settings(place: Path, trained: Path) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    model = PeftModel.from_pretrained(base, trained)
    config = model.peft_config["default"]
    assert (config.peft_type.value, config.r, config.num_experts) == ("ROTMOLE", 4, 3)
    assert config.rotation == "plane"
    ids = torch.arange(9)[None]
    with model.disable_adapter():
        before = model(ids).logits
    assert (model(ids).logits - before).abs().max() > 1e-4  # trained: B is no longer zero


def test_infer_answers_with_the_adapter(place: Path, trained: Path) -> None:
    answers = infer_main([
        "--adapters", str(trained), "--val_dataset", str(place / "rows.jsonl"),
        "--external_plugins", str(place / "plugin.py"), "--max_new_tokens", "4",
        "--result_path", str(place / "answers.jsonl"),
    ])  # fmt: skip
    assert len(answers) == 8


def test_training_goes_on_from_the_checkpoint(place: Path, trained: Path) -> None:
    more = ("--resume_from_checkpoint", str(trained), "--max_steps", "4", "--save_steps", "4")
    sft_main(words(place, "out", *more))
    assert (place / "out" / "checkpoint-4" / "adapter_model.safetensors").exists()


def test_a_flag_that_would_not_be_followed_is_refused(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"--lora_rank is 16, a setting of ms-swift's own"):
        sft_main(words(place, "none", "--lora_rank", "16"))
