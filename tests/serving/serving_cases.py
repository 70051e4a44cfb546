"""Two adapters of one tiny base model with run files, and answers computed without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from rotmole import RotMoleConfig
from rotmole.evaluation.generation import continuation, prompt_tokens
from rotmole.evaluation.target import find_target, load_target
from tiny_folders import write_model

SETTINGS: dict[str, dict[str, Any]] = {
    "red": {"rotation": "tangent", "target_modules": ["q_proj", "v_proj", "o_proj"]},
    "blue": {"rotation": "givens", "selection": "top_p", "target_modules": ["q_proj", "up_proj"]},
}


def write_targets(folder: Path) -> list[Path]:
    """Write a base model, and run files whose runs have adapters that change its answers."""
    base = write_model(folder / "base", initializer_range=0.3)
    files = []
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        write_adapter(base, folder / name / "adapter", seed, **settings)
        run = {
            "model": {"name": str(base), "dtype": "float32"},
            "output_dir": str(folder / name),
            "data": {"tasks": {"films": {"files": {"train": str(folder / "films.jsonl")}}}},
        }
        files.append(folder / f"{name}.yaml")
        files[-1].write_text(yaml.safe_dump(run), encoding="utf-8")
    return files


def write_adapter(base: Path, folder: Path, seed: int, **settings: Any) -> None:
    torch.manual_seed(seed)
    config = RotMoleConfig(
        **({"task_type": "CAUSAL_LM", "r": 4, "num_experts": 4, "top_k": 2} | settings)
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.5)
    model.save_pretrained(folder)


class Alone:
    """A target as `rotmole generate` has it: loaded by itself."""

    def __init__(self, target: Path) -> None:
        loaded = load_target(find_target(target, needs_data=False))
        self.model, self.tokenizer = loaded.model, loaded.tokenizer

    def text(self, prompt: str, **options: Any) -> str:
        """Return what `rotmole generate` prints."""
        row = prompt_tokens(prompt, self.tokenizer)
        return continuation(self.model, self.tokenizer, row, **options).text
