"""Relative paths: in a run file relative to the file, on the command line to the working folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

HERE = Path(".")


def anchor_paths(raw: dict[str, Any], folder: Path) -> None:
    """Make the relative paths of a run file, as parsed, relative to the working directory.

    These are output_dir, init_from, data.root, and model.name and experts_from.paths if they are
    folders or files there. Names in data.tasks.NAME.files follow data.root, also on the command
    line. Values of other types are left to the schema.

    Args:
        raw: the run file; changed in place.
        folder: of the run file.
    """
    if folder == HERE:
        return
    for name in ("output_dir", "init_from"):
        if isinstance(raw.get(name), str) and raw[name]:
            raw[name] = _joined(folder, raw[name])
    data = raw.get("data")
    if isinstance(data, dict) and isinstance(data.get("root", "."), str):
        data["root"] = _joined(folder, data.get("root", "."))
    model = raw.get("model")
    if isinstance(model, dict) and isinstance(model.get("name"), str):
        model["name"] = _or_id(folder, model["name"])
    experts = raw.get("experts_from")
    if isinstance(experts, dict) and isinstance(experts.get("paths"), list):
        experts["paths"] = [
            _or_id(folder, path) if isinstance(path, str) else path for path in experts["paths"]
        ]


def _or_id(folder: Path, name: str) -> str:
    """Join a name that is a path; a name of the hub or of a built-in model stays."""
    is_path = name.startswith((".", "~")) or (folder / name).exists()
    return _joined(folder, name) if is_path and name else name


def _joined(folder: Path, path: str) -> str:
    return os.path.normpath(folder / os.path.expanduser(path))
