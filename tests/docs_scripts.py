"""Load scripts, those of docs/scripts by their name, as modules."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

SCRIPTS = Path(__file__).parents[1] / "docs" / "scripts"


def script(name: str) -> ModuleType:
    """Return the module of docs/scripts/NAME.py."""
    return load_script(SCRIPTS / f"{name}.py")


def load_script(file: Path) -> ModuleType:
    """Return a script as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
