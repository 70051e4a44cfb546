"""manifest.json: what has to be known to repeat a run."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from rotmole import __version__
from rotmole.config.schema import RunFile
from rotmole.data.chat import today
from rotmole.files import atomic_write_text
from rotmole.training.folder.layout import MANIFEST

PACKAGES = (
    "torch",
    "peft",
    "transformers",
    "trl",
    "accelerate",
    "datasets",
    "safetensors",
    "tokenizers",
    "babel",
    "num2words",
)


def versions() -> dict[str, str]:
    """Return the versions of rotmole, Python and the packages a run depends on."""
    versions = {"rotmole": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def machine() -> dict[str, Any]:
    """Return what decides speed and the last bits: platform, cores, threads, devices."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": devices,
    }


def git_commit(folder: Path | None = None) -> str | None:
    """Return the commit of the git repository around a folder.

    Args:
        folder: None is the current one.

    Returns:
        The hash, followed by "+changes" where tracked files differ; None outside a repository.
    """
    try:
        commit = _git("rev-parse", "HEAD", folder=folder)
        changes = _git("status", "--porcelain", "--untracked-files=no", folder=folder)
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+changes" if changes else commit


def _git(*arguments: str, folder: Path | None) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()


def earlier_resumes(path: Path) -> list[dict[str, Any]]:
    """Read from a run's manifest how often it was resumed; a missing or broken one tells nothing.

    Args:
        path: manifest.json.

    Returns:
        {"from": checkpoint, "changes": [...]} for each time, in order.
    """
    try:
        resumes = json.loads(path.read_text(encoding="utf-8")).get("resumes", [])
    except (OSError, ValueError, AttributeError):
        return []
    return resumes if isinstance(resumes, list) else []


def run_date(run_dir: Path) -> str:
    """Return the date on which a run's chats are rendered, as ISO text.

    It is the date of the run's first start; 0.1.0 did not keep it, but its last start.

    Args:
        run_dir: the run folder; without a readable manifest the date is today's.
    """
    try:
        kept = json.loads((run_dir / MANIFEST).read_text(encoding="utf-8"))
        date = kept.get("date") or datetime.fromisoformat(kept["started"]).astimezone().date()
        return datetime.fromisoformat(str(date)).date().isoformat()
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return today()


def add_to_manifest(path: Path, content: Mapping[str, Any]) -> None:
    """Add what became known after the start of the run.

    Raises:
        StorageError: the disk refused.
    """
    whole = json.loads(path.read_text(encoding="utf-8")) | dict(content)
    atomic_write_text(path, _text(whole))


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n"


def manifest(
    run: RunFile,
    fingerprint: Mapping[str, Any],
    adapter: Mapping[str, Any],
    resumes: Sequence[Mapping[str, Any]] = (),
    date: str | None = None,
) -> str:
    """Describe a run so that it can be repeated; no environment variable, no token.

    Args:
        run: the run.
        fingerprint: of the data, from rotmole.data.data_fingerprint.
        adapter: trainable parameters and adapted modules.
        resumes: the checkpoints it went on from, and what changed there.
        date: on which its chats were rendered; None is today's.

    Returns:
        JSON text.
    """
    content = {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "date": date or today(),
        "model": run.model.name,
        "seed": run.seed,
        "adapter": adapter,
        "data": fingerprint,
        "versions": versions(),
        "machine": machine(),
        "git_commit": git_commit(),
        "resumes": list(resumes),
    }
    return _text(content)
