"""Keep the adapter in float32 on a quantised base under trainers that cast it down."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rotmole.tuner.experts.experts import Experts


class Float32Callback(TrainerCallback):
    """Raise the adapter to float32 again after TRL has cast it down.

    TRL's trainers cast every trainable weight to bfloat16 on a quantised base. With its 8 bits of
    precision a small update of a gate is lost: w + dw == w where |dw| < |w| / 512. `rotmole train`
    does not need this, as its trainer casts nothing.
    """

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cast back when the trainer is made, before any engine has seen the weights."""
        for module in kwargs["model"].modules():
            if isinstance(module, Experts):
                for parameter in module.parameters():
                    if parameter.requires_grad:
                        parameter.data = parameter.data.to(torch.float32)
