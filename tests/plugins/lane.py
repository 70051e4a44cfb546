"""Run the checks of each plug-in inside the program it is for, in an environment of its own.

    python tests/plugins/lane.py [ms-swift] [axolotl] [-- pytest arguments]

The environments lie in .cache/plugins/; each takes 2 to 3 GB, because both programs bring much.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".cache" / "plugins"
PROGRAMS = {"ms-swift": "4.6.0", "axolotl": "0.19.0"}
TORCH = "torch==2.13.0"  # as in constraints.txt: without a pin, gigabytes for GPUs come along


def environment(program: str) -> Path:
    """Make the program's environment if there is none; return its python."""
    python = FOLDER / program / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", FOLDER / program], check=True)
    wanted = [TORCH, f"{program}=={PROGRAMS[program]}", "gguf", "pytest"]
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *wanted, "--editable", ROOT], check=True)
    return python


def checks(python: Path, program: str, more: list[str]) -> int:
    """Run the checks of one program; warnings of its libraries are not errors."""
    file = Path(__file__).with_name(f"{program.replace('-', '_')}_checks.py")
    settings = {"PYTHONPATH": str(ROOT / "tests"), "HF_HUB_OFFLINE": "1"}
    settings |= {"CUDA_VISIBLE_DEVICES": "", "AXOLOTL_DO_NOT_TRACK": "1", "WANDB_MODE": "offline"}
    return subprocess.run(
        [python, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "-o",
         "filterwarnings=default", *more, file],
        cwd=ROOT, env=os.environ | settings, check=False,
    ).returncode  # fmt: skip


def main(arguments: list[str]) -> int:
    """Run the lanes that are named, or all."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    named, more = arguments[:cut], arguments[cut + 1 :]
    return max(checks(environment(name), name, more) for name in named or PROGRAMS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
