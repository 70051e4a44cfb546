"""Train one run from its run file to its run folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState
from transformers.utils import CHAT_TEMPLATE_FILE

from rotmole.config.load import resolved_yaml
from rotmole.config.schema import RunFile
from rotmole.data import data_fingerprint
from rotmole.errors import NonFiniteError
from rotmole.files import atomic_write_text, storage_errors
from rotmole.models.endings import endings_of
from rotmole.processes import is_main_process, same_everywhere
from rotmole.training.build import Built, Sources, build
from rotmole.training.callbacks.batch_size import BatchSizeCallback
from rotmole.training.callbacks.early import validations_without_a_better
from rotmole.training.callbacks.metrics import read_metrics
from rotmole.training.callbacks.progress import ProgressCallback
from rotmole.training.callbacks.stop import StopOnSignal
from rotmole.training.changes import (
    check_answers,
    check_changes,
    check_engine,
    check_tensors,
    facts_of,
    loaded_facts,
    scores_differ,
)
from rotmole.training.checkpoints.checkpoints import (
    Checkpoints,
    engine_of,
    validation_is_missing,
)
from rotmole.training.checkpoints.find import find_resume
from rotmole.training.checkpoints.seal import step_of
from rotmole.training.figures import final_metrics, readable
from rotmole.training.folder.card import model_card
from rotmole.training.folder.layout import (
    MANIFEST,
    METRICS,
    UNFINISHED,
    check_free,
    clear,
    drop_previous,
    is_being_cleared,
    is_finished,
    save_adapter,
)
from rotmole.training.folder.lock import run_lock
from rotmole.training.folder.manifest import add_to_manifest, earlier_resumes, manifest
from rotmole.training.folder.plots import loss_svg
from rotmole.training.sharding import adapter_state
from rotmole.training.validation import ValidationCut
from rotmole.units import duration

logger = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """What a training run gave.

    Attributes:
        run_dir: the run folder.
        adapter_dir: the saved adapter, None where the run was interrupted and in all processes but
            the first.
        steps: updates made, those before a resume included.
        weights_step: the update that the result's weights are of.
        metrics: the run's figures: training and validation losses, tokens/s, peak memory.
        seconds: wall time of training alone, since the resume if there was one.
        trainable_parameters: gates included.
        interrupted: the signal that stopped the run, None where it ended by itself.
        stopped_early: evaluation.early_stopping_patience ended it before its last update.
        best_checkpoint: the checkpoint whose weights are the result, None for the last ones.
        built: model, data and trainer, to go on with.
    """

    run_dir: Path
    adapter_dir: Path | None
    steps: int
    weights_step: int
    metrics: dict[str, Any]
    seconds: float
    trainable_parameters: int
    interrupted: int | None
    stopped_early: bool
    best_checkpoint: str | None
    built: Built = field(repr=False)


def train(
    run: RunFile,
    *,
    resume: str | None = None,
    weights_only: bool = False,
    allow_change: bool = False,
    trust_remote_code: bool = False,
    sources: Sources | None = None,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
    say: Callable[[str], None] | None = None,
    prepare: Callable[[Built], None] | None = None,
) -> TrainResult:
    """Train a run and write its folder: configuration, manifest, metrics, plot, adapter, card.

    Args:
        run: a checked run file.
        resume: None starts anew, "auto" goes on from the newest complete checkpoint if there is
            one, anything else is a checkpoint's path.
        weights_only: go on with the checkpoint's weights and a fresh optimizer; schedule and
            order of rows go on where they were.
        allow_change: go on though settings, data, versions or processes are not the checkpoint's.
        trust_remote_code: let transformers run code that came with the model.
        sources: of the run's parts; None loads them.
        progress: show progress on standard error.
        callbacks: further callbacks of the trainer.
        say: told before slow steps.
        prepare: called with the parts before training begins, such as to print a header; of
            several processes only the first one calls it.

    Returns:
        The figures and the parts.

    Raises:
        InputError: run file, model, data or folder are wrong; nothing was trained.
        NonFiniteError: a loss or gradient was not finite; the weights and checkpoints are as they
            were before that update, failure.json says where.
        StorageError: the disk refused.
    """
    run_dir, stop = Path(run.output_dir), StopOnSignal(say, cuts_validation=True)
    bars = [ProgressCallback()] if progress else []
    with run_lock(run_dir) if is_main_process() else nullcontext():
        checkpoints = find_origin(run, resume, weights_only=weights_only, allow_change=allow_change)
        if checkpoints.origin is not None:
            (say or logger.info)(f"going on from {checkpoints.origin}")
        built = build(
            run,
            callbacks=[stop, *bars, BatchSizeCallback(partial(_found_size, run_dir)), *callbacks],
            say=say,
            trust_remote_code=trust_remote_code,
            sources=sources,
            checkpoints=checkpoints,
        )
        prepare_folder(built)
        for bar in bars:
            trainer = built.trainer
            bar.plan(trainer.args, built.validation, trainer.rows_an_update())
        if prepare is not None and is_main_process():
            prepare(built)
        started = time.perf_counter()
        try:
            _fit(built, stop)
        finally:
            for bar in bars:
                bar.close()
        result = _result(built, stop, time.perf_counter() - started)
        return finish(result) if result.interrupted is None else result


def _found_size(run_dir: Path, asked: int, size: int) -> None:
    """Say, and note in the manifest, what training.auto_find_batch_size came to."""
    logger.warning(
        "batches of %d rows (training.per_device_train_batch_size) did not fit into memory; "
        "training goes on with %d",
        asked, size,
    )  # fmt: skip
    add_to_manifest(run_dir / MANIFEST, {"per_device_train_batch_size_found": size})


def find_origin(
    run: RunFile, resume: str | None, *, weights_only: bool, allow_change: bool
) -> Checkpoints:
    """Find where a run begins, and refuse what cannot be, before anything is loaded.

    Args:
        run, resume, weights_only, allow_change: as of `train`.

    Raises:
        InputError: there is no such checkpoint, it is of another run, or the folder is in use.
    """
    run_dir = Path(run.output_dir)
    origin = None
    if resume not in (None, "auto") or not is_being_cleared(run_dir):
        origin = find_resume(run_dir, resume, weights_only=weights_only)
        if origin is None:
            check_free(run_dir)
    facts = facts_of(run)
    changes = []
    if origin is not None:
        changes = check_changes(origin, facts, allow=allow_change, weights_only=weights_only)
    return Checkpoints(
        run_dir,
        origin,
        facts,
        changes,
        weights_only=weights_only,
        allow_change=allow_change,
    )


def prepare_folder(built: Built) -> None:
    """Compare the loaded parts with the checkpoint, check the disk, clear up, describe the run.

    The files of an earlier run stay until its successor is ready to train, and those of a finished
    one until its successor is complete.

    Args:
        built: the parts of the run; its trainer's checkpoints say where it begins.

    Raises:
        InputError: data or number format are not the checkpoint's.
        StorageError: the disk refuses, or is too small for the run.
    """
    trainer, checkpoints = built.trainer, built.trainer.checkpoints
    run_dir, origin = checkpoints.run_dir, checkpoints.origin
    same_everywhere("model.dtype", built.base.model.dtype)
    same_everywhere("one date on all machines", built.date)
    fingerprint = data_fingerprint(built.run.data, built.examples)
    used = {"train": built.examples["train"], "validation": built.validation}
    facts = loaded_facts(data_fingerprint(built.run.data, used), built.base.model.dtype)
    if origin is not None:
        if not checkpoints.allow_change:
            check_answers(origin, built.examples["train"])
        checkpoints.changes += check_changes(origin, facts, allow=checkpoints.allow_change)
        checkpoints.scores_differ = scores_differ(checkpoints.changes)
        check_tensors(built.model, origin)
        weights_only = checkpoints.weights_only
        if not check_engine(origin, engine_of(trainer), weights_only=weights_only):
            built.model.load_adapter(str(origin), built.model.active_adapter, is_trainable=True)
            checkpoints.weights_loaded = True
        checkpoints.resume(trainer)
    checkpoints.facts |= facts
    if is_main_process():
        checkpoints.check_space(trainer, frees=origin is not None or not is_finished(run_dir))
        clear(run_dir, resuming=origin is not None)
        describe_run(built, fingerprint)


def _fit(built: Built, stop: StopOnSignal) -> None:
    trainer, origin = built.trainer, built.trainer.checkpoints.origin
    try:
        with stop.listening(), suppress(ValidationCut):
            if origin is not None and _nothing_left(built, origin):
                return
            trainer.train(resume_from_checkpoint=str(origin) if origin else None)
    except NonFiniteError as error:
        if is_main_process():
            trainer.write_failure(error)
        raise


def _nothing_left(built: Built, origin: Path) -> bool:
    """Load a checkpoint after the last update; the Trainer would make one more before it looks."""
    trainer = built.trainer
    state = TrainerState.load_from_json(str(origin / "trainer_state.json"))
    last = trainer.args.max_steps
    if last <= 0:
        same = trainer.args.num_train_epochs <= state.num_train_epochs
        last = state.max_steps if same else state.global_step + 1
    checkpoints, patience = trainer.checkpoints, built.run.evaluation.early_stopping_patience
    stopped = patience is not None and validations_without_a_better(state) >= patience
    if state.global_step < last and (checkpoints.scores_differ or not stopped):
        return False
    trainer.state = state
    checkpoints.restore_best(trainer)
    if trainer.args.eval_on_start:
        trainer._load_from_checkpoint(str(origin))
        trainer._evaluate(None, None, skip_scheduler=True)
    best = state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    logger.warning("nothing is left to do: %s is at update %d", origin, state.global_step)
    trainer._load_from_checkpoint(best or str(origin))
    same_run = origin.parent.resolve() == checkpoints.run_dir.resolve()
    if same_run and is_main_process():  # it may have died before older ones were removed
        checkpoints.prune(origin, state.best_model_checkpoint)
    return True


def _result(built: Built, stop: StopOnSignal, seconds: float) -> TrainResult:
    trainer, run_dir = built.trainer, Path(built.run.output_dir)
    state = trainer.state
    best = state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    step = step_of(Path(best)) if best else state.global_step
    stopped = state.global_step < state.max_steps or validation_is_missing(trainer.args, state)
    interrupted = stop.agreed if stopped else None
    return TrainResult(
        run_dir=run_dir,
        adapter_dir=None,
        steps=state.global_step,
        weights_step=step,
        metrics=final_metrics(read_metrics(run_dir / METRICS), step),
        seconds=seconds,
        trainable_parameters=built.model.get_nb_trainable_parameters()[0],
        interrupted=interrupted,
        stopped_early=interrupted is None and state.global_step < state.max_steps,
        best_checkpoint=best,
        built=built,
    )


def describe_run(built: Built, fingerprint: dict[str, Any]) -> None:
    """Write run.yaml and manifest.json before the first update.

    Args:
        built: the parts of the run.
        fingerprint: of its data.

    Raises:
        StorageError: the disk refused.
    """
    checkpoints = built.trainer.checkpoints
    run_dir, origin = checkpoints.run_dir, checkpoints.origin
    trainable, total = built.model.get_nb_trainable_parameters()
    adapter = {
        "trainable_parameters": trainable,
        "all_parameters": total,
        "adapted_modules": len(built.model.base_model.targeted_module_names),
    }
    resumes = earlier_resumes(run_dir / MANIFEST) if origin else []
    if origin:
        resumes.append({"from": origin.name, "changes": list(checkpoints.changes)})
    atomic_write_text(run_dir / "run.yaml", resolved_yaml(built.run))
    atomic_write_text(
        run_dir / MANIFEST, manifest(built.run, fingerprint, adapter, resumes, built.date)
    )


def finish(result: TrainResult) -> TrainResult:
    """Write what a finished run leaves: loss.svg, the adapter and its card.

    Every process calls it, because all hold parts of a sharded adapter; the first one writes.

    Args:
        result: of a run that was not interrupted.

    Returns:
        The result, with adapter_dir in the process that writes.

    Raises:
        StorageError: the disk refused.
    """
    run, base, trainer = result.built.run, result.built.base, result.built.trainer
    state = None
    if trainer.is_fsdp_enabled:
        state = adapter_state(trainer.model, trainer.args.device)
    if not is_main_process():
        return result
    rows = read_metrics(result.run_dir / METRICS)
    resumed = [step_of(Path(entry["from"])) for entry in earlier_resumes(result.run_dir / MANIFEST)]
    drawn = loss_svg(rows, result.run_dir.name, resumed=resumed, kept=result.weights_step)
    atomic_write_text(result.run_dir / "loss.svg", drawn)
    rows_of = result.built.examples.values()
    ends = {row.end for tasks in rows_of for task in tasks.values() for row in task} - {""}
    endings = endings_of(base.model, base.tokenizer, sorted(ends))
    result.adapter_dir = save_adapter(result.built.model, result.run_dir, state, endings)
    figures = {
        "weights of update": f"{result.weights_step:,} of {result.steps:,}",
        "trainable parameters": f"{result.trainable_parameters:,}, gates included",
        **readable(result.metrics),
        "time": duration(result.seconds),
    }
    atomic_write_text(result.adapter_dir / "README.md", model_card(run, base.note, figures))
    if any(task.format == "messages" for task in run.data.tasks.values()):
        # `rotmole generate` knows by this file that an adapter alone was trained on chats
        text = str(base.tokenizer.get_chat_template())
        atomic_write_text(result.adapter_dir / CHAT_TEMPLATE_FILE, text)
    (result.run_dir / UNFINISHED).unlink(missing_ok=True)
    with storage_errors(result.run_dir):
        drop_previous(result.run_dir)
    return result
