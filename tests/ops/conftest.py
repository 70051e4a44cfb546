"""Lets the law tests import `ops_cases`, the random problems they share."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
