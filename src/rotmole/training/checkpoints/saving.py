"""Save a checkpoint from inside the trainer: written, sealed, then older ones pruned."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rotmole.errors import StorageError
from rotmole.files import atomic_write_text, storage_errors, sync
from rotmole.training.checkpoints.seal import (
    COMPLETE,
    begin,
    faults,
    prune,
    read_seal,
    remove,
    seal,
    storage_of,
)
from rotmole.training.folder.layout import METRICS
from rotmole.tuner.batch.losses import balance_states

logger = logging.getLogger(__name__)

_TORCH_WRITES = ("PytorchStreamWriter", "cannot be opened", "Parent directory")
"""Words of torch.save where a file cannot be written."""


@contextmanager
def whole_checkpoint(trainer: Any) -> Iterator[None]:
    """Save the checkpoint of the update just made inside the block, all or nothing.

    What an earlier attempt left of it goes first. All processes' files are there before
    COMPLETE.json is written, and that is on the disk before an older checkpoint goes.

    Args:
        trainer: a RotMoleTrainer.

    Raises:
        StorageError: the disk refused; older checkpoints are untouched.

    Source: our choice.
    """
    run_dir = Path(trainer.args.output_dir)
    checkpoint = run_dir / f"checkpoint-{trainer.state.global_step}"
    writes = trainer.is_world_process_zero()
    with nothing_half_written(checkpoint):
        if writes:
            begin(checkpoint)
        trainer.accelerator.wait_for_everyone()
        yield
        save_sums(trainer, checkpoint)
        trainer.accelerator.wait_for_everyone()
        if writes:
            if (run_dir / METRICS).is_file():
                sync(run_dir / METRICS)
            seal(checkpoint, {"facts": trainer.facts, "validation_owed": trainer.owed})
    if writes:
        prune(run_dir, trainer.keep, checkpoint, trainer.state.best_model_checkpoint)
    trainer.accelerator.wait_for_everyone()


def seal_again(trainer: Any, checkpoint: Path) -> None:
    """Let a checkpoint that was just written say as well whether its validation was cut short.

    Args:
        trainer: a RotMoleTrainer.
        checkpoint: of the update just made; complete before and after.

    Raises:
        StorageError: the disk refused; the checkpoint says what it said.

    Source: our choice.
    """
    if trainer.is_world_process_zero():
        content = read_seal(checkpoint)
        assert isinstance(content, dict)
        content["validation_owed"] = trainer.owed
        atomic_write_text(checkpoint / COMPLETE, json.dumps(content, indent=1) + "\n")
    trainer.accelerator.wait_for_everyone()


@contextmanager
def nothing_half_written(checkpoint: Path) -> Iterator[None]:
    """Write a checkpoint inside the block; where the disk refuses, leave nothing half-written.

    Args:
        checkpoint: its folder.

    Raises:
        StorageError: whatever way torch, safetensors or Python say that the disk refused.

    Source: our choice.
    """
    try:
        with storage_errors(checkpoint):
            try:
                yield
            except (RuntimeError, SafetensorError) as error:
                refused = _as_os_error(error, checkpoint)
                if refused is None:
                    raise
                raise refused from error
    except OSError:
        remove(checkpoint)
        raise


def _as_os_error(error: Exception, folder: Path) -> OSError | None:
    """Find the disk's refusal in what torch (no number at all) and safetensors make of it."""
    number = re.search(r"os error (\d+)", str(error))
    if number:
        return OSError(int(number[1]), os.strerror(int(number[1])))
    if not any(words in str(error) for words in _TORCH_WRITES):
        return None
    probe = folder / ".probe"
    try:  # torch hides the reason, so ask the disk once more
        probe.write_bytes(bytes(1 << 20))
        probe.unlink()
    except OSError as refused:
        return refused
    return OSError(str(error).splitlines()[0])


def _sums_file(trainer: Any, checkpoint: Path) -> Path:
    rank, size = trainer.args.process_index, trainer.args.world_size
    return checkpoint / (f"sums_{rank}.json" if size > 1 else "sums.json")


def save_sums(trainer: Any, checkpoint: Path) -> None:
    """Write what is summed up since the last log line, which transformers forgets.

    Args:
        trainer: a RotMoleTrainer.
        checkpoint: the folder it saves to; each process writes a file of its own.

    Raises:
        StorageError: the disk refused.

    Source: our choice; numbers survive JSON to the last bit.
    """
    states = balance_states(trainer.model)
    summed = getattr(trainer, "_tr_loss", None)  # a local of older transformers: then lost
    content = {
        "loss": None if summed is None else summed.item(),
        "logged_loss": trainer._total_loss_scalar,
        "logged_step": trainer._globalstep_last_logged,
        "balance": [
            None if s.sums is None else {"count": s.count, "sums": s.sums.double().tolist()}
            for s in states
        ],
    }
    path = _sums_file(trainer, checkpoint)
    atomic_write_text(path, json.dumps(content) + "\n")


class ResumeCallback(TrainerCallback):
    """Take up the sums of a checkpoint, and the best checkpoint in a run folder that was moved.

    Args:
        trainer: the RotMoleTrainer that trains.
        checkpoint: the one it goes on from.
    """

    def __init__(self, trainer: Any, checkpoint: Path) -> None:
        self.trainer, self.checkpoint = trainer, checkpoint

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore, after the trainer has set its sums to zero."""
        state.compute_steps(args, state.max_steps)  # a checkpoint's own would prevail
        find_best(self.trainer, self.checkpoint)
        path, trainer = _sums_file(self.trainer, self.checkpoint), self.trainer
        saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if trainer.weights_only or saved.get("loss") is None:  # or other processes than then
            trainer.summed_from = state.global_step
            return
        trainer._tr_loss = torch.tensor(saved["loss"], device=args.device)
        trainer._total_loss_scalar = saved["logged_loss"]
        trainer._globalstep_last_logged = saved["logged_step"]
        for balance, entry in zip(balance_states(trainer.model), saved["balance"], strict=False):
            if entry is not None:
                balance.count = entry["count"]
                balance.sums = torch.tensor(entry["sums"], dtype=torch.float32, device=args.device)


def find_best(trainer: Any, checkpoint: Path) -> None:
    """Find the best checkpoint of a resumed run again; where it is lost, say so and forget it.

    Args:
        trainer: a RotMoleTrainer whose run folder may have been moved or copied, its state as
            loaded from a checkpoint; the state's best checkpoint is set right.
        checkpoint: that one, perhaps of another run folder.

    Source: our choice.
    """
    state = trainer.state
    if not state.best_global_step:
        return
    name = f"checkpoint-{state.best_global_step}"
    places = [Path(trainer.args.output_dir, name), checkpoint.parent / name]
    for place in places:
        if place.is_dir() and not faults(place) and storage_of(place) == trainer.storage():
            state.best_model_checkpoint = str(place)
            return
    logger.warning(
        "%s, the best so far, is gone, damaged or of another engine; the best is sought anew",
        places[0],
    )
    state.best_metric = state.best_global_step = state.best_model_checkpoint = None


def prepare_resume(trainer: Any, checkpoint: Path) -> None:
    """Prepare a trainer to go on from a checkpoint.

    Args:
        trainer: a RotMoleTrainer that has not trained yet.
        checkpoint: a complete one.

    Source: our choice.
    """
    seal = read_seal(checkpoint)
    trainer.owed = isinstance(seal, dict) and bool(seal.get("validation_owed"))
    trainer.args.eval_on_start = trainer.owed  # else it was not at a start
    trainer.add_callback(ResumeCallback(trainer, checkpoint))


def usable_best(trainer: Any) -> bool:
    """Tell whether the best checkpoint is whole; warn where the last weights are the result.

    Args:
        trainer: a RotMoleTrainer at the end of its training.

    Returns:
        True where it can be loaded; False also forgets it.

    Source: our choice.
    """
    best = trainer.state.best_model_checkpoint
    found = faults(Path(best))
    if found:
        logger.warning(
            "the best checkpoint, %s, is damaged (%s); the last weights are the result",
            best,
            "; ".join(found),
        )
        trainer.state.best_model_checkpoint = None
    return not found


def forward_schedule(trainer: Any) -> None:
    """Bring a fresh learning-rate schedule to the update that the run is at (--weights-only)."""
    schedule = trainer.lr_scheduler
    if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it wants the optimizer to step first
        for _ in range(trainer.state.global_step):
            schedule.step()


@contextmanager
def own_rates(optimizer: Any, schedule: Any) -> Iterator[None]:
    """Load optimizer and schedule inside the block; the rates stay those of this run.

    What is loaded brings the rates of the checkpoint's run, which would prevail over a change that
    was allowed, and over a schedule of another length until the next update.

    Args:
        optimizer: as made from this run's settings.
        schedule: as made from them.

    Source: our choice; the rate of the next update is base rate x factor(updates made), as
    torch's LambdaLR has it. Schedules whose state holds the rates keep them.
    """
    names = ("initial_lr", "weight_decay", "betas", "eps")
    own = [{n: group[n] for n in names if n in group} for group in optimizer.param_groups]
    bases = list(getattr(schedule, "base_lrs", ()))
    yield
    for group, rates in zip(optimizer.param_groups, own, strict=True):
        group.update(rates)
    if isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
        schedule.base_lrs = bases
        schedule._last_lr = [
            base * factor(schedule.last_epoch)
            for base, factor in zip(bases, schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(optimizer.param_groups, schedule._last_lr, strict=True):
            group["lr"] = rate


def check_space(run_dir: Path, trainer: Any) -> None:
    """Refuse to start where the disk cannot take the run's checkpoints.

        need = (kept + 1) * checkpoint + adapter + 32 MiB for tokenizer, papers and logs
        checkpoint = bytes of the trained weights (1 + optimizer's states)

    Args:
        run_dir: the run folder; checkpoints that lie there already give way.
        trainer: a RotMoleTrainer.

    Raises:
        StorageError: there is less free space than that.

    Source: our choice; counted low where the optimizer's states are not known.
    """
    weights = sum(
        p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad
    )
    optimizer = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    states = 2 if optimizer.startswith("adamw") and "bit" not in optimizer else 0
    checkpoint = weights * (1 + states)
    kept = trainer.keep or 1
    there = sum(f.stat().st_size for f in run_dir.glob("checkpoint-*/**/*") if f.is_file())
    need = (kept + 1) * checkpoint + weights + (32 << 20) - there
    with storage_errors(run_dir):
        free = shutil.disk_usage(run_dir).free
    if free < need:
        raise StorageError(
            f"output_dir {str(run_dir)!r} has {free / 1e6:,.0f} MB free and the run needs about "
            f"{need / 1e6:,.0f} MB ({kept + 1} checkpoints of {checkpoint / 1e6:,.1f} MB); free "
            "some space, choose another folder, or lower training.save_total_limit."
        )
