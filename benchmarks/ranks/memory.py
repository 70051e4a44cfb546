"""Memory of each process in training, next to the formula of docs/scale.md. Start it with

    torchrun --standalone --nproc-per-node 2 benchmarks/ranks/memory.py [--fsdp] [--offload]

Each process prints the memory that it held before the model was loaded. Above that, it prints the
memory at rest after the last update, the peak of that update, and the peak of the whole process,
loading included. Next to them it prints what the formula says: weights W, adapter A, and the
activations as `rotmole check` traces them (gradients included). It needs a CPU and Linux, because
only Linux can reset a peak and return freed memory.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainerCallback

from rotmole.config.load import load_run, sft_arguments
from rotmole.models.memory import estimate_memory, peak_rss_bytes, resident_bytes
from rotmole.models.preview import preview
from rotmole.training.run import train

UPDATES, WORDS = 2, 60


class Watch(TrainerCallback):
    """Forgets the peak before the last update; notes it, and what stays, after it."""

    def __init__(self) -> None:
        self.rest = self.peak = self.ever = self.base = self.adapter = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for value in kwargs["model"].parameters():  # of a shard numel() counts the whole
            if value.requires_grad:
                self.adapter += value.numel() * value.element_size()
            else:
                self.base += value.numel() * value.element_size()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == UPDATES - 1:
            self.ever = peak_rss_bytes()
            trim()
            Path("/proc/self/clear_refs").write_text("5")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.peak = peak_rss_bytes()
        self.ever = max(self.ever, self.peak)
        trim()
        self.rest = resident_bytes()


def trim() -> None:
    """Give freed memory back, which the C library keeps for later."""
    ctypes.CDLL(None).malloc_trim(0)


def run_text(arguments: argparse.Namespace, folder: Path) -> str:
    """Write rows of one length, and the run file that trains on them."""
    rows = [{"prompt": "red " * WORDS, "completion": "blue"} for _ in range(64)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    training: dict[str, Any] = {
        "max_steps": UPDATES, "per_device_train_batch_size": arguments.batch,
        "save_strategy": "no", "logging_steps": 100,
    }  # fmt: skip
    if arguments.fsdp or arguments.offload:
        training["fsdp"] = True
    if arguments.offload:
        training["fsdp_config"] = {"cpu_offload": True}
    run = {
        "output_dir": str(folder / "run"),
        "model": {"name": arguments.model, "dtype": "float32", "device": "cpu"},
        "adapter": {
            "num_experts": arguments.experts, "r": arguments.rank,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        },
        "data": {
            "tasks": {"same": {"source": "jsonl", "files": {"train": str(folder / "rows.jsonl")}}}
        },
        "training": training,
    }  # fmt: skip
    return yaml.safe_dump(run)


def main() -> None:
    """Train a few updates and print this process's line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="name or folder of the base model")
    parser.add_argument("--fsdp", action="store_true", help="FSDP2 in place of DDP")
    parser.add_argument("--offload", action="store_true", help="FSDP2 with cpu_offload")
    parser.add_argument("--batch", type=int, default=4, help="rows of a micro-batch")
    parser.add_argument("--experts", type=int, default=16, help="experts of each layer")
    parser.add_argument("--rank", type=int, default=16, help="rank of each expert")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    with tempfile.TemporaryDirectory() as name:
        text = run_text(arguments, Path(name))
        run, watch = load_run(None, text=text), Watch()
        model = preview(run.model, run.adapter_config, torch.float32)
        length = WORDS + 4
        guess = estimate_memory(
            model, batch=arguments.batch, length=length, settings=sft_arguments(run), process=0
        )
        before = resident_bytes()
        train(run, progress=False, callbacks=[watch])
    sharded = arguments.fsdp or arguments.offload
    base, adapter = watch.base, watch.adapter
    state = (base + 3 * adapter) / (ranks if sharded else 1)
    figures = {
        "before": before, "rest": watch.rest - before, "peak": watch.peak - before,
        "ever": watch.ever - before,
        "W": base, "A": adapter, "activations": guess.step,
        "formula rest": state, "formula peak": state + guess.step,
    }  # fmt: skip
    line = ", ".join(f"{key} {value / 1e6:.0f}" for key, value in figures.items())
    way = "offload" if arguments.offload else "fsdp2" if sharded else "ddp" if ranks > 1 else "one"
    print(f"{way}, process {os.environ.get('RANK', '0')} of {ranks}, MB: {line}", flush=True)


if __name__ == "__main__":
    main()
