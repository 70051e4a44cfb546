"""``python -m rotmole_cli`` is the command ``rotmole``, for launchers such as torchrun."""

from __future__ import annotations

import sys

from rotmole_cli import main

sys.exit(main())
