"""Validation by task; a signal cuts it short, and the resumed run makes it again."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer
from transformers.trainer_utils import EvalPrediction, speed_metrics

from rotmole.data import model_inputs, row_sums
from rotmole.models.logits import accepts_logits_to_keep
from rotmole.ops.precision import at_least_float32

IGNORED = -100


class ValidationCut(Exception):
    """Somebody asked for a stop during validation."""


class ValidatingTrainer(Trainer):
    """Trainer whose validation is by task and by token, and may be cut short.

    Args:
        kwargs: as Trainer's; eval_dataset may be {task: rows}.

    Attributes:
        accepts_logits_to_keep: whether the model's forward takes `logits_to_keep`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(compute_metrics=_mean_of_tokens, **kwargs)
        self.accepts_logits_to_keep = accepts_logits_to_keep(self.model)

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """Return the batch's mean loss and each row's summed loss and count of learnt tokens.

        The sums are what `evaluate` adds up, so a task's loss depends neither on how its rows are
        batched nor on how they are spread over processes. Never smoothed.
        """
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"]
        others = {name: v for name, v in model_inputs(inputs).items() if name != "labels"}
        learnt = (labels[:, 1:] != IGNORED).any(0).nonzero()[:, 0]
        with torch.no_grad(), self.compute_loss_context_manager():
            if self.accepts_logits_to_keep:
                logits = model(**others, logits_to_keep=learnt, use_cache=False).logits
            else:
                logits = model(**others).logits[:, learnt]
        targets = labels[:, learnt + 1]
        loss = cross_entropy(
            at_least_float32(logits.flatten(0, 1)),
            targets.flatten(),
            ignore_index=IGNORED,
            reduction="none",
        )
        loss_BS = loss.new_zeros(labels.shape)
        loss_BS[:, learnt + 1] = loss.view(targets.shape)
        counted_BS = torch.zeros_like(labels)
        counted_BS[:, learnt + 1] = (targets != IGNORED).long()
        total_N, count_N = row_sums(loss_BS, inputs), row_sums(counted_BS, inputs)
        mean = total_N.sum() / count_N.sum().clamp(min=1)
        return (mean, None, None) if prediction_loss_only else (mean, total_N, count_N)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Compute eval_<task>_loss of every task, and eval_loss, their mean weighted by rows.

        A task's loss is the mean over its learnt tokens. Training's random numbers stay as they
        are, though every loader draws one: a validation cut short draws fewer.
        """
        with torch.random.fork_rng(devices=[]):
            return self._losses_by_task(eval_dataset, ignore_keys, metric_key_prefix)

    def _losses_by_task(
        self, eval_dataset: Any, ignore_keys: list[str] | None, metric_key_prefix: str
    ) -> dict[str, float]:
        if eval_dataset is not None or not isinstance(self.eval_dataset, dict):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        start, rows, total = time.time(), 0, 0.0
        metrics: dict[str, float] = {}
        for task in self.eval_dataset:
            name = f"{metric_key_prefix}_{task}"
            output = self.evaluation_loop(
                self.get_eval_dataloader(task), name, False, ignore_keys, metric_key_prefix=name
            )
            metrics[f"{name}_loss"] = output.metrics[f"{name}_mean_of_tokens"]
            rows += output.num_samples
            total += output.num_samples * metrics[f"{name}_loss"]
        metrics[f"{metric_key_prefix}_loss"] = total / rows
        metrics.update(speed_metrics(metric_key_prefix, start, num_samples=rows))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False
    ) -> dict[str, float]:
        """Validate; if that is cut short by a signal, save and stop.

        At the start of a resumed run (skip_scheduler) it is the validation that was cut short: it
        then counts as if it had been made after its update.
        """
        late = skip_scheduler and self.state.global_step > 0
        try:
            metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler and not late)
        except ValidationCut:
            if skip_scheduler:  # nothing was trained since the checkpoint
                raise
            self.control.should_save = self.control.should_training_stop = True
            self.control.should_evaluate = False  # not once more at the end of the loop
            return {}
        if late and self._determine_best_metric(metrics, trial):
            step = self.state.global_step
            self.state.best_model_checkpoint = str(Path(self.args.output_dir, f"checkpoint-{step}"))
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Note the best; only weights that are saved can be it."""
        if not metrics:
            return True
        checkpoint = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        is_saved = self.control.should_save or checkpoint.is_dir()
        if not is_saved and self.args.save_strategy != "best":
            return False
        return super()._determine_best_metric(metrics, trial)


def _mean_of_tokens(rows: EvalPrediction) -> dict[str, float]:
    """Divide the summed losses of all rows by their learnt tokens."""
    return {"mean_of_tokens": rows.predictions.sum(dtype="float64") / max(rows.label_ids.sum(), 1)}
