"""Train one run from its run file to its run folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from rotmole.config.load import resolved_yaml
from rotmole.config.schema import RunFile
from rotmole.data import data_fingerprint
from rotmole.errors import NonFiniteError
from rotmole.models.files import atomic_write_text
from rotmole.training.build import Built, build
from rotmole.training.callbacks import ProgressCallback, StopOnSignal, read_metrics
from rotmole.training.folder import (
    MANIFEST,
    METRICS,
    check_same_adapter,
    claim,
    find_resume,
    save_adapter,
)
from rotmole.training.manifest import manifest, model_card
from rotmole.training.plots import loss_svg
from rotmole.training.ranks import is_main_process
from rotmole.training.sharding import adapter_state

logger = logging.getLogger(__name__)

_FIGURES = (
    "train_loss", "train_tokens_per_second", "num_input_tokens_seen", "peak_memory_bytes",
)  # fmt: skip


@dataclass
class TrainResult:
    """What a training run gave.

    Attributes:
        run_dir: the run folder.
        adapter_dir: the saved adapter, None where the run was interrupted and in all processes but
            the first.
        steps: updates made, those before a resume included.
        metrics: the run's figures: training and validation losses, tokens/s, peak memory.
        seconds: wall time of training alone, since the resume if there was one.
        trainable_parameters: gates included.
        interrupted: the signal that stopped the run, None where it ended by itself.
        best_checkpoint: the checkpoint whose weights are the result, None for the last ones.
        built: model, data and trainer, to go on with.
    """

    run_dir: Path
    adapter_dir: Path | None
    steps: int
    metrics: dict[str, Any]
    seconds: float
    trainable_parameters: int
    interrupted: int | None
    best_checkpoint: str | None
    built: Built = field(repr=False)


def train(
    run: RunFile,
    *,
    resume: str | None = None,
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

    Source: our choice.
    """
    run_dir = Path(run.output_dir)
    checkpoint = find_resume(run_dir, resume)
    if checkpoint is not None:
        check_same_adapter(checkpoint, run.adapter)
        (say or logger.info)(f"going on from {checkpoint}")
    if is_main_process():
        claim(run_dir, resuming=checkpoint is not None)
    stop = StopOnSignal(say)
    bars = [ProgressCallback()] if progress else []
    built = build(run, callbacks=[stop, *bars, *callbacks], say=say)
    if is_main_process():
        write_papers(built)
        if prepare is not None:
            prepare(built)
    started = time.perf_counter()
    try:
        _fit(built, stop, checkpoint)
    finally:
        for bar in bars:
            bar.close()
    result = _result(built, stop, time.perf_counter() - started)
    return finish(result) if result.interrupted is None else result


def _fit(built: Built, stop: StopOnSignal, checkpoint: Path | None) -> None:
    if checkpoint is not None and _nothing_left(built, checkpoint):
        return
    try:
        with stop.listening():
            built.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except NonFiniteError as error:
        if is_main_process():
            built.trainer.write_failure(error)
        raise


def _nothing_left(built: Built, checkpoint: Path) -> bool:
    """Load a checkpoint after the last update; the Trainer would make one more before it looks."""
    trainer, state = built.trainer, TrainerState.load_from_json(checkpoint / "trainer_state.json")
    last = trainer.args.max_steps
    if last <= 0:
        same = trainer.args.num_train_epochs <= state.num_train_epochs
        last = state.max_steps if same else state.global_step + 1
    if state.global_step < last:
        return False
    best = state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    logger.warning("nothing is left to do: %s is at update %d", checkpoint, state.global_step)
    trainer._load_from_checkpoint(best or str(checkpoint))
    trainer.state = state
    return True


def _result(built: Built, stop: StopOnSignal, seconds: float) -> TrainResult:
    state, best = built.trainer.state, built.trainer.args.load_best_model_at_end
    run_dir = Path(built.run.output_dir)
    return TrainResult(
        run_dir=run_dir,
        adapter_dir=None,
        steps=state.global_step,
        metrics=final_metrics(read_metrics(run_dir / METRICS), best=best),
        seconds=seconds,
        trainable_parameters=built.model.get_nb_trainable_parameters()[0],
        interrupted=stop.signum if state.global_step < state.max_steps else None,
        best_checkpoint=state.best_model_checkpoint if best else None,
        built=built,
    )


def write_papers(built: Built) -> None:
    """Write run.yaml and manifest.json before the first update.

    Args:
        built: the parts of the run.

    Raises:
        StorageError: the disk refused.

    Source: our choice.
    """
    run_dir = Path(built.run.output_dir)
    trainable, total = built.model.get_nb_trainable_parameters()
    adapter = {
        "trainable_parameters": trainable,
        "all_parameters": total,
        "adapted_modules": len(built.model.base_model.targeted_module_names),
    }
    fingerprint = data_fingerprint(built.run.data, built.examples)
    atomic_write_text(run_dir / "run.yaml", resolved_yaml(built.run))
    atomic_write_text(run_dir / MANIFEST, manifest(built.run, fingerprint, adapter))


def finish(result: TrainResult) -> TrainResult:
    """Write what a finished run leaves: loss.svg, the adapter and its card.

    Every process calls it, because all hold parts of a sharded adapter; the first one writes.

    Args:
        result: of a run that was not interrupted.

    Returns:
        The result, with adapter_dir in the process that writes.

    Raises:
        StorageError: the disk refused.

    Source: our choice.
    """
    run, base, trainer = result.built.run, result.built.base, result.built.trainer
    state = adapter_state(trainer.model, trainer.args.device) if trainer.is_fsdp_enabled else None
    if not is_main_process():
        return result
    rows = read_metrics(result.run_dir / METRICS)
    atomic_write_text(result.run_dir / "loss.svg", loss_svg(rows, result.run_dir.name))
    result.adapter_dir = save_adapter(result.built.model, result.run_dir, state)
    figures = {
        "updates": result.steps,
        "trainable parameters (gates included)": result.trainable_parameters,
        **{name.replace("_", " "): value for name, value in result.metrics.items()},
        "training seconds": result.seconds,
    }
    atomic_write_text(result.adapter_dir / "README.md", model_card(run, base.note, figures))
    return result


def final_metrics(rows: Sequence[dict[str, Any]], *, best: bool) -> dict[str, Any]:
    """Pick a run's figures from its log: those of the weights that are its result.

    Args:
        rows: the lines of metrics.jsonl.
        best: the result is the checkpoint with the lowest validation loss, not the last one.

    Returns:
        train_loss, train_tokens_per_second, peak_memory_bytes, num_input_tokens_seen, and, where
        there was validation, every eval loss of the result and the step it was made at.

    Source: our choice.
    """
    found: dict[str, Any] = {}
    for row in rows:
        if "train_loss" in row:
            found |= {name: row[name] for name in _FIGURES if name in row}
    validated = [row for row in rows if row.get("eval_loss") is not None]
    if validated:
        row = min(validated, key=lambda row: row["eval_loss"]) if best else validated[-1]
        found |= {name: value for name, value in row.items() if name.endswith("_loss")}
        found["eval_step"] = row["step"]
    return found
