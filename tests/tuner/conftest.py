"""Lets the tests of a folder import what another test of that folder defines."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "batch"))
