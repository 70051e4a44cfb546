"""The method under transformers' and TRL's trainers as they are, with the balance loss on."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import tiny
from rotmole import RotMoleConfig
from rotmole.training.callbacks import BalanceCallback

ROWS, LENGTH = 8, 10


def _adapted(base: torch.nn.Module, balance: float = 0.5, **settings: object) -> PeftModel:
    torch.manual_seed(5)
    config = RotMoleConfig(
        **({"r": 4, "target_modules": ["q_proj", "v_proj"], "init_weights": False,
            "router_aux_loss_coef": balance} | settings)
    )  # fmt: skip
    return get_peft_model(base, config)


def _rows() -> Dataset:
    ids = tiny.tokens(ROWS, LENGTH)
    return Dataset.from_list(
        [{"input_ids": row, "labels": row, "attention_mask": [1] * LENGTH} for row in ids.tolist()]
    )


def _arguments(folder: Path, **settings: object) -> dict[str, object]:
    return {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 4,
        "learning_rate": 1e-2, "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        "save_strategy": "no", "dataloader_pin_memory": False, "seed": 3,
    } | settings  # fmt: skip


def _trained(folder: Path, base: torch.nn.Module | None = None, **settings: object) -> PeftModel:
    balance = settings.pop("balance", 0.5)
    model = _adapted(tiny.llama() if base is None else base, balance)
    arguments = TrainingArguments(**_arguments(folder, **settings))
    Trainer(
        model=model, args=arguments, train_dataset=_rows(), callbacks=[BalanceCallback()]
    ).train()
    return model


def _weights(model: PeftModel) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def _differ(ours: PeftModel, theirs: PeftModel) -> float:
    pairs = zip(_weights(ours).values(), _weights(theirs).values(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def test_accumulation_gives_the_weights_of_the_whole_batch(tmp_path: Path) -> None:
    """Batch 4 x 1 = 2 x 2 = 1 x 4 with the balance loss on and equal lengths."""
    base = tiny.llama().double()
    runs = [
        _trained(tmp_path, copy.deepcopy(base), per_device_train_batch_size=size,
                 gradient_accumulation_steps=4 // size, lr_scheduler_type="constant",
                 optim="sgd", max_grad_norm=0.0)
        for size in (4, 2, 1)
    ]  # fmt: skip
    assert _differ(runs[0], runs[1]) < 1e-7
    assert _differ(runs[0], runs[2]) < 1e-7
    alone = _trained(tmp_path, copy.deepcopy(base), balance=0.0, lr_scheduler_type="constant",
                     optim="sgd", max_grad_norm=0.0)  # fmt: skip
    assert _differ(runs[0], alone) > 1e-4


def test_checkpointing_off_non_reentrant_and_reentrant_give_equal_weights(tmp_path: Path) -> None:
    off = _trained(tmp_path)
    for reentrant in (False, True):
        on = _trained(tmp_path, activation_checkpointing=True,
                      activation_checkpointing_kwargs={"use_reentrant": reentrant})  # fmt: skip
        assert _differ(off, on) == 0.0


class _StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def] # hook
        control.should_training_stop = state.global_step >= self.step
        control.should_save = control.should_training_stop
        return control


def test_resume_is_bit_equal(tmp_path: Path) -> None:
    straight = _trained(tmp_path / "a")

    def trainer(*callbacks: TrainerCallback) -> Trainer:
        return Trainer(
            model=_adapted(tiny.llama()),
            args=TrainingArguments(
                **_arguments(tmp_path / "b", save_strategy="steps", save_steps=99)
            ),
            train_dataset=_rows(),
            callbacks=[BalanceCallback(), *callbacks],
        )

    trainer(_StopAt(2)).train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert _differ(straight, resumed.model) == 0.0


def test_a_classifier_trains(tmp_path: Path) -> None:
    rows = Dataset.from_list(
        [{"input_ids": row, "labels": row[0] % 3} for row in tiny.tokens(ROWS, LENGTH).tolist()]
    )
    torch.manual_seed(0)
    config = RotMoleConfig(
        task_type="SEQ_CLS", r=4, target_modules=["query", "value"], router_aux_loss_coef=0.1
    )
    model = get_peft_model(tiny.bert(), config)
    before = _weights(model)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**_arguments(tmp_path, max_steps=20, logging_steps=1)),
        train_dataset=rows,
        callbacks=[BalanceCallback()],
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    moved = {n: not torch.equal(before[n], p) for n, p in _weights(model).items()}
    assert all(moved.values()), [n for n, m in moved.items() if not m]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", *[f"w{i}" for i in range(60)]]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def _sft(tokenizer: PreTrainedTokenizerFast, folder: Path, balance: float) -> PeftModel:
    rows = [
        {"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2}" * (1 + i % 3)} for i in range(8)
    ]
    arguments = SFTConfig(**_arguments(folder, bf16=False, max_length=16))
    trainer = SFTTrainer(
        model=_adapted(tiny.llama(), balance),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[BalanceCallback()],
    )
    trainer.train()
    return trainer.model


def test_sft_feels_the_balance_loss(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    off, weak, again = (_sft(tokenizer, tmp_path, balance) for balance in (0.0, 0.5, 0.5))
    assert _differ(weak, again) == 0.0
    assert _differ(off, weak) > 1e-4


def _dpo(tokenizer: PreTrainedTokenizerFast, folder: Path, balance: float) -> PeftModel:
    rows = [
        {"prompt": f"w{i} w{i + 1}", "chosen": f" w{i + 2}", "rejected": f" w{i + 9} w3"}
        for i in range(8)
    ]
    arguments = DPOConfig(**_arguments(folder, bf16=False, max_length=16))
    trainer = DPOTrainer(
        model=_adapted(tiny.llama(), balance),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[BalanceCallback()],
    )
    trainer.train()
    return trainer.model


def test_dpo_feels_the_balance_loss(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    off, on = (_dpo(tokenizer, tmp_path, balance) for balance in (0.0, 0.5))
    routers = [n for n in _weights(on) if n.endswith("default.router_weight")]
    changed = [float((_weights(on)[n] - _weights(off)[n]).abs().max()) for n in routers]
    assert routers
    assert min(changed) > 1e-5
