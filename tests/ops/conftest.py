"""Lets the law tests import `ops_cases`, the random problems they share, and one another."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path += [str(folder) for folder in (HERE, *HERE.iterdir()) if folder.is_dir()]
