"""rotmole train on one architecture after another: an update does not depend on its split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_architectures import CAUSAL

import tiny_folders
from rotmole_cli import main
from training_cases import settings

LAWFUL = ["qwen2-moe", "qwen3-moe", "deepseek-v3", "opt", "falcon", "mamba2"]  # and Llama, beside


@pytest.mark.parametrize("name", LAWFUL)
def test_one_update_whole_and_row_by_row(name: str, tmp_path: Path) -> None:
    """Rows of unequal length, the balance loss far above the model's own, gradients not clipped."""
    make, targets = CAUSAL[name]
    sizes = [3, 1, 9, 5]
    rows = [{"prompt": "red " * n, "completion": "blue"} for n in sizes]
    words = tiny_folders.tokenizer([row["prompt"] for row in rows], 288, pad_token=tiny_folders.END)
    torch.manual_seed(0)
    config = make().config  # type: ignore[union-attr] # a model of transformers
    config.vocab_size, config.pad_token_id = len(words), words.pad_token_id
    config.eos_token_id, config.bos_token_id = words.eos_token_id, None
    model = tiny_folders.write_pair(words, type(make())(config), tmp_path / "model")
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    content = settings(
        model, tmp_path, tmp_path / "run", max_steps=1, eval_steps=None, save_steps=1, optim="sgd",
        learning_rate=0.1, max_grad_norm=0, warmup_steps=0,
    )  # fmt: skip
    content["data"]["tasks"] = {"only": {"source": "jsonl", "files": {"train": str(file)}}}
    content["adapter"] |= {
        "target_modules": targets, "router_aux_loss_coef": 500.0, "lora_dropout": 0.0,
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    saved = []
    for size in (4, 1):
        folder = tmp_path / f"run-{size}"
        split = [
            f"training.per_device_train_batch_size={size}",
            f"training.gradient_accumulation_steps={4 // size}",
        ]
        assert main(["train", str(path), f"output_dir={folder}", *split]) == 0
        saved.append(load_file(folder / "adapter" / "adapter_model.safetensors"))
    whole, apart = saved
    for key, value in whole.items():
        difference = (value - apart[key]).abs().max().item()
        assert difference <= 1e-5 * value.abs().max().item(), (key, difference)
