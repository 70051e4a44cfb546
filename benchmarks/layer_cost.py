"""What one adapted layer costs beside PEFT LoRA with as many parameters: time of a whole step.

    python benchmarks/layer_cost.py [--pairs 20] [--csv FILE]

Ratios of one run, taken in alternated pairs, because machines are shared; never compare seconds of
two runs. LoRA gets the rank whose parameters come nearest to the mixture's, gates included.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import rotmole

TOKENS, WIDTH = 512, 576
SHAPES = ((4, 6, 2), (8, 8, 2), (20, 4, 10))  # experts, rank, selected
ROTATIONS = ("none", "tangent", "plane", "givens")


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


def _seconds(model: nn.Module, x: torch.Tensor) -> float:
    started = time.perf_counter()
    model(x).sum().backward()
    model.zero_grad()
    return time.perf_counter() - started


def _ratios(experts: int, rank: int, top_k: int, rotation: str, pairs: int) -> list[float]:
    config = rotmole.RotMoleConfig(
        num_experts=experts, r=rank, top_k=top_k, rotation=rotation, target_modules=["proj"]
    )
    ours = get_peft_model(_Layer(), config)
    parameters = ours.get_nb_trainable_parameters()[0]
    lora_rank = max(1, round(parameters / (2 * WIDTH)))
    lora = get_peft_model(_Layer(), LoraConfig(r=lora_rank, target_modules=["proj"]))
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    for model in (ours, lora):
        _seconds(model, x)
    return [_seconds(ours, x) / _seconds(lora, x) for _ in range(pairs)]


def main() -> int:
    """Measure every shape and rotation; print a table, and write it as CSV if asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()
    rows = []
    for experts, rank, top_k in SHAPES:
        for rotation in ROTATIONS:
            ratios = sorted(_ratios(experts, rank, top_k, rotation, given.pairs))
            tenth = len(ratios) // 10
            row = {
                "experts": experts, "rank": rank, "top_k": top_k, "rotation": rotation,
                "median_ratio": round(statistics.median(ratios), 3),
                "low_10": round(ratios[tenth], 3), "high_90": round(ratios[-1 - tenth], 3),
            }  # fmt: skip
            rows.append(row)
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    if given.csv is not None:
        about = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        about |= {"rotmole": rotmole.__version__, "threads": torch.get_num_threads()}
        with given.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*rows[0], *about])
            writer.writeheader()
            writer.writerows(row | about for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
