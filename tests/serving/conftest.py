"""Lets the tests import `serving_cases`, and shares its models."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from serving_cases import Alone, write_targets


@pytest.fixture(scope="session")
def targets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Run files of two adapters, red and blue; tests only read them."""
    return write_targets(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def alone(targets: list[Path]) -> dict[str, Alone]:
    """Each target loaded by itself, by the name of its adapter; and the base."""
    found = {target.stem: Alone(target) for target in targets}
    found["base"] = Alone(targets[0])
    found["base"].model = found["base"].model.unload()
    return found
