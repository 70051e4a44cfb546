"""Every trainer that is claimed to work, on a tiny model: one function makes each ready."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

import tiny
from rotmole import RotMoleConfig
from rotmole.training.callbacks.balance import BalanceCallback

ROWS, LENGTH = 8, 10
# TRL copies an adapter that it is given into a second one, "ref", whose run transformers resumes
# since 5.23; before, `default` stayed at its start (so does LoRA's)
RESUMES_TWO_ADAPTERS = Version(transformers.__version__) >= Version("5.23")


def adapted(
    base: torch.nn.Module, balance: float | None = 0.5, targets: str = "qv", **settings: Any
) -> PeftModel:
    """An adapter away from its zero start; balance None is plain LoRA."""
    torch.manual_seed(5)
    names = ["query", "value"] if targets == "bert" else ["q_proj", "v_proj"]
    settings = {"r": 4, "target_modules": names} | settings
    if balance is None:
        return get_peft_model(base, LoraConfig(init_lora_weights=False, **settings))
    settings = {"init_weights": False, "router_aux_loss_coef": balance} | settings
    return get_peft_model(base, RotMoleConfig(**settings))


def arguments(folder: Path, **settings: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 4,
        "learning_rate": 1e-2, "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        "save_strategy": "no", "dataloader_pin_memory": False, "seed": 3,
    } | settings  # fmt: skip


def policy(balance: float | None) -> dict[str, Any]:
    """What a preference trainer trains: an adapter with its reference, or a new one's settings."""
    if RESUMES_TWO_ADAPTERS:
        return {"model": adapted(tiny.llama(), balance)}
    config = adapted(tiny.llama(), balance).peft_config["default"]
    base = tiny.llama()
    torch.manual_seed(5)  # the weights that `adapted` draws
    return {"model": base, "peft_config": config}


def weights(model: PeftModel) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def difference(ours: PeftModel, theirs: PeftModel) -> float:
    """Largest distance of two models' trained weights."""
    pairs = zip(weights(ours).values(), weights(theirs).values(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; ids stay below the tiny models' vocabulary."""
    words = ["<pad>", "<s>", "</s>", *[f"w{i}" for i in range(90)]]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def causal_rows() -> Dataset:
    ids = tiny.tokens(ROWS, LENGTH).tolist()
    mask = [1] * LENGTH
    return Dataset.from_list([{"input_ids": r, "labels": r, "attention_mask": mask} for r in ids])


def preference_rows() -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": f"w{i} w{i + 1}",
                "chosen": f" w{i + 2}" * (1 + i % 3),
                "rejected": f" w{i + 9} w3",
            }
            for i in range(ROWS)
        ]
    )


def reward_of_short_words(completions: list[str], **columns: Any) -> list[float]:
    """A reward in plain Python: the share of words with a one-figure number."""
    return [sum(len(w) == 2 for w in text.split()) / 4 for text in completions]


def _common(callbacks: tuple[TrainerCallback, ...]) -> dict[str, Any]:
    return {"callbacks": [BalanceCallback(), *callbacks], "processing_class": tokenizer()}


def causal(folder: Path, balance: float | None, *callbacks: TrainerCallback, **args: Any) -> Any:
    return Trainer(
        model=adapted(tiny.llama(), balance),
        args=TrainingArguments(**arguments(folder, **args)),
        train_dataset=causal_rows(),
        callbacks=[BalanceCallback(), *callbacks],
    )


def classifier(
    folder: Path, balance: float | None, *callbacks: TrainerCallback, **args: Any
) -> Any:
    rows = [{"input_ids": r, "labels": r[0] % 3} for r in tiny.tokens(ROWS, LENGTH).tolist()]
    return Trainer(
        model=adapted(tiny.bert(), balance, "bert", task_type="SEQ_CLS"),
        args=TrainingArguments(**arguments(folder, **args)),
        train_dataset=Dataset.from_list(rows),
        callbacks=[BalanceCallback(), *callbacks],
    )


def sft(folder: Path, balance: float | None, *callbacks: TrainerCallback, **args: Any) -> Any:
    rows = [
        {"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2}" * (1 + i % 3)} for i in range(ROWS)
    ]
    return SFTTrainer(
        model=adapted(tiny.llama(), balance),
        args=SFTConfig(**arguments(folder, bf16=False, max_length=16, **args)),
        train_dataset=Dataset.from_list(rows),
        **_common(callbacks),
    )


def dpo(folder: Path, balance: float | None, *callbacks: TrainerCallback, **args: Any) -> Any:
    return DPOTrainer(
        **policy(balance),
        args=DPOConfig(**arguments(folder, bf16=False, max_length=16, **args)),
        train_dataset=preference_rows(),
        **_common(callbacks),
    )


def reward(folder: Path, balance: float | None, *callbacks: TrainerCallback, **args: Any) -> Any:
    return RewardTrainer(
        model=adapted(tiny.llama_reward(), balance, task_type="SEQ_CLS"),
        args=RewardConfig(**arguments(folder, bf16=False, max_length=16, **args)),
        train_dataset=preference_rows(),
        **_common(callbacks),
    )


def grpo(folder: Path, balance: float | None, *callbacks: TrainerCallback, **args: Any) -> Any:
    settings = {"num_generations": 2, "max_completion_length": 4, "beta": 0.04, "bf16": False}
    return GRPOTrainer(
        **policy(balance),
        reward_funcs=reward_of_short_words,
        args=GRPOConfig(**arguments(folder, **(settings | args))),
        # more rows than 20 updates take: TRL's sampler of prompts forgets how many epochs it did
        train_dataset=Dataset.from_list([{"prompt": f"w{i} w{i + 1}"} for i in range(6 * ROWS)]),
        **_common(callbacks),
    )


TRAINERS: dict[str, Callable[..., Any]] = {
    "Trainer": causal,
    "Trainer-classifier": classifier,
    "SFTTrainer": sft,
    "DPOTrainer": dpo,
    "RewardTrainer": reward,
    "GRPOTrainer": grpo,
}
