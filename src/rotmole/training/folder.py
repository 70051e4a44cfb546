"""The run folder: what lies where, which checkpoint to go on from, and whose folder it is."""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import warnings
from pathlib import Path
from typing import Any

from rotmole.errors import InputError
from rotmole.models.files import make_folder, storage_errors, sync
from rotmole.tuner.config import RotMoleConfig

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
METRICS = "metrics.jsonl"
ADAPTER = "adapter"
_PRODUCTS = (MANIFEST, METRICS, "run.yaml", "loss.svg", "failure.json", "evaluation.json")
_SAME = (
    "r", "lora_alpha", "use_rslora", "num_experts", "top_k", "router", "selection",
    "norm_topk_prob", "rotation", "rotation_input", "rotation_metric", "rotation_planes",
    "radar_rank", "radar_normalize", "rank_pattern", "alpha_pattern",
)  # fmt: skip
_CHECKPOINT_FILES = (
    "trainer_state.json",
    "adapter_model.safetensors",
    "adapter_config.json",
    "optimizer.pt",
    "scheduler.pt",
)


def checkpoints(run_dir: Path) -> list[Path]:
    """List a run's checkpoints, oldest first.

    Args:
        run_dir: the run folder; it need not exist.

    Returns:
        Folders checkpoint-N, sorted by N, complete or not.

    Source: our choice.
    """
    found = [path for path in run_dir.glob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def missing_files(checkpoint: Path) -> list[str]:
    """Name the files that a checkpoint lacks to be resumed from, empty ones included.

    Args:
        checkpoint: its folder.

    Returns:
        File names, none where training can go on from it.

    Source: our choice.
    """
    files = {name: checkpoint / name for name in _CHECKPOINT_FILES}
    return [n for n, path in files.items() if not path.is_file() or path.stat().st_size == 0]


def find_resume(run_dir: Path, resume: str | None) -> Path | None:
    """Find the checkpoint to go on from.

    Args:
        run_dir: the run folder.
        resume: None starts anew, "auto" takes the newest complete checkpoint of the run folder
            (none there: starts anew), anything else is a checkpoint's path.

    Returns:
        The checkpoint's folder, or None to start anew.

    Raises:
        InputError: the path is no complete checkpoint.

    Source: our choice.
    """
    if resume is None:
        return None
    if resume != "auto":
        path = Path(resume).expanduser()
        missing = missing_files(path)
        if missing:
            what = "there is no such folder" if not path.is_dir() else "it is not complete"
            raise InputError(
                f"cannot resume from {str(path)!r}: {what} (missing: {', '.join(missing)}). Use "
                "--resume auto to take the newest complete checkpoint of the run folder."
            )
        return path
    for path in reversed(checkpoints(run_dir)):
        missing = missing_files(path)
        if not missing:
            return path
        logger.warning("skipped checkpoint %s: it lacks %s", path, ", ".join(missing))
    return None


def check_same_adapter(checkpoint: Path, adapter: dict[str, Any]) -> None:
    """Refuse to go on from a checkpoint with another adapter, before anything is written.

    Args:
        checkpoint: a complete checkpoint.
        adapter: the run file's adapter section.

    Raises:
        InputError: naming every setting of the mathematics that differs, with both values.

    Source: our choice.
    """
    saved = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they were shown when the run file was read
        asked = RotMoleConfig(**adapter).to_dict()
    differ = [
        f"{name} is {asked[name]!r}, the checkpoint has {saved[name]!r}"
        for name in _SAME
        if name in saved and asked[name] != saved[name]
    ]
    if differ:
        raise InputError(
            f"cannot go on from {str(checkpoint)!r} with another adapter: {'; '.join(differ)}. "
            "Use the settings of the checkpoint, or another output_dir."
        )


def claim(run_dir: Path, *, resuming: bool) -> None:
    """Make the run folder ready: a finished earlier run gives way, an unfinished one does not.

    Args:
        run_dir: the run folder, created if missing.
        resuming: the run goes on from a checkpoint, so everything stays.

    Raises:
        InputError: the folder holds an unfinished run with checkpoints, or files of others.
        StorageError: the folder cannot be written.

    Source: our choice.
    """
    make_folder(run_dir)
    with storage_errors(run_dir):
        probe = run_dir / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    if resuming:
        (run_dir / "failure.json").unlink(missing_ok=True)
        return
    kept = checkpoints(run_dir)
    if kept and not (run_dir / ADAPTER).is_dir():
        whole = [path.name for path in kept if not missing_files(path)]
        advice = f"add --resume auto to go on from {whole[-1]}, " if whole else ""
        raise InputError(
            f"output_dir {str(run_dir)!r} holds an unfinished run with "
            f"{f'checkpoint {whole[-1]}' if whole else 'no complete checkpoint'}; {advice}"
            "choose another output_dir, or delete the folder to start anew."
        )
    if kept and not (run_dir / MANIFEST).is_file():
        raise InputError(
            f"output_dir {str(run_dir)!r} holds checkpoints that are not rotmole's; choose another."
        )
    if not (run_dir / MANIFEST).is_file():
        foreign = [name for name in (ADAPTER, *_PRODUCTS) if (run_dir / name).exists()]
        if foreign:
            raise InputError(
                f"output_dir {str(run_dir)!r} holds {', '.join(foreign)}, which a run replaces "
                "and which no run of rotmole wrote; choose another output_dir."
            )
        return
    logger.warning("the finished run in %s is replaced", run_dir)
    with storage_errors(run_dir):
        for path in [*kept, run_dir / ADAPTER]:
            shutil.rmtree(path, ignore_errors=True)
        for name in _PRODUCTS:
            (run_dir / name).unlink(missing_ok=True)


def save_adapter(model: Any, run_dir: Path, state: dict[str, Any] | None = None) -> Path:
    """Save the adapter into run_dir/adapter, all or nothing.

    Args:
        model: the PeftModel.
        run_dir: the run folder.
        state: the adapter's whole tensors, where the model itself holds only a shard of them.

    Returns:
        The adapter's folder.

    Raises:
        StorageError: the disk refused; an older adapter is untouched.

    Source: our choice.
    """
    target = run_dir / ADAPTER
    mark = secrets.token_hex(4)
    fresh, old = run_dir / f".{ADAPTER}-{mark}", run_dir / f".{ADAPTER}-old-{mark}"
    with storage_errors(target):
        try:
            model.save_pretrained(fresh, state_dict=state)
            for file in fresh.iterdir():
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
