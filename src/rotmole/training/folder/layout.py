"""The run folder: what lies where, whose folder it is, and the adapter in it."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotmole.errors import InputError
from rotmole.files import atomic_write_text, share, storage_errors, sync
from rotmole.models.adapter import name_base
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
PREVIOUS = "previous"
"""Folder in a run folder: the finished run that the one at work will replace."""
SCORES = ("evaluation.json", "eval.json", "predictions.jsonl", "inspect.json", "report.html")
_CLEARING = "clearing"
"""In UNFINISHED while an earlier run's files go: what is left of them is no run."""
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
    # with the mark, `clear` was here before: the process died before it wrote the manifest
    if not (run_dir / MANIFEST).is_file() and not (run_dir / UNFINISHED).exists():
        foreign = [name for name in (ADAPTER, *_PRODUCTS) if (run_dir / name).exists()]
        if foreign:
            raise InputError(
                f"output_dir {str(run_dir)!r} holds {', '.join(foreign)}, which a run would "
                "replace and which no run of rotmole wrote; choose another output_dir."
            )
    aside = run_dir / PREVIOUS
    if aside.exists() and not (aside / MANIFEST).is_file():
        raise InputError(
            f"{str(aside)!r} is where a finished run would be kept, and no run of rotmole wrote "
            "it; move it away, or choose another output_dir."
        )


def is_finished(run_dir: Path) -> bool:
    """Tell whether the adapter in a run folder is the result of all that was trained there."""
    return (run_dir / ADAPTER).is_dir() and not (run_dir / UNFINISHED).exists()


def is_being_cleared(run_dir: Path) -> bool:
    """Tell whether a process died while it removed an earlier run; what is left is no run."""
    try:
        return (run_dir / UNFINISHED).read_text(encoding="utf-8") == _CLEARING
    except (OSError, ValueError):
        return False


def clear(run_dir: Path, *, resuming: bool) -> None:
    """Mark the run as unfinished, and remove what an earlier one left if a new one starts.

    A finished run stays whole, in the folder `previous`, until the new one is complete: it is
    there before the first of its files goes.

    Args:
        run_dir: the run folder, which `check_free` let a new run start in, or which goes on.
        resuming: the run goes on, so only failure.json is removed, and what a crash left.

    Raises:
        StorageError: the folder cannot be written.
    """
    with storage_errors(run_dir):
        for remains in (
            *run_dir.glob(f".{ADAPTER}-*"), *run_dir.glob(f".{PREVIOUS}-*"), *run_dir.glob(".*.tmp")
        ):  # fmt: skip
            shutil.rmtree(remains) if remains.is_dir() else remains.unlink()
        if resuming:
            atomic_write_text(run_dir / UNFINISHED, "")
            (run_dir / "failure.json").unlink(missing_ok=True)
            return
        if is_finished(run_dir) and (run_dir / MANIFEST).is_file():
            _set_aside(run_dir)
        atomic_write_text(run_dir / UNFINISHED, _CLEARING)
        scores = SCORES if (run_dir / MANIFEST).is_file() else ()
        for path in [*checkpoints(run_dir), run_dir / ADAPTER]:
            shutil.rmtree(path, ignore_errors=True)
        for name in (*scores, *_PRODUCTS):
            (run_dir / name).unlink(missing_ok=True)
        atomic_write_text(run_dir / UNFINISHED, "")


def _set_aside(run_dir: Path) -> None:
    """Give the finished run a second place, complete by one rename; its files exist once."""
    staging = run_dir / f".{PREVIOUS}-{secrets.token_hex(4)}"
    staging.mkdir()
    for name in (ADAPTER, *(path.name for path in checkpoints(run_dir)), *_PRODUCTS, *SCORES):
        path = run_dir / name
        if path.is_dir():
            shutil.copytree(path, staging / name, copy_function=_link)
        elif path.is_file():
            _link(path, staging / name)
    for folder in (staging, *(path for path in staging.rglob("*") if path.is_dir())):
        sync(folder)
    drop_previous(run_dir)
    staging.rename(run_dir / PREVIOUS)
    sync(run_dir)
    logger.warning(
        "the finished run in %s is kept in %s until this one is complete",
        run_dir, run_dir / PREVIOUS,
    )  # fmt: skip


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
        sync(Path(target))


def drop_previous(run_dir: Path) -> None:
    """Remove the run that was kept in `previous`; the one in the folder itself is complete."""
    old = run_dir / f".{PREVIOUS}-{secrets.token_hex(4)}"
    if (run_dir / PREVIOUS).is_dir():
        (run_dir / PREVIOUS).rename(old)  # half a run must not look like one
        shutil.rmtree(old, ignore_errors=True)


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
            name_base(fresh)
            share(fresh)
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
