"""A tiny study on disk, and what processes that share or kill it do; see warm.py."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import yaml

from training_cases import settings, write_data, write_model


def write_study(root: Path, **changes: Any) -> Path:
    """Two methods, a grid of two rates, one tuning seed, two final seeds: eight cells."""
    (root / "data").mkdir(parents=True)
    content = settings(
        write_model(root / "model"), write_data(root / "data"), root / "run",
        max_steps=4, eval_steps=2, save_steps=2, save_total_limit=2,
    )  # fmt: skip
    for task in content["data"]["tasks"].values():
        validation = task["files"]["validation"]
        task["files"]["test"] = validation.replace("validation", "test")
        shutil.copy(validation, task["files"]["test"])
    content["adapter"] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    (root / "run.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    study = {
        "output_dir": "study",
        "base": "run.yaml",
        "methods": {
            "lora": {"adapter": {"peft_type": "LORA", "r": 16}},
            "moe": {"adapter": {"preset": "moe_lora"}},
        },
        "baseline": "lora",
        "tune": {"grid": {"training.learning_rate": [1e-2, 2e-2]}, "seeds": [7], "growth": 0},
        "seeds": [0, 1],
        "threads": 1,
    }
    (root / "study.yaml").write_text(yaml.safe_dump(study | changes, sort_keys=False))
    return root / "study.yaml"


CLOCK = ("seconds", "train_seconds", "peak_memory_bytes")


def figures(folder: Path) -> dict[str, Any]:
    """What every finished cell of a study says, without what depends on the clock."""
    found = {}
    for path in sorted((folder / "cells").rglob("cell.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = path.with_name("predictions.jsonl")
        found[str(path.parent.relative_to(folder))] = (
            {name: value for name, value in content.items() if name not in CLOCK},
            rows.read_text(encoding="utf-8") if rows.exists() else "",
        )
    return found


def work(study: str, output: str) -> int:
    """Do what is left of a study, in this process."""
    from rotmole.comparison.share import fix_machine
    from rotmole.comparison.share import work as share
    from rotmole.comparison.study import load_study

    loaded = load_study(study, output=output)
    left = share(loaded, fix_machine(loaded))
    return int(bool(left.failed))


def killed(study: str, output: str, seed: int, deaths: int) -> int:
    """Kill the process that does a study again and again, then let one end it.

    The moments are random, each within the time in which a few cells are made.
    """
    chance = random.Random(seed)
    for _ in range(deaths):
        pid = _fork(study, output)
        time.sleep(chance.uniform(0.2, 2.5))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(os.waitpid(_fork(study, output), 0)[1])


def shared(study: str, output: str) -> int:
    """Two processes do one study; one of them is killed on the way and replaced."""
    first, second = _fork(study, output), _fork(study, output)
    time.sleep(1.5)
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    third = _fork(study, output)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in (second, third)]
    return max(codes)


def _fork(study: str, output: str) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = work(study, output)
        finally:
            os._exit(code)
    return pid
