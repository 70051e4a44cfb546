"""Run the tests against the oldest supported and the newest versions of the host libraries.

    python tests/matrix.py [oldest] [newest] [-- pytest arguments]

Each lane has its own environment in .cache/matrix/. `oldest` takes constraints-oldest.txt,
`newest` takes the newest peft, transformers, trl, accelerate and datasets; torch is pinned in both.
All tests run that touch those libraries: tests/ops (torch alone), tests/docs (the README's own
commands) and the heavy tests are left out. Warnings are not errors here, because older libraries
warn of what newer ones changed, and newer ones deprecate what still works. pytest lists them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".cache" / "matrix"
HOSTS = ("peft", "transformers", "trl", "accelerate", "datasets")
LANES = ("oldest", "newest")
LEFT_OUT = ("tests/ops", "tests/docs")


def pins(lane: str) -> list[str]:
    """Return the lane's constraints; those of constraints.txt without the host libraries."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {re.split("[=<> ]", line)[0].lower(): line for line in lines if "==" in line}
    for name in (*HOSTS, "safetensors", "typer", "diffusers"):  # the hosts decide these versions
        pinned.pop(name)
    if lane == "oldest":
        oldest = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
        pinned |= {line.partition("==")[0]: line for line in oldest if "==" in line}
    return list(pinned.values())


def environment(lane: str) -> Path:
    """Make or bring up to date the lane's environment; return its python."""
    folder = FOLDER / lane
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    (folder / "constraints.txt").write_text("\n".join(pins(lane)) + "\n", encoding="utf-8")
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade",
         "--upgrade-strategy", "eager", "--constraint", folder / "constraints.txt",
         "--editable", f"{ROOT}[dev]"],
        check=True,
    )  # fmt: skip
    return python


def main(arguments: list[str]) -> int:
    lanes = [a for a in arguments if a in LANES] or LANES
    extra = (
        arguments[arguments.index("--") + 1 :]
        if "--" in arguments
        else ["-n", "2", "--dist", "worksteal"]
    )
    codes = []
    for lane in lanes:
        python = environment(lane)
        freeze = subprocess.run(
            [python, "-m", "pip", "freeze", "--exclude-editable"],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        names = tuple(f"{name}==" for name in (*HOSTS, "torch"))
        versions = [line for line in freeze.stdout.splitlines() if line.startswith(names)]
        print(f"matrix: {lane}: {', '.join(versions)}", flush=True)
        paths = [f"--ignore={path}" for path in LEFT_OUT]
        variables = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        tests = subprocess.run(
            [python, "-m", "pytest", "-q", "-W", "default", "-m", "not heavy", *paths, *extra],
            cwd=ROOT, env=variables, check=False,
        )  # fmt: skip
        codes.append(tests.returncode)
        print(f"matrix: {lane}: {'passed' if not tests.returncode else 'FAILED'}", flush=True)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
