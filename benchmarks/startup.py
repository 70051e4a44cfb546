"""How long does rotmole take to start? Seconds of fresh processes, with a warm page cache.

    python benchmarks/startup.py [--quick] [--csv FILE]

`rotmole --help`; what `import rotmole` adds to `import peft`; and what an adapter of SmolLM2-135M's
architecture takes to load beyond its base model.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import SHAPES, Row, adapter_config, finish, parser, run, show, spread, start
from step import TARGETS, smollm2

CODE = """
import json, sys, time
times = [time.perf_counter()]
def lap(): times.append(time.perf_counter())
import peft; lap()
import rotmole; lap()
from transformers import AutoModelForCausalLM
import torch
folder = sys.argv[1]
lap()
base = AutoModelForCausalLM.from_pretrained(folder + "/base", dtype=torch.bfloat16); lap()
peft.PeftModel.from_pretrained(base, folder + "/adapter"); lap()
print(json.dumps([b - a for a, b in zip(times, times[1:])]))
"""
LAPS = {  # measure: which lap of CODE
    "import peft": 0,
    "import rotmole after import peft": 1,
    "load the base model": 3,
    "load the adapter beyond the base": 4,
}


def save_models(folder: Path, quick: bool) -> None:
    """Save a base model and an adapter of it."""
    from peft import get_peft_model

    base = smollm2(quick)
    base.save_pretrained(folder / "base")
    config = adapter_config("tangent", SHAPES[0], TARGETS["all-linear"])
    get_peft_model(base, config).save_pretrained(folder / "adapter")


def main() -> int:
    """Measure everything in as many fresh processes as there are rounds."""
    given = parser(__doc__, rounds=3).parse_args()
    start(given)
    times: dict[str, list[float]] = {"rotmole --help": []} | {name: [] for name in LAPS}
    with tempfile.TemporaryDirectory() as folder:
        save_models(Path(folder), given.quick)
        commands = ([sys.executable, "-m", "rotmole_cli", "--help"],
                    [sys.executable, "-W", "ignore", "-c", CODE, folder])  # fmt: skip
        for index in range(given.rounds + 1):
            began = time.perf_counter()
            subprocess.run(commands[0], check=True, capture_output=True)
            taken = time.perf_counter() - began
            done = subprocess.run(commands[1], check=True, capture_output=True, text=True)
            if index > 0:  # the first fills the page cache
                times["rotmole --help"].append(taken)
                laps = json.loads(done.stdout.splitlines()[-1])
                for name, lap in LAPS.items():
                    times[name].append(laps[lap])
    rows = []
    for name, seconds in times.items():
        value, low, high = spread(seconds)
        row = Row("startup", "fresh process", "", name, "", value, low, high, "s")
        rows.append(show(row))
    return finish(rows, given)


if __name__ == "__main__":
    run(main)
