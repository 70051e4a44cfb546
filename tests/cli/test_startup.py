"""Help, version and init answer at once: nothing heavy is imported for them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COMMANDS = {
    "help": ["--help"],
    "version": ["--version"],
    "verb help": ["train", "--help"],
    "init": ["init", "run.yaml"],
    "mistake": ["tarin"],
}
HEAVY = ["torch", "peft", "transformers", "trl", "datasets", "numpy", "rotmole"]


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_nothing_heavy_is_imported(words, tmp_path):
    code = f"""
import sys
from rotmole_cli import main
code = main({words!r})
assert code == {2 if words == ["tarin"] else 0}, code
print("HEAVY", sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_the_hubs_telemetry_is_off(tmp_path):
    """Of the hub's client as it is imported, whatever the environment forgot to say."""
    code = """
from rotmole_cli import main
main(["init", "run.yaml"])
from huggingface_hub import constants
print("TELEMETRY OFF", constants.HF_HUB_DISABLE_TELEMETRY)
"""
    names = ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK", "HF_HUB_OFFLINE")
    env = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, cwd=tmp_path, env=env, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "TELEMETRY OFF True"
