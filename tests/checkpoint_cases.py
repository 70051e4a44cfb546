"""Checkpoints without a model: the files a trainer leaves, filled with a few bytes, sealed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rotmole.training.checkpoints.seal import seal

FILES = (
    "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "rng_state.pth",
    "scheduler.pt", "trainer_state.json",
)  # fmt: skip
STATE = ("optimizer.pt", "rng_state.pth", "scheduler.pt")


def checkpoint(run_dir: Path, step: int, *, leave_out: str = "", **facts: Any) -> Path:
    """A complete checkpoint, but for one file that was never there."""
    folder = unfinished(run_dir, step, leave_out)
    seal(folder, {"facts": facts})
    return folder


def unfinished(run_dir: Path, step: int, leave_out: str = "") -> Path:
    """A checkpoint whose process died before COMPLETE.json."""
    folder = run_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in FILES:
        if name != leave_out:
            (folder / name).write_text(f"{name} {step}", encoding="utf-8")
    return folder
