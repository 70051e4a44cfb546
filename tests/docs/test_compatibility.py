"""docs/compatibility.md names tests that exist, versions that are pinned, and every case tested."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`(tests/[^`]+)`", TEXT)


def _functions(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_test_it_names_exists() -> None:
    assert len(NAMED) > 30
    for name in NAMED:
        file, _, function = name.partition("::")
        assert (ROOT / file).is_file(), name
        if function:
            assert function.partition("[")[0] in _functions(file), name


def _cases(file: str) -> set[str]:
    """Ids of all tests of a file, from their parametrize marks: strings, or params of one."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, ROOT / file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # its dataclasses look for themselves there
        spec.loader.exec_module(module)
    found = set()
    for name, test in vars(module).items():
        if name.startswith("test_"):
            marks = [m for m in getattr(test, "pytestmark", []) if m.name == "parametrize"]
            cases = marks[0].args[1] if marks else []
            ids = [f"[{getattr(case, 'values', [case])[0]}]" for case in cases] or [""]
            found |= {f"{file}::{name}{case}" for case in ids}
    return found


@pytest.mark.parametrize("file", ["tests/tuner/test_trainers.py", "tests/tuner/test_models.py"])
def test_the_cases_it_names_are_the_cases_that_run(file: str) -> None:
    """Both ways: no case is claimed that does not run, none runs that the table leaves out."""
    assert {n for n in NAMED if n.startswith(f"{file}::")} == _cases(file)


def _pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def test_the_versions_it_names_are_the_pinned_ones_and_the_bounds() -> None:
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \|$", TEXT, re.MULTILINE)
    oldest, newest = _pins("constraints-oldest.txt"), _pins("constraints.txt")
    assert {name for name, _, _ in rows} == set(oldest)
    for name, low, high in rows:
        assert (low, high) == (oldest[name], newest[name])
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    bounds = dict(re.findall(r'"(\w+)>=([\d.]+)"', project))
    for name in set(oldest) - {"torch"}:
        padded = f"{bounds[name]}.0.0".split(".")[:3]
        assert padded == oldest[name].split("."), name
