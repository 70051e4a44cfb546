"""A tiny Llama on disk, two tiny tasks on disk, and run files that train the one on the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

import tiny_folders
from rotmole.config.load import load_run
from rotmole.config.schema import RunFile

COLOURS = ["red", "blue", "green", "black", "white", "brown", "pink", "grey"]


def task_rows(task: str, start: int, stop: int) -> list[dict[str, str]]:
    """Rows that a model can learn: the next colour, or a sum."""
    if task == "colours":
        size = len(COLOURS)
        return [
            {
                "prompt": f"{COLOURS[i % size]} {i} then ",
                "completion": COLOURS[(i + 1) % size],
            }
            for i in range(start, stop)
        ]
    return [{"prompt": f"{i} plus 1 is ", "completion": str(i + 1)} for i in range(start, stop)]


def write_data(folder: Path) -> Path:
    for task in ("colours", "sums"):
        for split, rows in (
            ("train", task_rows(task, 0, 30)),
            ("validation", task_rows(task, 30, 36)),
        ):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{task}.{split}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def write_model(folder: Path) -> Path:
    texts = [row["prompt"] + row["completion"] for row in task_rows("colours", 0, 30)]
    words = tiny_folders.tokenizer(texts, 320, pad_token=tiny_folders.END)
    model = tiny_folders.llama(
        words, intermediate_size=48, max_position_embeddings=64, initializer_range=0.1,
        pad_token_id=words.pad_token_id,
    )  # fmt: skip
    return tiny_folders.write_pair(words, model, folder)


def settings(model: Path, data: Path, output: Path, **training: Any) -> dict[str, Any]:
    """A run file: 60 rows, batches of 4, 20 updates, validation and checkpoints every 5."""
    tasks = {
        task: {
            "source": "jsonl",
            "files": {s: str(data / f"{task}.{s}.jsonl") for s in ("train", "validation")},
        }
        for task in ("colours", "sums")
    }
    defaults = {
        "max_steps": 20,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-2,
        "warmup_steps": 2,
        "logging_steps": 1,
        "eval_steps": 5,
        "save_steps": 5,
        "save_total_limit": 10,
        "max_length": 64,
    }
    return {
        "output_dir": str(output),
        "seed": 3,
        "model": {"name": str(model), "dtype": "float32", "device": "cpu"},
        "adapter": {
            "r": 4,
            "num_experts": 3,
            "lora_dropout": 0.1,
            "router_aux_loss_coef": 0.1,
            "target_modules": ["q_proj", "v_proj"],
        },
        "data": {"tasks": tasks},
        "training": defaults | training,
        "evaluation": {"report_tokens": 0},  # the report takes longer than these runs
    }


def run_file(model: Path, data: Path, output: Path, *overrides: str, **training: Any) -> RunFile:
    return load_run(None, overrides, text=yaml.safe_dump(settings(model, data, output, **training)))
