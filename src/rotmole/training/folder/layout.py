"""The run folder: what lies where, whose folder it is, and the adapter in it."""

from __future__ import annotations

import logging
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotmole.errors import InputError
from rotmole.files import storage_errors, sync
from rotmole.training.checkpoints.find import checkpoints
from rotmole.training.checkpoints.seal import is_half_written, is_sealed

if TYPE_CHECKING:
    from transformers import GenerationConfig

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
METRICS = "metrics.jsonl"
ADAPTER = "adapter"
UNFINISHED = ".unfinished"
"""Lies in a run folder from the start, or a resume, until the result is written."""
SCORES = ("evaluation.json", "eval.json", "predictions.jsonl")
_PRODUCTS = (MANIFEST, METRICS, "run.yaml", "loss.svg", "failure.json")


def check_free(run_dir: Path) -> None:
    """Refuse to start anew in a folder with an unfinished run or with files of others.

    Args:
        run_dir: the run folder; nothing in it is touched.

    Raises:
        InputError: saying what lies there and what to do.
    """
    folders = [path for path in checkpoints(run_dir) if not is_half_written(path)]
    if folders and not is_finished(run_dir):
        complete = [path.name for path in folders if is_sealed(path)]
        advice = f"add --resume auto to go on from {complete[-1]}, " if complete else ""
        raise InputError(
            f"output_dir {str(run_dir)!r} holds an unfinished run with "
            f"{f'checkpoint {complete[-1]}' if complete else 'no complete checkpoint'}; {advice}"
            "choose another output_dir, or delete the folder to start anew."
        )
    if folders and not (run_dir / MANIFEST).is_file():
        raise InputError(
            f"output_dir {str(run_dir)!r} holds checkpoints that are not rotmole's; choose another."
        )
    if not (run_dir / MANIFEST).is_file():
        foreign = [name for name in (ADAPTER, *_PRODUCTS) if (run_dir / name).exists()]
        if foreign:
            raise InputError(
                f"output_dir {str(run_dir)!r} holds {', '.join(foreign)}, which a run would "
                "replace and which no run of rotmole wrote; choose another output_dir."
            )


def is_finished(run_dir: Path) -> bool:
    """Tell whether the adapter in a run folder is the result of all that was trained there."""
    return (run_dir / ADAPTER).is_dir() and not (run_dir / UNFINISHED).exists()


def clear(run_dir: Path, *, resuming: bool) -> None:
    """Remove what an earlier run left: all of it if `check_free` let a new one start.

    Args:
        run_dir: the run folder.
        resuming: the run goes on, so only failure.json is removed, and what a crash left.

    Raises:
        StorageError: the folder cannot be written.
    """
    with storage_errors(run_dir):
        for remains in (*run_dir.glob(f".{ADAPTER}-*"), *run_dir.glob(".*.tmp")):
            shutil.rmtree(remains) if remains.is_dir() else remains.unlink()
        if resuming:
            (run_dir / "failure.json").unlink(missing_ok=True)
            return
        if (run_dir / MANIFEST).is_file():
            logger.warning("the finished run in %s is replaced", run_dir)
            for name in SCORES:  # the first one is of 0.1.0
                (run_dir / name).unlink(missing_ok=True)
        for path in [*checkpoints(run_dir), run_dir / ADAPTER]:
            shutil.rmtree(path, ignore_errors=True)
        for name in _PRODUCTS:
            (run_dir / name).unlink(missing_ok=True)


def save_adapter(
    model: Any,
    run_dir: Path,
    state: dict[str, Any] | None = None,
    endings: GenerationConfig | None = None,
) -> Path:
    """Save the adapter into run_dir/adapter, all or nothing.

    Args:
        model: the PeftModel.
        run_dir: the run folder.
        state: the adapter's whole tensors, where the model itself holds only a shard of them.
        endings: from rotmole.models.endings, saved beside the adapter as generation_config.json.

    Returns:
        The adapter's folder.

    Raises:
        StorageError: the disk refused; an older adapter is untouched.
    """
    target = run_dir / ADAPTER
    mark = secrets.token_hex(4)
    fresh, old = run_dir / f".{ADAPTER}-{mark}", run_dir / f".{ADAPTER}-old-{mark}"
    with storage_errors(target):
        try:
            model.save_pretrained(fresh, state_dict=state)
            if endings is not None:
                endings.save_pretrained(fresh)
            for file in (*fresh.iterdir(), fresh):
                sync(file)
            if target.exists():
                target.rename(old)
            try:
                fresh.rename(target)
            except BaseException:
                if old.exists():
                    old.rename(target)
                raise
            sync(run_dir)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        shutil.rmtree(old, ignore_errors=True)
    return target
