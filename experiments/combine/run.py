"""Combine trained adapters: each alone, their mean, one LoRA for all, and gates.

    OMP_NUM_THREADS=1 nice python experiments/combine/run.py [--cells DIR] [--seeds 0 1 2]

Every cell has a folder with figures.json; a cell that has one is not made again, so the command
goes on where it was stopped. results.json beside this file is written of all that are there, and
docs/scripts/combine_tables.py makes the tables of docs/combine.md of it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from parts import GROUPS, RANK, UPDATES, base_model, examples, run_file, score, train_lora
from peft import PeftModel

from rotmole.files import atomic_write_text


@dataclass(frozen=True)
class Cells:
    """All cells of one seed.

    Attributes:
        folder: of the cells of all seeds.
    """

    folder: Path
    seed: int

    def place(self, name: str) -> Path:
        """Return the folder of a cell."""
        return self.folder / f"seed{self.seed}" / name

    def make(self, name: str, work: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
        """Return the figures of a cell, made now if they are not there."""
        folder = self.place(name)
        file = folder / "figures.json"
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            began, worked = time.perf_counter(), time.process_time()
            figures = {
                **work(folder),
                "seconds": round(time.perf_counter() - began),
                "cpu_seconds": round(time.process_time() - worked),
            }
            atomic_write_text(file, json.dumps(figures, indent=1) + "\n")
            print(f"seed {self.seed} {name}: {json.dumps(figures)}", flush=True)
        return dict(json.loads(file.read_text(encoding="utf-8")))

    def lora(
        self, name: str, parts: tuple[str, ...], updates: int, rank: int = RANK, start: str = ""
    ) -> None:
        """Train a LoRA adapter on some parts, from a new one or from another cell's."""

        def work(folder: Path) -> dict[str, Any]:
            if not (folder / "adapter").exists():
                run = run_file(parts, folder, self.seed, updates)
                train_lora(run, rank, self.place(start) / "adapter" if start else None)
            return {"updates": updates, "rank": rank}

        self.make(name, work)

    def scored(self, name: str, group: str, split: str = "test") -> dict[str, Any]:
        """Score a cell's LoRA adapter, or the base model, on the parts of a group."""

        def work(folder: Path) -> dict[str, Any]:
            run = run_file(GROUPS[group], folder, self.seed, 1)
            base = base_model(run)
            model = base.model
            if name != "base":
                model = PeftModel.from_pretrained(model, str(self.place(name) / "adapter"))
            rows = examples(run, base.tokenizer)
            return {"nll": score(model, base.tokenizer, rows[split], GROUPS[group])}  # type: ignore[index] # a split's name

        return self.make(f"scores/{split}/{group}/{name}", work)


def single(cells: Cells) -> None:
    """Train and score the adapters of single parts."""
    for part, updates in UPDATES.items():
        cells.lora(part, (part,), updates)
        for group, parts in GROUPS.items():
            if part in parts:
                cells.scored(part, group)


def one_lora(cells: Cells) -> None:
    """Train and score one adapter on part after part, and one on all parts together."""
    for group, (first, *later) in GROUPS.items():
        done = first
        for part in later:
            start, done = done, f"{done}-then-{part}"
            cells.lora(done, (part,), UPDATES[part], start=start)
        cells.scored(done, group)
        parts = GROUPS[group]
        joint = f"joint-{group}"
        cells.lora(joint, parts, sum(UPDATES[p] for p in parts), RANK * len(parts))
        cells.scored(joint, group)


STAGES = {"single": single, "one-lora": one_lora}


def main() -> None:
    """Make the cells."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--cells", type=Path, default=Path("runs/combine"))
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    given = options.parse_args()
    torch.set_num_threads(1)
    for stage in given.stages:
        for seed in given.seeds:
            STAGES[stage](Cells(given.cells, seed))


if __name__ == "__main__":
    main()
