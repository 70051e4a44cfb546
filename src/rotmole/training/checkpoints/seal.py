"""One checkpoint: COMPLETE.json is written last, and compared with the files before a resume.

A checkpoint is a folder checkpoint-N with everything that training needs to go on after update N.
COMPLETE.json lists its files with size and sha256, and the facts of the run; it is written when
all other files are on the disk, and a folder without it is no checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from rotmole.files import atomic_write_text, storage_errors, sync

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
    "optimizer state": r"optimizer.*",
    "learning-rate schedule": r"scheduler\.pt",
    "random-number state": r"rng_state.*\.pth",
}
"""What a checkpoint needs, and the names (of files or folders) that hold it."""

UNSHARDED = "one process or DDP"
STORAGE = {
    "FSDP with whole states": r"pytorch_model_fsdp\.bin|optimizer\.bin",
    "FSDP with shards": r"pytorch_model_fsdp_.*|optimizer_\d+.*",
}
"""Engine -> the names that only its checkpoints hold."""

_DISPENSABLE = re.compile(r"(optimizer|scheduler|rng_state|scaler|sums).*")
"""What --weights-only does without."""

_LOADED = (".safetensors", ".bin", ".pt", ".pth", ".distcp")
"""Ends of files that a loader might pick up; none may be there that was not saved."""


def step_of(checkpoint: Path) -> int:
    """Return N of a folder checkpoint-N."""
    return int(checkpoint.name[11:])


def is_sealed(checkpoint: Path) -> bool:
    """Tell whether a checkpoint was finished; `faults` tells whether it is still whole."""
    return (checkpoint / COMPLETE).is_file()


def is_half_written(checkpoint: Path) -> bool:
    """Tell whether a checkpoint is only what a process left behind when it died while saving."""
    marked = (checkpoint / _SAVING).exists() or not any(checkpoint.iterdir())
    return marked and not is_sealed(checkpoint)


def begin(checkpoint: Path) -> None:
    """Make room for a checkpoint: remove what an earlier attempt left, and mark the folder.

    Raises:
        StorageError: the disk refused.
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
    """
    with storage_errors(checkpoint):
        files = {}
        for path in _files(checkpoint):
            files[path.relative_to(checkpoint).as_posix()] = {
                "size": path.stat().st_size,
                "sha256": sha256(path),
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

    Returns:
        The content, or in one sentence why there is none.
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
    problems = [
        f"it has no {part}"
        for part, pattern in needed.items()
        if not any(re.fullmatch(pattern, _top(name)) for name in files)
    ]
    problems += [f for name, entry in files.items() if (f := _fault(checkpoint, name, entry))]
    strangers = {path.relative_to(checkpoint).as_posix() for path in _files(checkpoint)}
    strangers -= set(content["files"])
    problems += [
        f"{name} was not there when it was saved"
        for name in sorted(strangers)
        if name.endswith(_LOADED)
    ]
    return problems


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


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, COMPLETE.json first, so that no half of it ever counts."""
    if checkpoint.is_dir():
        (checkpoint / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(checkpoint, ignore_errors=True)


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
    if sha256(path) != entry["sha256"]:
        return f"{name} is not what was saved (its sha256 differs)"
    return None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
