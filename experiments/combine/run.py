"""Combine trained adapters: each alone, their mean, one LoRA for all, and gates.

    OMP_NUM_THREADS=1 nice python experiments/combine/run.py [--cells DIR] [--seeds 0 1 2]

Every cell has a folder with figures.json; a cell that has one is not made again, so the command
goes on where it was stopped. results.json beside this file is written of all that are there, and
docs/scripts/combine_tables.py makes the tables of docs/combine.md of it.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from parts import (
    GROUPS,
    KINDS,
    LENGTH,
    PARTS,
    RANK,
    RATE,
    ROWS,
    SCORED,
    UPDATES,
    base_model,
    examples,
    run_file,
    score,
    train_lora,
)
from peft import PeftModel
from routing import routing
from settings import FINAL, SEARCH

from rotmole.evaluation.shares import shares_by_task
from rotmole.files import atomic_write_text
from rotmole.training.run import train

RESULTS = Path(__file__).with_name("results.json")


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

    def gates(
        self, name: str, group: str, rows: int, settings: Mapping[str, Any], split: str = "test"
    ) -> dict[str, Any]:
        """Train the gates of a group's adapters on some rows of each part, and score the mixture.

        The run is what `rotmole combine` makes; its prompts and its router know no part.
        """
        parts = GROUPS[group]

        def work(folder: Path) -> dict[str, Any]:
            paths = [str(self.place(part) / "adapter") for part in parts]
            experts = {"paths": paths, "names": list(parts)}
            more = {**settings, "experts_from": {**experts, **settings.get("experts_from", {})}}
            updates = more.get("training", {}).get("max_steps", 0)
            run = run_file(parts, folder / "run", self.seed, updates, rows=rows, more=more)
            result = train(run, progress=False)
            if result.interrupted is not None:
                sys.exit(128 + result.interrupted)
            built = result.built
            known = built.examples[split]  # type: ignore[index] # a split's name
            return {
                "rows": rows, "settings": settings,
                "trainable_parameters": result.trainable_parameters,
                "nll": score(built.model, built.base.tokenizer, known, parts),
                "shares": {
                    part: shares_by_task(
                        built.model, built.base.tokenizer,
                        {part: [row for kind in KINDS for row in known[f"{part}-{kind}"][:4]]},
                        batch_size=24, max_length=LENGTH,
                    )[part]
                    for part in parts
                },
            }  # fmt: skip

        return self.make(f"gates-{split}/{group}/{rows}/{name}", work)

    def mean(self, group: str, split: str = "test") -> dict[str, Any]:
        """Score the mean of a group's adapters, made by PEFT's add_weighted_adapter."""
        parts = GROUPS[group]

        def work(folder: Path) -> dict[str, Any]:
            run = run_file(parts, folder, self.seed, 1)
            base = base_model(run)
            model: Any = None
            for part in parts:
                path = str(self.place(part) / "adapter")
                if model is None:
                    model = PeftModel.from_pretrained(base.model, path, adapter_name=part)
                else:
                    model.load_adapter(path, adapter_name=part)
            weights = [1 / len(parts)] * len(parts)
            model.add_weighted_adapter(list(parts), weights, "mean", combination_type="cat")
            model.set_adapter("mean")
            rows = examples(run, base.tokenizer)[split]  # type: ignore[index] # a split's name
            return {"nll": score(model, base.tokenizer, rows, parts)}

        return self.make(f"scores/{split}/{group}/mean", work)


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


def search(cells: Cells) -> None:
    """Try settings of the gates, on validation rows; one seed."""
    for part in GROUPS["A+B"]:
        cells.scored(part, "A+B", "validation")
    cells.mean("A+B", "validation")
    for name, settings in SEARCH.items():
        cells.gates(name, "A+B", 360, settings, split="validation")


def look(cells: Cells) -> None:
    """Score routers that are fitted to know the part, on validation rows; one seed."""

    def work(folder: Path) -> dict[str, Any]:
        return {"ways": dict(routing(cells.place, GROUPS["A+B"], cells.seed, folder))}

    cells.make("routing/A+B", work)


def combined(cells: Cells) -> None:
    """Combine with the settings that were chosen, and score the mean of the adapters."""
    final(cells, "all parameters")
    for group in GROUPS:
        cells.mean(group)


def gates(cells: Cells) -> None:
    """Combine with the experts as they are: the gates alone are trained."""
    final(cells, "gates")


def experts(cells: Cells) -> None:
    """Combine with gates that are not trained: what comes from training on, and not from gates."""
    final(cells, "experts")


def final(cells: Cells, name: str) -> None:
    """Train and score one of the final settings on every group and number of rows."""
    for group in GROUPS:
        for rows, settings in FINAL[name].items():
            cells.gates(name, group, rows, settings)


def results(folder: Path) -> dict[str, Any]:
    """Collect the figures of all cells that are there."""
    cells: dict[str, Any] = {}
    for file in sorted(folder.glob("seed*/**/figures.json")):
        name = file.parent.relative_to(folder)
        if "run" not in name.parts:
            cells[str(name)] = json.loads(file.read_text(encoding="utf-8"))
    packages = ("rotmole", "torch", "transformers", "peft")
    return {
        "made_with": {
            **{package: version(package) for package in packages},
            "machine": platform.machine(), "threads": torch.get_num_threads(),
        },
        "updates": UPDATES, "rank": RANK, "learning_rate": RATE, "kinds": KINDS,
        "train_rows": ROWS, "scored_rows": SCORED, "parts": PARTS, "groups": GROUPS,
        "cells": cells,
    }  # fmt: skip


STAGES = {
    "single": single,
    "search": search,
    "look": look,
    "combine": combined,
    "gates": gates,
    "experts": experts,
    "one-lora": one_lora,
}
ONE_SEED = ("search", "look")


def main() -> None:
    """Make the cells."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--cells", type=Path, default=Path("runs/combine"))
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument(
        "--stages", nargs="*", choices=STAGES, default=list(STAGES),
        help="none: only write results.json of the cells that are there",
    )  # fmt: skip
    given = options.parse_args()
    torch.set_num_threads(1)
    for stage in given.stages:
        for seed in given.seeds[:1] if stage in ONE_SEED else given.seeds:
            STAGES[stage](Cells(given.cells, seed))
    text = json.dumps(results(given.cells), indent=1) + "\n"
    atomic_write_text(RESULTS, text)


if __name__ == "__main__":
    main()
