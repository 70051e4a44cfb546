"""Early stopping that a resume takes up where it was."""

from __future__ import annotations

from typing import Any

from transformers import (
    EarlyStoppingCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

_COUNTER = "early_stopping_patience_counter"


class EarlyStopping(EarlyStoppingCallback):
    """transformers' EarlyStoppingCallback, whose counter goes on after a resume.

    Add it after the callback that restores the best checkpoint: if there is none, nothing counts.

    Args:
        patience: validations in a row without a better metric, after which training stops.
    """

    def __init__(self, patience: int) -> None:
        super().__init__(early_stopping_patience=patience)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the counter; config and build have checked what the parent would ask for."""
        counts = state.global_step > 0 and state.best_metric is not None
        self.early_stopping_patience_counter = validations_without_a_better(state) if counts else 0
        state.stateful_callbacks[type(self).__name__] = self.state()


def validations_without_a_better(state: TrainerState) -> int:
    """Return how many validations in a row found no better metric, by a checkpoint's state."""
    saved = state.stateful_callbacks.get(EarlyStopping.__name__, {})
    return int(saved.get("attributes", {}).get(_COUNTER, 0)) if isinstance(saved, dict) else 0
