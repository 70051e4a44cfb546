"""transformers' Trainer with learning rates by role, losses by task, and a stop before a NaN.

Why not TRL's SFTTrainer: rows arrive tokenised, so little of it would be left, and its loss sends
every position through the vocabulary twice on a CPU (2.2 s a step where this one takes 1.4 s on
SmolLM2-135M). SFTConfig's names are kept for the settings.
"""

from __future__ import annotations

import inspect
import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.nn.functional import cross_entropy
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import speed_metrics

from rotmole.config.schema import OptimizerSection
from rotmole.errors import ConfigError, NonFiniteError
from rotmole.models.files import atomic_write_text
from rotmole.optim import RiemannianAdamW, RiemannianSGD, parameter_groups
from rotmole.optim.riemannian import DELTA
from rotmole.training.callbacks import balance_logs

IGNORED = -100


class EpochSampler(Sampler[int]):
    """The order of rows, a function of (seed, epoch) alone.

    Epoch 0 keeps the mixture's own order, later ones are permutations. With lengths, every epoch
    is a permutation in which the rows of a batch are of similar length.

    Args:
        rows: number of rows N.
        seed: the run's seed.
        batch: rows of an update; with lengths only.
        lengths: tokens of each row, to save padding, or None.
    """

    def __init__(
        self, rows: int, seed: int, *, batch: int = 1, lengths: list[int] | None = None
    ) -> None:
        self.rows, self.seed = rows, seed
        self.batch, self.lengths = batch, lengths
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration walks."""
        self.epoch = epoch

    def order(self, epoch: int) -> list[int]:
        """Return the row numbers of one epoch, in order."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        if self.lengths is not None:
            grouped = LengthGroupedSampler(self.batch, lengths=self.lengths, generator=generator)
            return list(grouped)
        if epoch == 0:
            return list(range(self.rows))
        return torch.randperm(self.rows, generator=generator).tolist()

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch))

    def __len__(self) -> int:
        return self.rows


class RotMoleTrainer(Trainer):
    """Trainer of a causal language model on rows that are already token ids.

    Args:
        optimizer_section: learning rates by role.
        kwargs: as Trainer's; eval_dataset may be {task: rows}.
    """

    def __init__(self, *, optimizer_section: OptimizerSection, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.optimizer_section = optimizer_section
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        self.can_skip_positions = "logits_to_keep" in inspect.signature(base.forward).parameters

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean cross-entropy of the learnt tokens; only their positions meet the vocabulary.

        A batch without a learnt token has loss 0. Models that cannot leave positions out, and
        label smoothing, go Trainer's own way.
        """
        if not self.can_skip_positions or self.label_smoother is not None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        learnt = (labels[:, 1:] != IGNORED).any(0).nonzero()[:, 0]
        outputs = model(**rest, logits_to_keep=learnt, use_cache=False)
        targets = labels[:, learnt + 1].flatten()
        logits = outputs.logits.flatten(0, 1).float()
        total = cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        loss = total / torch.as_tensor(count, device=total.device).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP divides the sum of gradients by it
        return (loss, outputs) if return_outputs else loss

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        if self.args.train_sampling_strategy == "random":
            return EpochSampler(len(rows), self.args.seed)
        if self.args.train_sampling_strategy == "group_by_length":
            lengths = [len(ids) for ids in rows["input_ids"]]
            return EpochSampler(len(rows), self.args.seed, batch=batch, lengths=lengths)
        return super()._get_train_sampler(train_dataset)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer of training.optim over groups by role."""
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        section = self.optimizer_section
        if section.name is not None:
            self.optimizer = riemannian_optimizer(model, section, self.args)
            return self.optimizer
        factory, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        if {"params", "model", "optimizer_dict"} & set(options) or not isinstance(factory, type):
            if section.model_dump(exclude_none=True):
                raise ConfigError(
                    f"training.optim is {self.args.optim!r}, which groups parameters itself, so "
                    "the learning rates under optimizer: would have no effect; choose another "
                    "optimizer, such as adamw_torch, or drop that section."
                )
            return super().create_optimizer(model)
        self.optimizer = factory(groups_of(model, section, self.args), **options)
        return self.optimizer

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Run forward and backward; stop at once if the loss is not finite.

        With several processes the others would wait for this one, so there the check is left to
        the summed gradient, which every process sees.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.args.world_size == 1 and not torch.isfinite(loss):
            update = self.state.global_step + 1
            layer = first_nonfinite(self.model, inputs)
            raise NonFiniteError(
                f"the loss of update {update} is {loss.item()}; training stopped before the "
                f"update{f', first seen in {layer}' if layer else ''}. Lower "
                "training.learning_rate, or look at the rows in failure.json."
            )
        return loss

    def write_failure(self, error: NonFiniteError) -> Path:
        """Write failure.json: the update that failed, its rows and tasks, what was said."""
        rows = self.rows_of_update(self.state.global_step)
        report = {
            "update": self.state.global_step + 1,
            "epoch": self.state.epoch,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "message": str(error),
            "rows": rows,
        }
        path = Path(self.args.output_dir, "failure.json")
        return atomic_write_text(path, json.dumps(report, indent=2, ensure_ascii=False) + "\n")

    def rows_of_update(self, step: int) -> list[dict[str, str]]:
        """Name the rows of update step + 1 (one process, our own order): task and id."""
        size = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        updates = -(-len(self.train_dataset) // size)
        epoch, update = divmod(step, updates)
        sampler = self._get_train_sampler()
        if not isinstance(sampler, EpochSampler) or self.args.world_size > 1:
            return []
        chosen = sampler.order(epoch)[update * size : (update + 1) * size]
        columns = self.train_dataset.select(chosen)
        return [{"task": row["task"], "id": row["id"]} for row in columns]

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Compute eval_<task>_loss of every task, and eval_loss, their mean weighted by rows."""
        if eval_dataset is not None or not isinstance(self.eval_dataset, dict):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        start, rows, total = time.time(), 0, 0.0
        metrics: dict[str, float] = {}
        for task in self.eval_dataset:
            name = f"{metric_key_prefix}_{task}"
            output = self.evaluation_loop(
                self.get_eval_dataloader(task), name, True, ignore_keys, metric_key_prefix=name
            )
            metrics[f"{name}_loss"] = output.metrics[f"{name}_loss"]
            rows += output.num_samples
            total += output.num_samples * metrics[f"{name}_loss"]
        metrics[f"{metric_key_prefix}_loss"] = total / rows
        metrics.update(speed_metrics(metric_key_prefix, start, num_samples=rows))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add balance losses, and to the last log speed and memory, before anybody sees it."""
        if "loss" in logs:
            logs.update(balance_logs(self.model))
        if "train_loss" in logs:
            logs["peak_memory_bytes"] = peak_memory_bytes()
            seen = self.state.num_input_tokens_seen
            since = seen - getattr(self, "_initial_num_input_tokens_seen", 0)
            logs["num_input_tokens_seen"] = seen
            logs["train_tokens_per_second"] = since / max(logs.get("train_runtime", 0.0), 1e-9)
        super().log(logs, start_time)


def groups_of(
    model: torch.nn.Module, section: OptimizerSection, args: TrainingArguments
) -> list[dict[str, Any]]:
    """Group the trainable parameters by role, with the run's learning rates.

    Args:
        model: the model.
        section: `optimizer:` of the run file.
        args: the trainer's arguments (learning_rate, weight_decay).

    Returns:
        Groups of an optimiser.

    Source: our choice.
    """
    rates = section.model_dump(exclude={"name", "riemannian_delta"})
    return parameter_groups(model, lr=args.learning_rate, weight_decay=args.weight_decay, **rates)


def riemannian_optimizer(
    model: torch.nn.Module, section: OptimizerSection, args: TrainingArguments
) -> torch.optim.Optimizer:
    """Build the optimiser that optimizer.name asks for.

    Args:
        model: the model; pairs (A, B) are found in its modules.
        section: `optimizer:` of the run file.
        args: the trainer's arguments (rates, AdamW's betas and epsilon).

    Returns:
        The optimiser over groups by role.

    Source: our choice.
    """
    groups = groups_of(model, section, args)
    delta = DELTA if section.riemannian_delta is None else section.riemannian_delta
    if section.name == "riemannian_sgd":
        return RiemannianSGD(groups, model=model, delta=delta)
    betas = (args.adam_beta1, args.adam_beta2)
    return RiemannianAdamW(groups, model=model, delta=delta, betas=betas, eps=args.adam_epsilon)


def first_nonfinite(model: torch.nn.Module, inputs: dict[str, Any]) -> str | None:
    """Name the first module whose output is not finite on a batch.

    Args:
        model: the model as it failed.
        inputs: the batch it failed on.

    Returns:
        The module's path, None where every output is finite.

    Source: our choice.
    """
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(first, torch.Tensor) and not first.isfinite().all():
                found.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            model(**{k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")})
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def peak_memory_bytes() -> int:
    """Return the largest memory this process has held: on CUDA the device's, else its own."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
