"""The checkpoints of one run: the one it goes on from, those it saves, those it keeps."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import (
    DefaultFlowCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from rotmole.errors import StorageError
from rotmole.files import share, storage_errors, sync
from rotmole.models.adapter import name_base
from rotmole.training.checkpoints.find import prune
from rotmole.training.checkpoints.seal import UNSHARDED, begin, faults, seal, storage_of
from rotmole.training.checkpoints.sums import restore_sums, save_sums
from rotmole.training.checkpoints.write import nothing_half_written

logger = logging.getLogger(__name__)


def engine_of(trainer: Trainer) -> str:
    """Say how a trainer's engine stores a checkpoint: a key of seal.STORAGE, or UNSHARDED."""
    if not trainer.is_fsdp_enabled:
        return UNSHARDED
    whole_states = trainer.accelerator.state.fsdp_plugin.state_dict_type.name == "FULL_STATE_DICT"
    return "FSDP with whole states" if whole_states else "FSDP with shards"


@dataclass(eq=False)
class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        run_dir: the run folder.
        origin: the checkpoint that the run goes on from; None if it starts anew.
        facts: what decides the run's numbers, written into each checkpoint.
        changes: between the run that origin is of and this one, in words.
        weights_only: take no more than origin's weights.
        allow_change: changes are wanted.
        keep: how many checkpoints stay (training.save_total_limit), None for all.
        weights_loaded: origin's weights are in the model already, as another engine wrote them.
        last_saved: (update, last logged update) of the checkpoint that was saved last.
        summed_from: the update at which the sum of the training loss begins.
        scores_differ: validation losses from before the resume do not compare with those after it.
    """

    run_dir: Path
    origin: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)
    weights_only: bool = False
    allow_change: bool = False
    keep: int | None = None
    weights_loaded: bool = False
    last_saved: tuple[int, int] | None = None
    summed_from: int = 0
    scores_differ: bool = False

    def of_step(self, step: int) -> Path:
        """Return the folder of the checkpoint after an update."""
        return self.run_dir / f"checkpoint-{step}"

    @contextmanager
    def save(self, trainer: Trainer, log: Path) -> Iterator[None]:
        """Save the checkpoint of the update just made inside the block, all or nothing.

        What an earlier attempt left of it is removed first. The files of all processes are there
        before COMPLETE.json is written, and that is on the disk before an older one is removed.

        Args:
            trainer: that saves.
            log: the file of metric lines, put on the disk as well.

        Raises:
            StorageError: the disk refused; older checkpoints are untouched.
        """
        checkpoint, writes = (
            self.of_step(trainer.state.global_step),
            trainer.is_world_process_zero(),
        )
        with nothing_half_written(checkpoint):
            if writes:
                begin(checkpoint)
            trainer.accelerator.wait_for_everyone()
            yield
            save_sums(trainer, checkpoint)
            trainer.accelerator.wait_for_everyone()
            if writes:
                if log.is_file():
                    sync(log)
                name_base(checkpoint)
                share(checkpoint)
                seal(checkpoint, {"facts": self.facts})
        if writes:
            self.prune(checkpoint, trainer.state.best_model_checkpoint)
        trainer.accelerator.wait_for_everyone()
        self.last_saved = trainer.state.global_step, trainer._globalstep_last_logged

    def prune(self, newest: Path, best: str | None) -> None:
        """Remove older checkpoints than `keep` allows; the newest and the best stay."""
        prune(self.run_dir, self.keep, newest, best)

    def resume(self, trainer: Trainer) -> None:
        """Prepare a trainer that has not trained yet to go on from origin."""
        assert self.origin is not None
        state = TrainerState.load_from_json(str(self.origin / "trainer_state.json"))
        # otherwise it would be made again at every resume
        missing = validation_is_missing(trainer.args, state)
        trainer.args.eval_on_start = missing or (self.scores_differ and _validates(trainer.args))

    def best_place(self, trainer: Trainer) -> Path | None:
        """Return where the best checkpoint of a resumed run lies now, None if it is lost.

        The run folder may have been moved or copied, and origin may be of another one.
        """
        name = f"checkpoint-{trainer.state.best_global_step}"
        folders = [self.run_dir, *([] if self.origin is None else [self.origin.parent])]
        for place in [folder / name for folder in folders]:
            if place.is_dir() and not faults(place) and storage_of(place) == engine_of(trainer):
                return place
        return None

    def restore_best(self, trainer: Trainer) -> None:
        """Correct the path of the best checkpoint in a loaded state, or forget a lost one."""
        state = trainer.state
        if not state.best_global_step:
            return
        place = None if self.scores_differ else self.best_place(trainer)
        if place is not None:
            state.best_model_checkpoint = str(place)
            return
        reason = "was chosen by losses that do not compare with those of this run"
        if not self.scores_differ:
            reason = "is gone, damaged or of another engine"
        best = self.of_step(state.best_global_step)
        logger.warning("%s, the best so far, %s; the best is sought anew", best, reason)
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def check_space(self, trainer: Trainer, *, frees: bool = True) -> None:
        """Refuse to start if the disk cannot take the run's checkpoints.

            need = (kept + 1) * checkpoint + adapter + 32 MiB for tokenizer, documents and logs
            checkpoint = bytes of the trained weights (1 + optimizer's states)

        Optimizers whose number of states is unknown count as having none.

        Args:
            trainer: of the run.
            frees: checkpoints that lie there already will be removed.

        Raises:
            StorageError: there is less free space than that.
        """
        parameters = trainer.model.parameters()
        weights = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
        optimizer = str(getattr(trainer.args.optim, "value", trainer.args.optim))
        states = 2 if optimizer.startswith("adamw") and "bit" not in optimizer else 0
        checkpoint, number = weights * (1 + states), (self.keep or 1) + 1
        files = self.run_dir.glob("checkpoint-*/**/*")
        present = sum(file.stat().st_size for file in files if file.is_file()) if frees else 0
        need = number * checkpoint + weights + (32 << 20) - present
        with storage_errors(self.run_dir):
            free = shutil.disk_usage(self.run_dir).free
        if free < need:
            raise StorageError(
                f"output_dir {str(self.run_dir)!r} has {free / 1e6:,.0f} MB free and the run needs "
                f"about {need / 1e6:,.0f} MB ({number} checkpoints of {checkpoint / 1e6:,.1f} MB); "
                "free some space, choose another folder, or lower training.save_total_limit."
            )


class CheckpointsCallback(TrainerCallback):
    """When training begins, take up what origin holds besides the trainer's own state."""

    def __init__(self, trainer: Trainer, checkpoints: Checkpoints) -> None:
        self.trainer, self.checkpoints = trainer, checkpoints

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore, after the trainer has set its sums to zero."""
        checkpoints = self.checkpoints
        checkpoints.last_saved = None  # auto_find_batch_size begins again with other weights
        if checkpoints.origin is None:
            return
        state.compute_steps(args, state.max_steps)  # the checkpoint's own would prevail
        checkpoints.restore_best(self.trainer)
        if checkpoints.weights_only or not restore_sums(self.trainer, checkpoints.origin):
            checkpoints.summed_from = state.global_step


def _validates(args: TrainingArguments) -> bool:
    return str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no"


def validation_is_missing(args: TrainingArguments, state: TrainerState) -> bool:
    """Tell whether the validation of the last update was due and was cut short by a signal.

    Args:
        args: the trainer's arguments, by which transformers decides what is due.
        state: of the trainer, or of a checkpoint.
    """
    if state.global_step == 0 or not _validates(args):
        return False
    flow, epoch = DefaultFlowCallback(), float(state.epoch or 0)
    due = flow.on_step_end(args, state, TrainerControl()).should_evaluate
    if epoch.is_integer():
        due = due or flow.on_epoch_end(args, state, TrainerControl()).should_evaluate
    return due and not any(_is_validation(row, state.global_step) for row in state.log_history)


def _is_validation(row: Mapping[str, Any], step: int) -> bool:
    return "eval_loss" in row and row.get("step") == step
