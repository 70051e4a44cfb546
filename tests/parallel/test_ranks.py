"""Two processes that really exchange gradients find what one process finds."""

from __future__ import annotations

from pathlib import Path

import pytest

import warm
from parallel_checks import CHECKS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> Path:
    """Run all checks in two ranks, once."""
    folder = tmp_path_factory.mktemp("ranks")
    job = {"call": "parallel_checks:main", "arguments": {"folder": str(folder)}, "processes": 2}
    ((first, second),) = warm.run([job], folder / "streams")
    assert first.code == second.code == 0, first.err + second.err
    return folder


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(said, name, rank):
    text = (said / f"{list(CHECKS).index(name)}.{rank}.txt").read_text(encoding="utf-8")
    assert text == f"{name}\nok", text
