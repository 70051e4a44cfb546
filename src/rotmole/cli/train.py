"""rotmole train: one run file in, one run folder out."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rotmole.cli.screen import note
from rotmole.config.load import load_run
from rotmole.data import data_problems
from rotmole.errors import ConfigError
from rotmole.models.preview import adapter_problems


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
    from rotmole.processes import is_main_process
    from rotmole.training.run import train as work

    speaks = is_main_process()
    result = work(
        run,
        resume=resume,
        weights_only=weights_only,
        allow_change=allow_change,
        trust_remote_code=trust_remote_code,
        say=note if speaks else None,
        prepare=_header,
    )
    if result.interrupted is not None and speaks:
        saved = f"after update {result.steps}; a checkpoint is saved."
        print(f"stopped {saved if result.steps else 'before the first update.'}")
        words = ["rotmole", "train", str(path), *overrides, "--resume", "auto"]
        print(f"continue with: {shlex.join(words)}")
    elif speaks:
        _summary(result)
    return 0 if result.interrupted is None else 128 + result.interrupted


def _header(built: Any) -> None:
    """Say what will be trained on what, before the first update."""
    modules = Counter(n.rpartition(".")[2] for n in built.model.base_model.targeted_module_names)
    trainable, total = built.model.get_nb_trainable_parameters()
    print(f"model       {built.base.name}" + (f" ({built.base.note})" if built.base.note else ""))
    print("modules     " + ", ".join(f"{name} x {count}" for name, count in modules.items()))
    print(f"parameters  {trainable:,} trainable of {total:,}, gates included")
    for split, tasks in built.examples.items():
        if tasks:
            counts = ", ".join(f"{task} {len(rows):,}" for task, rows in tasks.items())
            print(f"{split:<11} {counts} rows")
    args = built.trainer.args
    each = args.per_device_train_batch_size * args.world_size
    batches = math.ceil(len(built.trainer.train_dataset) / each)
    updates = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(updates * args.num_train_epochs)
    rows = each * args.gradient_accumulation_steps
    print(f"updates     {steps:,} of {rows} rows", flush=True)


def _summary(result: Any) -> None:
    print(f"done        {result.steps:,} updates in {result.seconds:.0f} s")
    for name, value in result.metrics.items():
        shown = f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
        print(f"{name.replace('_', ' '):<34} {shown}")
    if result.best_checkpoint:
        print(f"the result is the best checkpoint, {Path(result.best_checkpoint).name}")
    print(f"adapter     {result.adapter_dir}")
    print(f"score it    rotmole eval {result.run_dir}", flush=True)
