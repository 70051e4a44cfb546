"""The house keeps its order: `make imports` sees every forbidden import, and tests mirror src."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

TYPING = "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    "
LAZY = "def planted():\n    "
# file under src/, what is planted there, words of what `make imports` says
PLANTED = {
    "circle-by-annotation": (
        "rotmole/ops/rotation/modes.py",
        TYPING + "from rotmole.ops.rotation.table import Gate",
        "No cycles are allowed in rotmole.ops.rotation",
    ),
    "circle-by-lazy-import": (
        "rotmole/ops/rotation/modes.py",
        LAZY + "from rotmole.ops.rotation import adjoint",
        "No cycles are allowed in rotmole.ops.rotation",
    ),
    "circle-through-a-package": (
        "rotmole/data/examples.py",
        LAZY + "from rotmole.data import load_examples",
        "rotmole.data.examples, line {line}, imports rotmole.data",
    ),
    "circle-through-the-library": (
        "rotmole/recording/record.py",
        TYPING + "from rotmole import RotMoleModel",
        "rotmole.recording.record, line {line}, imports rotmole",
    ),
    "room-back-up-by-annotation": (
        "rotmole/ops/spec.py",
        TYPING + "from rotmole.tuner.settings.settings import Settings",
        "rotmole.ops is not allowed to import rotmole.tuner",
    ),
    "room-back-up-by-lazy-import": (
        "rotmole/models/load.py",
        LAZY + "import rotmole.training.run",
        "rotmole.models is not allowed to import rotmole.training",
    ),
    "library-imports-the-command": (
        "rotmole/files.py",
        LAZY + "import rotmole_cli.run",
        "rotmole is not allowed to import rotmole_cli",
    ),
    "routing-imports-mixture": (
        "rotmole/ops/routing/balance.py",
        TYPING + "from rotmole.ops.mixture.banks import How",
        "rotmole.ops.routing is not allowed to import rotmole.ops.mixture",
    ),
    "routing-imports-rotation": (
        "rotmole/ops/routing/balance.py",
        LAZY + "from rotmole.ops.rotation.modes import floor_at",
        "rotmole.ops.routing is not allowed to import rotmole.ops.rotation",
    ),
    "reference-imports-precision": (
        "rotmole/ops/reference/method.py",
        LAZY + "from rotmole.ops.precision import epsilon",
        "rotmole.ops.reference is not allowed to import rotmole.ops.precision",
    ),
    "reference-imports-mixture": (
        "rotmole/ops/reference/method.py",
        LAZY + "from rotmole.ops.mixture import dense",
        "rotmole.ops.reference is not allowed to import rotmole.ops.mixture",
    ),
    "mixture-imports-reference": (
        "rotmole/ops/mixture/dense.py",
        LAZY + "from rotmole.ops.reference.method import mixture",
        "rotmole.ops.mixture is not allowed to import rotmole.ops.reference",
    ),
    "settings-import-the-configuration": (
        "rotmole/tuner/settings/rules.py",
        TYPING + "from rotmole.tuner.config import RotMoleConfig",
        "rotmole.tuner.settings is not allowed to import rotmole.tuner.config",
    ),
    "batch-imports-experts": (
        "rotmole/tuner/batch/batch.py",
        TYPING + "from rotmole.tuner.experts.experts import Experts",
        "rotmole.tuner.batch is not allowed to import rotmole.tuner.experts",
    ),
    "checkpoints-import-the-trainer": (
        "rotmole/training/checkpoints/seal.py",
        TYPING + "from rotmole.training.trainer import RotMoleTrainer",
        "rotmole.training.checkpoints is not allowed to import rotmole.training.trainer",
    ),
    "room-without-a-place": ("rotmole/attic/__init__.py", "", "- rotmole.attic"),
}


def make_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the recipe of `make imports` in a copy of the tree, without setting up an environment."""
    return subprocess.run(
        ["make", "-o", "setup", "imports", f"BIN={Path(sys.executable).parent}"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder / "src"), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "circles.py", tmp_path / "tests")
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_make_imports_is_green(copy: Path) -> None:
    run = make_imports(copy)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("name", PLANTED)
def test_make_imports_sees_a_planted_import(copy: Path, name: str) -> None:
    file, import_, words = PLANTED[name]
    path = copy / "src" / file
    path.parent.mkdir(exist_ok=True)
    before = path.read_text(encoding="utf-8") if path.exists() else '"""Planted."""\n'
    text = f"{before}\n{import_}"
    path.write_text(text, encoding="utf-8")
    run = make_imports(copy)
    assert run.returncode != 0, run.stdout
    assert words.format(line=text.count("\n") + 1) in run.stdout, run.stdout


# Folders of tests that have no room of the same name in src/rotmole, and what they hold.
OTHER_FOLDERS = {
    "benchmarks": "of the scripts in benchmarks/",
    "conformance": "PEFT's own tests",
    "docs": "of the documents",
    "faults": "kills, full disks and bad input, for several rooms at once",
    "golden": "adapters written by earlier versions",
    "gpu": "what can only be seen on a GPU, and the lane that runs it",
    "mutation": "changes of the source that the tests must notice",
    "parallel": "several processes, for several rooms at once",
}


def test_folders_of_tests_mirror_the_rooms() -> None:
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("*.py")}
    strays = [
        str(folder)
        for folder in folders
        if not (ROOT / "src" / "rotmole" / folder).is_dir() and folder.parts[0] not in OTHER_FOLDERS
    ]
    assert not strays, f"no room of src/rotmole has these names: {strays}"
    unused = [name for name in OTHER_FOLDERS if not (ROOT / "tests" / name).is_dir()]
    assert not unused


def test_every_room_has_tests() -> None:
    """In its own folder, or for a small room in one file of its name, as tests/cli/test_demo.py."""
    source = ROOT / "src" / "rotmole"
    rooms = {path.parent.relative_to(source) for path in source.rglob("*.py")}
    untested = [
        str(room)
        for room in rooms
        if not list((ROOT / "tests" / room).glob("test_*.py"))
        and not (ROOT / "tests" / room.parent / f"test_{room.name}.py").exists()
    ]
    assert not untested
