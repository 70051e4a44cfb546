"""rotmole train: one run file in, one run folder out."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotmole.cli.screen import fact, note, progress
from rotmole.config.load import load_run
from rotmole.config.training import count_updates
from rotmole.data import PackedRows, data_problems
from rotmole.errors import ConfigError
from rotmole.models.preview import adapter_problems
from rotmole.training.figures import readable
from rotmole.units import duration

if TYPE_CHECKING:
    from rotmole.config.schema import RunFile
    from rotmole.training.run import TrainResult


def train(
    path: Path,
    overrides: Sequence[str] = (),
    resume: str | None = None,
    *,
    weights_only: bool = False,
    allow_change: bool = False,
    trust_remote_code: bool = False,
) -> int:
    """Train the run of a file and say what came out.

    Args:
        path: the run file.
        overrides: key=value settings laid over it.
        resume: None starts anew, "auto" goes on from the newest checkpoint, else its path.
        weights_only: with resume, take the weights and a fresh optimizer.
        allow_change: with resume, go on with other settings, data, versions or processes.
        trust_remote_code: let transformers run code that came with the model.

    Returns:
        0, or 128 + the signal that stopped the run, after saving.

    Raises:
        RotMoleError: with the exit code of its class.
    """
    if resume is None and (weights_only or allow_change):
        name = "--weights-only" if weights_only else "--allow-change"
        raise ConfigError(f"{name} says how to go on from a checkpoint; add --resume auto")
    fits = partial(adapter_problems, trust_remote_code=trust_remote_code)
    run = load_run(path, overrides, data_problems=data_problems, model_problems=fits)
    return train_run(
        run,
        [str(path), *overrides],
        resume,
        weights_only=weights_only,
        allow_change=allow_change,
        trust_remote_code=trust_remote_code,
    )


def train_run(run: RunFile, words: Sequence[str], resume: str | None = None, **options: Any) -> int:
    """Train a checked run and say what came out.

    Args:
        words: what `rotmole train` needs to go on with the run after an interruption.
        resume, options: as of `rotmole.training.run.train`.

    Returns:
        0, or 128 + the signal that stopped the run, after saving.
    """
    from rotmole.processes import is_main_process
    from rotmole.training.run import train as work

    speaks = is_main_process()
    result = work(run, resume=resume, say=note if speaks else None, prepare=_header, **options)
    if result.interrupted is not None and speaks:
        saved = f"after update {result.steps}; a checkpoint is saved."
        print(f"stopped {saved if result.steps else 'before the first update.'}")
        print(f"continue with: {shlex.join(['rotmole', 'train', *words, '--resume', 'auto'])}")
    elif speaks:
        _summary(result)
        _report(result)
    return 0 if result.interrupted is None else 128 + result.interrupted


def _header(built: Any) -> None:
    """Say what will be trained on what, before the first update."""
    modules = Counter(n.rpartition(".")[2] for n in built.model.base_model.targeted_module_names)
    trainable, total = built.model.get_nb_trainable_parameters()
    name = built.base.name
    fact("model", f"{name} ({built.base.note})" if built.base.note else name)
    if built.run.experts_from.paths:
        what = "gates alone" if built.run.experts_from.trainable == "gates" else "all"
        names = ", ".join(built.run.adapter_config.expert_names)
        fact("experts", f"{names}; trained: {what}")
    fact("modules", ", ".join(f"{name} x {count}" for name, count in modules.items()))
    share = 100 * trainable / total
    fact("parameters", f"{trainable:,} trainable of {total:,} ({share:.2g} %), gates included")
    scored = {task: len(rows) for task, rows in built.validation.items()}
    for split, tasks in built.examples.items():
        if not tasks:
            continue
        text = ", ".join(f"{task} {len(rows):,}" for task, rows in tasks.items()) + " rows"
        if split == "validation" and sum(scored.values()) < sum(map(len, tasks.values())):
            counts = ", ".join(f"{task} {count:,}" for task, count in scored.items())
            text += f"; scored while training (evaluation.validation_limit): {counts}"
        fact(split, text)
    args = built.trainer.args
    each = args.per_device_train_batch_size * args.world_size
    steps = count_updates(
        len(built.trainer.train_dataset),
        batch=each,
        accumulation=args.gradient_accumulation_steps,
        epochs=args.num_train_epochs,
        max_steps=args.max_steps,
        drop_last=args.dataloader_drop_last,
    )
    count = f"{each * args.gradient_accumulation_steps:,}"
    trained = built.trainer.train_dataset
    if isinstance(trained, PackedRows):
        mean = len(trained.rows) / len(trained)
        fact("updates", f"{steps:,} of {count} packs, each of about {mean:.1f} rows")
    else:
        fact("updates", f"{steps:,} of {count} rows")


def _summary(result: TrainResult) -> None:
    end = f"{result.steps:,} updates in {duration(result.seconds)}"
    if result.stopped_early:
        end += ", stopped early: validation found nothing better (early_stopping_patience)"
    fact("done", end)
    for name, text in readable(result.metrics).items():
        fact(name, text)
    if result.best_checkpoint:
        fact("weights", f"of update {result.weights_step:,}, the best checkpoint")
    else:
        fact("weights", f"of update {result.weights_step:,}, the last")
    fact("adapter", str(result.adapter_dir))
    fact("score it", f"rotmole eval {shlex.quote(str(result.run_dir))}")


def _report(result: TrainResult) -> None:
    """Leave report.html beside the adapter; the run is complete, whatever becomes of it."""
    from rotmole.inspection.of_run import report_of_run
    from rotmole.inspection.pages.report import PAGE, headline

    again = f"rotmole inspect {shlex.quote(str(result.run_dir))}"
    try:
        with progress() as show:
            inspection = report_of_run(result, progress=show)
    except KeyboardInterrupt:
        note(f"the report is left out; {again} makes it.")
    except Exception as error:
        note(f"there is no report, because {error} ({type(error).__name__}); {again} tries again.")
    else:
        if inspection is not None:
            fact("report", f"{result.run_dir / PAGE}")
            fact("verdict", headline(inspection))
        elif result.built.trainer.is_fsdp_enabled:
            note(f"the weights are spread over processes; {again} makes a report.")
