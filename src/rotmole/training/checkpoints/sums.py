"""What is summed up between two log lines: written beside a checkpoint, taken up by a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from rotmole.files import atomic_write_text
from rotmole.tuner.batch.losses import balance_states


def _file(args: TrainingArguments, checkpoint: Path) -> Path:
    name = f"sums_{args.process_index}.json" if args.world_size > 1 else "sums.json"
    return checkpoint / name


def save_sums(trainer: Trainer, checkpoint: Path) -> None:
    """Write the sums since the last log line, which transformers forgets.

    Numbers survive JSON to the last bit.

    Args:
        trainer: that saves to the checkpoint.
        checkpoint: the folder; each process writes a file of its own.

    Raises:
        StorageError: the disk refused.
    """
    loss = getattr(trainer, "_tr_loss", None)  # a local of older transformers: then lost
    content = {
        "loss": None if loss is None else loss.item(),
        "logged_loss": trainer._total_loss_scalar,
        "logged_step": trainer._globalstep_last_logged,
        "balance": [
            {"count": s.count, "sums": [float(each) for each in s.sums]} if s.count else None
            for s in balance_states(trainer.model)
        ],
    }
    atomic_write_text(_file(trainer.args, checkpoint), json.dumps(content) + "\n")


def restore_sums(trainer: Trainer, checkpoint: Path) -> bool:
    """Take up the sums that a checkpoint holds.

    Args:
        trainer: after it has set its sums to zero.
        checkpoint: that it goes on from.

    Returns:
        False if there are none, as after a change of the number of processes.
    """
    path = _file(trainer.args, checkpoint)
    saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if saved.get("loss") is None:
        return False
    device = trainer.args.device
    trainer._tr_loss = torch.tensor(saved["loss"], device=device)
    trainer._total_loss_scalar = saved["logged_loss"]
    trainer._globalstep_last_logged = saved["logged_step"]
    _restore_balance(trainer.model, saved["balance"], device)
    return True


def _restore_balance(model: nn.Module, entries: list[Any], device: torch.device) -> None:
    for balance, entry in zip(balance_states(model), entries, strict=False):
        if entry is not None:
            balance.count = entry["count"]
            balance.sums = [*torch.tensor(entry["sums"], dtype=torch.float32, device=device)]
