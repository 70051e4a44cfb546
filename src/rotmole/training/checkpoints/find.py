"""The checkpoints of a run folder: listed, found again for a resume, pruned."""

from __future__ import annotations

import logging
from pathlib import Path

from rotmole.errors import InputError
from rotmole.training.checkpoints.seal import (
    faults,
    is_half_written,
    is_sealed,
    remove,
    step_of,
)

logger = logging.getLogger(__name__)


def checkpoints(run_dir: Path) -> list[Path]:
    """List a run's checkpoints, oldest first.

    Args:
        run_dir: the run folder; it need not exist.

    Returns:
        Folders checkpoint-N, sorted by N, complete or not.
    """
    folders = [path for path in run_dir.glob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(folders, key=step_of)


def find_resume(run_dir: Path, resume: str | None, *, weights_only: bool = False) -> Path | None:
    """Find the checkpoint to go on from.

    Args:
        run_dir: the run folder.
        resume: None starts anew, "auto" takes the newest complete checkpoint of the run folder
            (none there: starts anew), anything else is a checkpoint's path.
        weights_only: the state of the optimisation may be missing or damaged.

    Returns:
        The checkpoint's folder, or None to start anew.

    Raises:
        InputError: the path is no complete checkpoint, or newer ones are in its way; or all that
            there are have been damaged since, which is no reason to start over them.
    """
    if resume is None:
        return None
    if resume != "auto":
        return _named(run_dir, Path(resume).expanduser(), weights_only)
    damaged = []
    for path in reversed(checkpoints(run_dir)):
        problems = faults(path, weights_only=weights_only)
        if not problems:
            return path
        message = f"{'; '.join(problems)}{_advice(path, weights_only)}"
        logger.warning("skipped %s: %s", path, message)
        if not is_half_written(path):
            damaged.append(f"{path.name}: {message}")
    if damaged:
        raise InputError(
            f"output_dir {str(run_dir)!r} has no checkpoint to go on from ({'. '.join(damaged)}); "
            "choose another output_dir, or delete the folder to start anew."
        )
    return None


def _named(run_dir: Path, path: Path, weights_only: bool) -> Path:
    if not path.is_dir():
        raise InputError(
            f"cannot resume from {str(path)!r}: there is no such folder. Use --resume auto to take "
            "the newest complete checkpoint of the run folder."
        )
    problems = faults(path, weights_only=weights_only)
    if problems:
        raise InputError(
            f"cannot resume from {str(path)!r}: {'; '.join(problems)}. Use --resume auto to take "
            f"the newest complete checkpoint of the run folder{_advice(path, weights_only)}."
        )
    same_run = path.parent.resolve() == run_dir.resolve()
    later = [
        other.name
        for other in checkpoints(run_dir)
        if is_sealed(other) and not (same_run and step_of(other) <= step_of(path))
    ]
    if later:
        raise InputError(
            f"cannot resume from {str(path)!r} into {str(run_dir)!r}: {', '.join(later)} there "
            "would mix with what is trained now; move them away, or choose another output_dir."
        )
    return path


def _advice(path: Path, weights_only: bool) -> str:
    if weights_only or faults(path, weights_only=True):
        return ""
    return ", or add --weights-only to go on from its weights with a fresh optimizer"


def prune(run_dir: Path, keep: int | None, newest: Path, best: str | None) -> None:
    """Remove older checkpoints; call it when the newest is complete and on the disk.

    Args:
        run_dir: the run folder.
        keep: how many stay, None for all; the newest and the best always do.
        newest: the checkpoint just sealed.
        best: the one with the lowest validation loss, or None.
    """
    if keep is None:
        return
    protected = {newest.name, Path(best).name if best else newest.name}
    others = [path for path in checkpoints(run_dir) if path.name not in protected]
    # higher-numbered checkpoints belong to an abandoned branch: the run went back to an older one
    complete = [path for path in others if is_sealed(path) and step_of(path) < step_of(newest)]
    remaining = complete[max(len(complete) - max(keep - len(protected), 0), 0) :]
    for path in others:
        if path not in remaining:
            remove(path)
