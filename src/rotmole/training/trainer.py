"""transformers' Trainer with learning rates by role, losses by task, and a stop before a NaN.

Why not TRL's SFTTrainer: rows arrive tokenised, so little of it would be left, and its loss sends
every position through the vocabulary twice on a CPU (2.2 s a step where this one takes 1.4 s on
SmolLM2-135M). SFTConfig's names are kept for the settings.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rotmole.config.schema import OptimizerSection
from rotmole.data import PackedRows, model_inputs
from rotmole.errors import ConfigError, NonFiniteError
from rotmole.files import atomic_write_text
from rotmole.models.memory import peak_rss_bytes
from rotmole.ops.precision import at_least_float32
from rotmole.optim import ExpertRates, Muon, RiemannianAdamW, RiemannianSGD, parameter_groups
from rotmole.optim.riemannian import DELTA
from rotmole.training.callbacks.balance import balance_logs
from rotmole.training.callbacks.metrics import read_metrics
from rotmole.training.checkpoints.checkpoints import Checkpoints, CheckpointsCallback
from rotmole.training.checkpoints.rates import forward_schedule, keep_rates
from rotmole.training.checkpoints.seal import faults
from rotmole.training.finite import Fault, agreed_fault
from rotmole.training.folder.layout import METRICS
from rotmole.training.order import EpochSampler
from rotmole.training.sharding import adapter_state, allow_sharding_on_cpus, unpin
from rotmole.training.validation import IGNORED, ValidatingTrainer
from rotmole.tuner.batch.losses import balance_states

logger = logging.getLogger(__name__)


class _FreshCallback(TrainerCallback):
    """Forget what a try of auto_find_batch_size left that ran out of memory."""

    def __init__(self, trainer: RotMoleTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin anew."""
        self.trainer.micro_batches.clear()
        trainer = self.trainer
        trainer.seconds_aside, trainer.began = 0.0, time.perf_counter()
        trainer.seconds_before = 0.0
        log = Path(args.output_dir, METRICS)
        for row in read_metrics(log) if state.global_step else []:
            if row["step"] <= state.global_step:
                trainer.seconds_before = row.get("train_seconds", trainer.seconds_before)


class RotMoleTrainer(ValidatingTrainer):
    """Trainer of a causal language model on rows that are already token ids.

    It overrides these private methods of Trainer, as it has no public place for them:
    `_get_train_sampler` (the order is ours), `_save_checkpoint` (sealed and pruned by us),
    `_load_best_model` (a damaged one is not loaded), `_load_from_checkpoint` (another engine's
    weights are there already), `_load_optimizer_and_scheduler`, `_load_scaler`, `_load_rng_state`
    (left out with --weights-only); and, in validation.py, `_evaluate` and
    `_determine_best_metric` (a validation that is cut short).

    Args:
        optimizer_section: learning rates by role.
        checkpoints: those of the run; None begins anew in args.output_dir.
        kwargs: as Trainer's; eval_dataset may be {task: rows}.

    Attributes:
        seconds_aside: what validation and checkpoints took since training began, so that speeds
            are those of training alone.
        seconds_before: of training alone before a resume.
    """

    def __init__(
        self,
        *,
        optimizer_section: OptimizerSection,
        checkpoints: Checkpoints | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.optimizer_section = optimizer_section
        self.checkpoints = checkpoints or Checkpoints(Path(self.args.output_dir))
        self.checkpoints.keep = self.args.save_total_limit
        self.args.save_total_limit = None  # Checkpoints prunes
        self.add_callback(CheckpointsCallback(self, self.checkpoints))
        self.add_callback(_FreshCallback(self))
        self.seconds_aside = self.seconds_before = 0.0
        self.began = time.perf_counter()
        self.aside_since: float | None = None
        self.micro_batches: list[tuple[dict[str, Any], torch.Tensor]] = []
        self.fault: Fault | None = None
        self.update_tokens: torch.Tensor | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, without its words on other logging_steps, eval_steps, save_steps.

        They change no result, and shares of a run are not the numbers that a checkpoint holds.
        """
        source = logging.getLogger("transformers.trainer_utils")
        source.addFilter(_says_no_mismatch)
        try:
            return super().train(*args, **kwargs)
        finally:
            source.removeFilter(_says_no_mismatch)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        started = self.aside_since = time.perf_counter()
        try:
            yield
        finally:
            self.seconds_aside += time.perf_counter() - started
            self.aside_since = None

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self._aside():
            return super()._evaluate(*args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        """As Trainer's; FSDP that is asked for happens on CPUs too."""
        launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        if self.args.use_cpu and (self.args.fsdp or launched):
            allow_sharding_on_cpus()
        super().create_accelerator_and_postprocess()
        if self.args.use_cpu:
            unpin(getattr(self.accelerator.state, "fsdp_plugin", None))

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
        inputs = model_inputs(inputs)
        if not self.accepts_logits_to_keep or self.label_smoother is not None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        others = {name: value for name, value in inputs.items() if name != "labels"}
        learnt = (labels[:, 1:] != IGNORED).any(0).nonzero()[:, 0]
        outputs = model(**others, logits_to_keep=learnt, use_cache=False)
        targets = labels[:, learnt + 1].flatten()
        logits = at_least_float32(outputs.logits.flatten(0, 1))
        total = cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        loss = total / torch.as_tensor(count, device=total.device).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP divides the sum of gradients by it
        return (loss, outputs) if return_outputs else loss

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        strategy = self.args.train_sampling_strategy
        if strategy == "group_by_length" and not isinstance(rows, PackedRows):
            batch = self.rows_an_update() // self.args.gradient_accumulation_steps
            lengths = [len(ids) for ids in rows["input_ids"]]
            return EpochSampler(len(rows), self.args.seed, batch=batch, lengths=lengths)
        if strategy in ("random", "group_by_length"):
            return EpochSampler(len(rows), self.args.seed)
        return super()._get_train_sampler(train_dataset)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer of training.optim over groups by role."""
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        section = self.optimizer_section
        if section.name is not None:
            self.optimizer = own_optimizer(model, section, self.args)
        else:
            factory, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            if {"params", "model", "optimizer_dict"} & set(options) or not isinstance(
                factory, type
            ):
                if section.model_dump(exclude_defaults=True):
                    raise ConfigError(
                        f"training.optim is {self.args.optim!r}, which groups parameters itself, "
                        "so the settings under optimizer: would have no effect; choose another "
                        "optimizer, such as adamw_torch, or drop that section."
                    )
                return super().create_optimizer(model)
            self.optimizer = factory(groups_of(model, section, self.args), **options)
        if section.expert_lr_by_load != "none":
            ExpertRates(self.optimizer, model=model)
        return self.optimizer

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Fetch an update's micro-batches, and count their tokens, all processes' / processes."""
        batches, labels = super().get_batch_samples(*args, **kwargs)
        if batches:
            tokens = torch.stack([batch["attention_mask"].sum() for batch in batches]).sum()
            every = self.accelerator.gather(tokens.to(self.args.device))
            self.update_tokens = every.sum() / self.accelerator.num_processes
        return batches, labels

    def weigh_balance(self, inputs: dict[str, Any]) -> None:
        """Let the balance loss of a micro-batch count by its share of the update's tokens.

            loss = sum_n (tokens of sequence n) loss_n / (tokens of the update)

        over all micro-batches of all processes, so it does not depend on how an update is split.
        """
        if self.update_tokens is None:
            return
        scale = inputs["attention_mask"].sum().to(self.args.device) / self.update_tokens
        if self.accelerator.scaler is not None:  # fp16 only
            scale = scale * self.accelerator.scaler.get_scale()
        for balance in balance_states(self.model):
            balance.managed, balance.loss_scale = True, scale

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Run forward and backward; after an update's last, stop if it would not be finite."""
        self.weigh_balance(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.micro_batches.append((inputs, loss))
        if self.accelerator.sync_gradients:
            batches, self.micro_batches = self.micro_batches, []
            self.fault = agreed_fault(self, batches)
            if self.fault is not None:
                raise NonFiniteError(self.fault.sentence(self.state.global_step + 1))
        return loss

    def write_failure(self, error: NonFiniteError) -> Path:
        """Write failure.json: the update that failed, its rows and tasks, what was said."""
        rows = self.rows_of_update(self.state.global_step)
        report = {
            "update": self.state.global_step + 1,
            "epoch": self.state.epoch,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "message": str(error),
            **(self.fault.report() if self.fault else {}),
            "rows": rows,
        }
        path = Path(self.args.output_dir, "failure.json")
        return atomic_write_text(path, json.dumps(report, indent=2, ensure_ascii=False) + "\n")

    def rows_an_update(self) -> int:
        """Return the rows, or packs of rows, of a full update, all processes' together."""
        each = self._train_batch_size * self.args.gradient_accumulation_steps
        return each * self.args.world_size

    def rows_of_update(self, step: int) -> list[dict[str, str]]:
        """Name the rows of update step + 1, all processes' (our own order): task and id."""
        size = self.rows_an_update()
        rows, each = len(self.train_dataset), size // self.args.gradient_accumulation_steps
        if self.args.dataloader_drop_last:  # a last batch that is not full; not a last update
            rows -= rows % each
        updates = max(-(-rows // size), 1)
        epoch, update = divmod(step, updates)
        sampler = self._get_train_sampler()
        if not isinstance(sampler, EpochSampler):
            return []
        chosen = sampler.order(epoch)[update * size : min((update + 1) * size, rows)]
        items = (self.train_dataset[number] for number in chosen)
        named = [row for item in items for row in (item if isinstance(item, list) else [item])]
        return [{"task": row["task"], "id": row["id"]} for row in named]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        now = self.state.global_step, self._globalstep_last_logged
        if self.checkpoints.last_saved == now:  # the same update, such as at the end of an epoch
            return
        log = Path(self.args.output_dir, METRICS)
        with self._aside(), self.checkpoints.save(self, log):
            super()._save_checkpoint(model, trial)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        problems = faults(Path(best))
        if problems:
            message = "the best checkpoint, %s, is damaged (%s); the last weights are the result"
            logger.warning(message, best, "; ".join(problems))
            self.state.best_model_checkpoint = None
        else:
            super()._load_best_model()

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        checkpoints = self.checkpoints
        if not checkpoints.weights_loaded or Path(resume_from_checkpoint) != checkpoints.origin:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.checkpoints.weights_only:
            forward_schedule(self.lr_scheduler, self.state.global_step)
        elif checkpoint is not None:
            with keep_rates(self.optimizer, self.lr_scheduler):
                super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        super()._load_scaler(None if self.checkpoints.weights_only else checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(None if self.checkpoints.weights_only else checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter, whole; of a sharded model the base is not put together for it."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        state = adapter_state(self.model, self.args.device)
        if self.args.should_save:  # _save of older transformers does not look
            self._save(output_dir, state_dict=state)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add balance losses, and to the last log speed and memory, before anybody sees it."""
        if "loss" in logs:
            logs.update(balance_logs(self.model, self.accelerator.reduce))
        if "train_loss" in logs:
            summed = max(
                self.state.global_step - self.checkpoints.summed_from, 1
            )  # before a resume too
            logs["train_loss"] = self._total_loss_scalar / summed
            logs["peak_memory_bytes"] = peak_memory_bytes()
            seen = self.state.num_input_tokens_seen
            since = seen - getattr(self, "_initial_num_input_tokens_seen", 0)
            logs["num_input_tokens_seen"] = seen
            whole = max(logs.get("train_runtime", 0.0), 1e-9)
            alone = max(whole - self.seconds_aside, 1e-9)
            for rate in ("train_samples_per_second", "train_steps_per_second"):
                logs[rate] = logs.get(rate, 0.0) * whole / alone
            logs["train_tokens_per_second"] = since / alone
        now = time.perf_counter() if self.aside_since is None else self.aside_since
        spent = now - self.began - self.seconds_aside
        logs["train_seconds"] = round(self.seconds_before + spent, 3)
        super().log(logs, None if start_time is None else start_time + self.seconds_aside)


def _says_no_mismatch(record: logging.LogRecord) -> bool:
    return "arguments do not match" not in record.getMessage()


def groups_of(
    model: torch.nn.Module, section: OptimizerSection, args: TrainingArguments
) -> list[dict[str, Any]]:
    """Group the trainable parameters by role, with the run's learning rates.

    Args:
        model: the model.
        section: `optimizer:` of the run file.
        args: the trainer's arguments (learning_rate, weight_decay).
    """
    rates = section.model_dump(exclude={"name", "riemannian_delta", "expert_lr_by_load"})
    return parameter_groups(model, lr=args.learning_rate, weight_decay=args.weight_decay, **rates)


def own_optimizer(
    model: torch.nn.Module, section: OptimizerSection, args: TrainingArguments
) -> torch.optim.Optimizer:
    """Build the optimiser that optimizer.name asks for.

    Args:
        model: the model; pairs (A, B) are found in its modules.
        section: `optimizer:` of the run file.
        args: the trainer's arguments (rates, AdamW's betas and epsilon).

    Returns:
        The optimiser over groups by role.
    """
    groups = groups_of(model, section, args)
    delta = DELTA if section.riemannian_delta is None else section.riemannian_delta
    if section.name == "riemannian_sgd":
        return RiemannianSGD(groups, model=model, delta=delta)
    betas = (args.adam_beta1, args.adam_beta2)
    if section.name == "muon":
        return Muon(groups, model=model, betas=betas, eps=args.adam_epsilon)
    return RiemannianAdamW(groups, model=model, delta=delta, betas=betas, eps=args.adam_epsilon)


def peak_memory_bytes() -> int:
    """Return the largest memory this process has held: on CUDA the device's, else its own."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return peak_rss_bytes()
