"""Balance losses under any trainer: their share of an update, and their line in the log."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rotmole.tuner.batch.loads import update_router_bias
from rotmole.tuner.batch.losses import balance_states


def micro_batches(args: TrainingArguments, state: TrainerState, dataloader: Any) -> int:
    """Count the micro-batches of the update about to begin; an epoch's last one may be shorter.

    Args:
        args: the trainer's arguments (gradient_accumulation_steps).
        state: the trainer's state (global_step is the number of finished updates).
        dataloader: the training batches; one without a length counts as endless.

    Returns:
        Number of micro-batches, at least 1.
    """
    accumulation = max(args.gradient_accumulation_steps, 1)
    try:
        batches = len(dataloader)
    except TypeError:
        return accumulation
    updates = max(math.ceil(batches / accumulation), 1)
    is_last = state.global_step % updates == updates - 1
    return (batches % accumulation or accumulation) if is_last else accumulation


def balance_logs(
    model: torch.nn.Module, total: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> dict[str, float]:
    """Take the mean balance losses since the last call out of a model.

    Args:
        model: a model with a RotMoLE adapter; any other has none.
        total: sums a tensor over processes; None tells of this process's tokens alone.

    Returns:
        router_aux_loss and router_z_loss, each a mean over layers and tokens, in so far as they
        were computed.
    """
    sums: dict[str, list[float]] = {}
    for balance in balance_states(model):
        for name, value in (balance.pop(total) or {}).items():
            sums.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in sums.items()}


class BiasCallback(TrainerCallback):
    """Move the bias of loss-free balancing (router_bias_rate) after each optimiser step."""

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Move the bias, where there is one."""
        update_router_bias(kwargs["model"])


class BalanceCallback(BiasCallback):
    """Scale the balance loss to its update, loss_scale = AMP scale / micro-batches, and log it.

    For trainers of others. Micro-batches (of all processes) count alike, whatever their tokens;
    RotMoleTrainer, which sees a whole update's batches beforehand, weighs them by tokens.
    """

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Set the scale before the update's first micro-batch."""
        scale = 1.0 / micro_batches(args, state, kwargs.get("train_dataloader"))
        scaler = getattr(kwargs.get("optimizer"), "scaler", None)  # fp16 only
        if scaler is not None:
            scale *= scaler.get_scale()
        for balance in balance_states(kwargs["model"]):
            balance.managed = True
            balance.loss_scale = scale

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the balance losses to a training log; loss itself does not contain them."""
        if logs is not None and "loss" in logs:
            losses = balance_logs(kwargs["model"])
            logs.update(losses)
            if state.log_history:  # Trainer has put a copy of the log there already
                state.log_history[-1].update(losses)
