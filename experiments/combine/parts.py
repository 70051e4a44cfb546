"""The parts of the data, the LoRA adapters that are trained on them, and how a model is scored."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PrinterCallback, ProgressCallback, set_seed

from rotmole.config.load import load_run
from rotmole.config.schema import RunFile, Split
from rotmole.data import Collator, Example, load_splits, mix
from rotmole.evaluation.scoring import evaluating, log_likelihoods, scored_answers
from rotmole.models.load import LoadedModel, load_model
from rotmole.training.build import tokenised, training_arguments
from rotmole.training.trainer import RotMoleTrainer

KINDS = ("units", "currency", "dates", "times", "lists", "numbers")
PARTS = {
    "A": ("de", "fr", "es"), "B": ("it", "pt", "pl"), "de": ("de",), "es": ("es",), "pl": ("pl",),
}  # fmt: skip
GROUPS = {"A+B": ("A", "B"), "de+es+pl": ("de", "es", "pl")}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
RANK, SCALE, RATE, ROWS = 12, 4, 2e-3, 150
UPDATES = {"A": 120, "B": 120, "de": 80, "es": 80, "pl": 80}  # of 8 rows
SCORED = 36  # rows of each kind in a part
LENGTH = 256


def rows_of(part: str, kind: str, rows: int | None) -> int:
    """Return the rows of each language so that a part has about `rows`; None: ROWS of each."""
    if rows is None:
        return ROWS
    cells = len(KINDS) * len(PARTS[part])
    return (rows * (KINDS.index(kind) + 1)) // cells - (rows * KINDS.index(kind)) // cells


def run_file(
    parts: Sequence[str],
    folder: Path,
    seed: int,
    updates: int,
    *,
    rows: int | None = None,
    more: Mapping[str, Any] | None = None,
) -> RunFile:
    """Return the run that trains on some parts; its tasks are named PART-KIND.

    Args:
        rows: train rows of a part; None: ROWS of each kind and language.
        more: further sections of the run file.
    """
    tasks = {}
    groups = bool((more or {}).get("adapter", {}).get("router_task_loss_coef"))
    for number, part in enumerate(parts):
        for kind in KINDS:
            scored = SCORED // len(PARTS[part])
            limit = {"train": rows_of(part, kind, rows), "validation": scored, "test": scored}
            tasks[f"{part}-{kind}"] = {
                "source": "locale", "kind": kind, "languages": list(PARTS[part]), "limit": limit,
                "task_group": number if groups else None,
            }  # fmt: skip
    content: dict[str, Any] = {
        "output_dir": str(folder),
        "seed": seed,
        "model": {
            "name": "smollm2-135m", "dtype": "bfloat16", "device": "cpu",
            "attn_implementation": "eager",
        },
        "data": {"tasks": tasks},
        "training": {
            "max_steps": updates, "learning_rate": RATE, "warmup_steps": min(10, updates // 4),
            "max_length": LENGTH, "eval_strategy": "no", "save_strategy": "no",
        },
    }  # fmt: skip
    content |= {key: {**content.get(key, {}), **value} for key, value in (more or {}).items()}
    return load_run(None, text=json.dumps(content))


def base_model(run: RunFile) -> LoadedModel:
    """Load the base model of a run."""
    return load_model(run.model)


def examples(run: RunFile, tokenizer: Any) -> dict[Split, dict[str, list[Example]]]:
    """Return the rows of a run, by split and task."""
    return load_splits(run.data, seed=run.seed, tokenizer=tokenizer)


def train_lora(run: RunFile, rank: int, start: Path | None) -> None:
    """Train an ordinary LoRA adapter of PEFT and save it as RUN/adapter.

    Args:
        start: a saved adapter to go on from; None: a new one.
    """
    base = base_model(run)
    set_seed(run.seed)
    if start is None:
        config = LoraConfig(
            task_type="CAUSAL_LM", r=rank, lora_alpha=SCALE * rank, target_modules=TARGETS
        )
        model: Any = get_peft_model(base.model, config)
    else:
        model = PeftModel.from_pretrained(base.model, str(start), is_trainable=True)
    rows = mix(examples(run, base.tokenizer)["train"], run.data, seed=run.seed)
    trainer = RotMoleTrainer(
        optimizer_section=run.optimizer,
        model=model,
        args=training_arguments(run, validated=False),
        train_dataset=tokenised(rows, base.tokenizer, LENGTH),
        data_collator=Collator(base.tokenizer, None),
        processing_class=base.tokenizer,
    )
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    trainer.train()
    temporary = Path(run.output_dir, f"adapter.{os.getpid()}")
    model.save_pretrained(str(temporary))
    temporary.rename(Path(run.output_dir, "adapter"))


def score(
    model: Any, tokenizer: Any, rows: Mapping[str, Sequence[Example]], parts: Sequence[str]
) -> dict[str, float]:
    """Return part -> nats per token of the right answers: the mean over the part's kinds.

    Args:
        rows: task -> rows to score, tasks named PART-KIND.
    """
    figures = {}
    with evaluating(model):
        for part in parts:
            losses = []
            for kind in KINDS:
                texts = scored_answers(rows[f"{part}-{kind}"], tokenizer)
                logs = log_likelihoods(model, texts, batch_size=36)
                losses.append(-sum(logs) / sum(len(text.positions) for text in texts))
            figures[part] = sum(losses) / len(losses)
    return figures
