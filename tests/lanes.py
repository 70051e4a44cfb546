"""Which lane runs which case of a test: `make test` the quick ones, `make test-slow` the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def first_then_slow(cases: Iterable[Any]) -> list[Any]:
    """Return the cases of a whole way: the first for every lane, the others for the slow one."""
    first, *others = cases
    return [first, *(pytest.param(case, marks=pytest.mark.slow) for case in others)]
