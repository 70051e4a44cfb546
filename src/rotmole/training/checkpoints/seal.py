"""Checkpoints that count: COMPLETE.json written last, checked before a resume, pruned after.

A checkpoint is a folder checkpoint-N with everything that training needs to go on after update N.
COMPLETE.json lists its files with size and sha256, and the facts of the run; it is written when
all other files are on the disk, and a folder without it is no checkpoint. Older checkpoints are
removed only after that, so at every moment the newest complete one is whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from rotmole.errors import InputError
from rotmole.files import atomic_write_text, storage_errors, sync

logger = logging.getLogger(__name__)

COMPLETE = "COMPLETE.json"
FORMAT = 1
_SAVING = ".saving"
"""Lies in a checkpoint while it is written, so that a half-written one is known for ours."""
_WEIGHTS = {
    "weights": r"adapter_model\.safetensors|pytorch_model_fsdp.*",
    "adapter configuration": r"adapter_config\.json",
    "step and log": r"trainer_state\.json",
}
_STATE = {
    "optimizer state": r"optimizer.*|global_step.*",
    "learning-rate schedule": r"scheduler\.pt",
    "random-number state": r"rng_state.*\.pth",
}
"""What a checkpoint needs, and the names (of files or folders) that hold it."""

UNSHARDED = "one process or DDP"
STORAGE = {
    "DeepSpeed": r"global_step\d+",
    "FSDP with whole states": r"pytorch_model_fsdp\.bin|optimizer\.bin",
    "FSDP with shards": r"pytorch_model_fsdp_.*|optimizer_\d+.*",
}
"""Engine -> the names that only its checkpoints hold."""

_DISPENSABLE = re.compile(r"(optimizer|global_step|scheduler|rng_state|scaler|sums).*")
"""What --weights-only does without."""

_LOADED = (".safetensors", ".bin", ".pt", ".pth", ".distcp")
"""Ends of files that a loader might pick up; none may be there that was not saved."""


def checkpoints(run_dir: Path) -> list[Path]:
    """List a run's checkpoints, oldest first.

    Args:
        run_dir: the run folder; it need not exist.

    Returns:
        Folders checkpoint-N, sorted by N, complete or not.

    Source: our choice.
    """
    found = [path for path in run_dir.glob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return N of a folder checkpoint-N."""
    return int(checkpoint.name[11:])


def is_sealed(checkpoint: Path) -> bool:
    """Tell whether a checkpoint was finished; `faults` tells whether it is still whole."""
    return (checkpoint / COMPLETE).is_file()


def is_half_written(checkpoint: Path) -> bool:
    """Tell whether a checkpoint is no more than what a process left when it died saving it."""
    marked = (checkpoint / _SAVING).exists() or not any(checkpoint.iterdir())
    return marked and not is_sealed(checkpoint)


def begin(checkpoint: Path) -> None:
    """Make room for a checkpoint: what an earlier attempt left of it goes, a mark of ours comes.

    Args:
        checkpoint: its folder, which `seal` will finish.

    Raises:
        StorageError: the disk refused.

    Source: our choice.
    """
    remove(checkpoint)
    with storage_errors(checkpoint):
        checkpoint.mkdir(parents=True)
        (checkpoint / _SAVING).touch()


def seal(checkpoint: Path, facts: Mapping[str, Any]) -> None:
    """Put a checkpoint's files on the disk, then write COMPLETE.json.

    Args:
        checkpoint: its folder, all files written.
        facts: of the run, to compare a resume with; anything that JSON can hold.

    Raises:
        StorageError: the disk refused; the checkpoint does not count.

    Source: our choice.
    """
    with storage_errors(checkpoint):
        files = {}
        for path in _files(checkpoint):
            files[path.relative_to(checkpoint).as_posix()] = {
                "size": path.stat().st_size,
                "sha256": _sha256(path),
            }
            sync(path)
        for folder in [path for path in checkpoint.rglob("*") if path.is_dir()]:
            sync(folder)
        sync(checkpoint)
        sync(checkpoint.parent)
        content = {"format": FORMAT, "step": step_of(checkpoint), "files": files, **facts}
        atomic_write_text(checkpoint / COMPLETE, json.dumps(content, indent=1) + "\n")
        (checkpoint / _SAVING).unlink(missing_ok=True)


def read_seal(checkpoint: Path) -> dict[str, Any] | str:
    """Read COMPLETE.json.

    Args:
        checkpoint: its folder.

    Returns:
        The content, or in one sentence why there is none.

    Source: our choice.
    """
    try:
        content = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{COMPLETE} is missing, so it was never finished"
    except (OSError, ValueError) as error:
        return f"{COMPLETE} cannot be read ({error})"
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(_is_entry(*item) for item in files.items()):
        return f"{COMPLETE} does not list the files"
    if content.get("format") != FORMAT:
        return f"{COMPLETE} has format {content.get('format')!r}, this version reads {FORMAT}"
    return content


def faults(checkpoint: Path, *, weights_only: bool = False) -> list[str]:
    """Compare a checkpoint with its COMPLETE.json: names, sizes, sha256.

    Args:
        checkpoint: its folder.
        weights_only: leave out what holds the state of the optimisation.

    Returns:
        One phrase for every fault; none where training can go on from it.

    Source: our choice.
    """
    content = read_seal(checkpoint)
    if isinstance(content, str):
        return [content]
    files = {
        name: entry
        for name, entry in content["files"].items()
        if not (weights_only and _DISPENSABLE.fullmatch(_top(name)))
    }
    needed = _WEIGHTS if weights_only else _WEIGHTS | _STATE
    found = [
        f"it has no {part}"
        for part, pattern in needed.items()
        if not any(re.fullmatch(pattern, _top(name)) for name in files)
    ]
    found += [fault for name, entry in files.items() if (fault := _fault(checkpoint, name, entry))]
    strangers = {path.relative_to(checkpoint).as_posix() for path in _files(checkpoint)}
    strangers -= set(content["files"])
    found += [
        f"{name} was not there when it was saved"
        for name in sorted(strangers)
        if name.endswith(_LOADED)
    ]
    return found


def storage_of(checkpoint: Path) -> str:
    """Say which engine wrote a checkpoint, as only the same one reads its optimizer's state.

    Args:
        checkpoint: a complete one.

    Returns:
        A key of STORAGE, or UNSHARDED.

    Source: transformers 5.23 and accelerate 1.15, the names of their files.
    """
    content = read_seal(checkpoint)
    names = {_top(name) for name in content["files"]} if isinstance(content, dict) else set()
    for engine, pattern in STORAGE.items():
        if any(re.fullmatch(pattern, name) for name in names):
            return engine
    return UNSHARDED


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

    Source: our choice.
    """
    if resume is None:
        return None
    if resume != "auto":
        return _named(run_dir, Path(resume).expanduser(), weights_only)
    damaged = []
    for path in reversed(checkpoints(run_dir)):
        found = faults(path, weights_only=weights_only)
        if not found:
            return path
        told = f"{'; '.join(found)}{_advice(path, weights_only)}"
        logger.warning("skipped %s: %s", path, told)
        if not is_half_written(path):
            damaged.append(f"{path.name}: {told}")
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
    found = faults(path, weights_only=weights_only)
    if found:
        raise InputError(
            f"cannot resume from {str(path)!r}: {'; '.join(found)}. Use --resume auto to take the "
            f"newest complete checkpoint of the run folder{_advice(path, weights_only)}."
        )
    own = path.parent.resolve() == run_dir.resolve()
    after = [
        other.name
        for other in checkpoints(run_dir)
        if is_sealed(other) and not (own and step_of(other) <= step_of(path))
    ]
    if after:
        raise InputError(
            f"cannot resume from {str(path)!r} into {str(run_dir)!r}: {', '.join(after)} there "
            "would mix with what is trained now; move them away, or choose another output_dir."
        )
    return path


def _advice(path: Path, weights_only: bool) -> str:
    if weights_only or faults(path, weights_only=True):
        return ""
    return ", or add --weights-only to go on from its weights with a fresh optimizer"


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, COMPLETE.json first, so that no half of it ever counts."""
    if checkpoint.is_dir():
        (checkpoint / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(checkpoint, ignore_errors=True)


def prune(run_dir: Path, keep: int | None, newest: Path, best: str | None) -> None:
    """Remove older checkpoints; call it when the newest is complete and on the disk.

    Args:
        run_dir: the run folder.
        keep: how many stay, None for all; the newest and the best always do.
        newest: the checkpoint just sealed.
        best: the one with the lowest validation loss, or None.

    Source: our choice.
    """
    if keep is None:
        return
    safe = {newest.name, Path(best).name if best else newest.name}
    others = [path for path in checkpoints(run_dir) if path.name not in safe]
    # those after the newest are of a way not gone: damaged, and trained anew from an older one
    whole = [path for path in others if is_sealed(path) and step_of(path) < step_of(newest)]
    stay = whole[max(len(whole) - max(keep - len(safe), 0), 0) :]
    for path in others:
        if path not in stay:
            remove(path)


def _files(folder: Path) -> list[Path]:
    ours = (COMPLETE, _SAVING)
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in ours)


def _top(name: str) -> str:
    return PurePosixPath(name).parts[0]


def _is_entry(name: str, entry: Any) -> bool:
    """Tell whether a line of COMPLETE.json names a file below the checkpoint."""
    path = PurePosixPath(name)
    inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    return inside and isinstance(entry, dict) and {"size", "sha256"} <= set(entry)


def _fault(checkpoint: Path, name: str, entry: Mapping[str, Any]) -> str | None:
    path = checkpoint / name
    if not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    if size != entry["size"]:
        return f"{name} has {size:,} bytes in place of {entry['size']:,}"
    if _sha256(path) != entry["sha256"]:
        return f"{name} is not what was saved (its sha256 differs)"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
