"""Relative paths: in a run file relative to the file, on the command line to the working folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

HERE = Path(".")


def anchor_paths(raw: dict[str, Any], folder: Path) -> None:
    """Make the relative paths of a run file, as parsed, relative to the working directory.

    These are output_dir, init_from, data.root, and model.name if it is a folder or file there.
    Names in data.tasks.NAME.files follow data.root, also on the command line. Values of other types
    are left to the schema.

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
        name = model["name"]
        is_path = name.startswith((".", "~")) or (folder / name).exists()
        if is_path and name:
            model["name"] = _joined(folder, name)


def _joined(folder: Path, path: str) -> str:
    return os.path.normpath(folder / os.path.expanduser(path))
