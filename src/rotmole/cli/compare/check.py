"""``rotmole check STUDY.yaml``: all mistakes of a study and its rows, and the price of a method."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal

from rotmole.cli.compare.table import method_lines, rounding_lines, stage_lines
from rotmole.cli.rows import Rows, load_rows, print_rows
from rotmole.cli.screen import note
from rotmole.comparison.plan import make_plan
from rotmole.comparison.shared import SharedSources
from rotmole.comparison.study import Study, load_study
from rotmole.config.load import sft_arguments
from rotmole.config.training import count_updates
from rotmole.data.sources import together
from rotmole.errors import DataError
from rotmole.evaluation.render import print_lines
from rotmole.evaluation.render import print_table as print_lines_of
from rotmole.models.load import load_tokenizer
from rotmole.models.memory import estimate_memory, resident_bytes
from rotmole.models.precision import choose_device, choose_dtype
from rotmole.models.preview import preview
from rotmole.training.callbacks.metrics import read_metrics
from rotmole.training.folder.layout import METRICS
from rotmole.training.run import train
from rotmole.units import duration

UPDATES = 4
"""Updates of each method that are measured; the first one does work that is done once."""


@dataclass(frozen=True)
class Price:
    """What the cells of one method cost.

    Attributes:
        cells: their number, tuning included.
        updates: of a cell.
        tokens: that a cell is trained on.
        update: measured seconds of an update.
        cell: seconds of a cell.
        memory: bytes at its peak, an estimate.
    """

    cells: int
    updates: int
    tokens: int
    update: float
    cell: float
    memory: int


def check_study(path: Path, overrides: Sequence[str], *, trust_remote_code: bool = False) -> int:
    """Check a study file, then its rows; measure an update of each method; print the price.

    Raises:
        ConfigError: holding every problem of the file.
        DataError: holding every problem of all files and rows.
    """
    study = load_study(path, overrides, trust_remote_code=trust_remote_code, say=note)
    print(f"base        {study.model.name}")
    print_lines_of(method_lines(study))
    print_lines(rounding_lines(study))
    for line in stage_lines(study, make_plan(study)):
        print(line)
    loaded = _print_rows(study)
    if study.file.threads is not None:
        torch.set_num_threads(study.file.threads)
    sources = SharedSources(trust_remote_code=trust_remote_code)
    prices = {}
    for method in study.file.methods:
        note(f"measuring {UPDATES} updates of {method}")
        prices[method] = _price(study, method, loaded, sources)
    _print_prices(study, prices)
    print(f"no mistakes found in {path}")
    return 0


def _print_rows(study: Study) -> list[Rows]:
    run = study.run_of(study.file.baseline, seed=study.file.seeds[0])
    model = preview(
        run.model, run.adapter_config, torch.float32, trust_remote_code=study.trust_remote_code
    )
    tokenizer = load_tokenizer(run.model, trust_remote_code=study.trust_remote_code)
    loaded, faults = load_rows(run, model, tokenizer, sft_arguments(run).get("max_length"))
    print_rows(loaded, tokenizer)
    if faults:
        raise together(faults)
    for split in ("train", study.file.split):
        if not any(rows.split == split for rows in loaded):
            raise DataError(
                f"no task has a row in its {split} split; name files: {{{split}: ...}}."
            )
    return loaded


def _price(study: Study, method: str, loaded: Sequence[Rows], sources: SharedSources) -> Price:
    """Train a few updates of a method in a folder that is removed, and count the rest."""
    run = study.run_of(method, seed=study.file.seeds[0])
    settings = sft_arguments(run)
    lengths = {
        split: _lengths(loaded, split) for split in ("train", "validation", study.file.split)
    }
    batch = settings["per_device_train_batch_size"] * settings.get("gradient_accumulation_steps", 1)
    updates = count_updates(
        len(lengths["train"]),
        batch=settings["per_device_train_batch_size"],
        accumulation=settings.get("gradient_accumulation_steps", 1),
        epochs=settings["num_train_epochs"],
        max_steps=settings.get("max_steps", -1),
        drop_last=bool(settings.get("dataloader_drop_last")),
    )
    mean = sum(lengths["train"]) / len(lengths["train"])
    seconds = _seconds_an_update(study, method, sources)
    # a forward pass takes about half of an update that leaves the base's weights out
    each = seconds / 2 / (batch * mean)
    every = settings.get("eval_steps") or 1
    times = updates // (max(updates * every, 1) if every < 1 else every)
    validation = times * each * sum(lengths["validation"])
    scoring = each * sum(lengths[study.file.split])
    trials = len(study.trials(method, study.file.tune.grid)) if study.file.tune else 0
    tuning = trials * len(study.file.tune.seeds) if study.file.tune else 0
    device = choose_device(run.model)
    model = preview(
        run.model, run.adapter_config, choose_dtype(run.model, device),
        trust_remote_code=study.trust_remote_code,
    )  # fmt: skip
    memory = estimate_memory(
        model,
        batch=settings["per_device_train_batch_size"],
        length=max(lengths["train"]),
        settings=settings,
        process=resident_bytes(),
        quantization=run.model.quantization,
    )
    return Price(
        cells=tuning + len(study.file.seeds),
        updates=updates,
        tokens=round(updates * batch * mean),
        update=seconds,
        cell=updates * seconds + validation + scoring,
        memory=memory.total if device.type == "cpu" else memory.total - memory.process,
    )


def _lengths(loaded: Sequence[Rows], split: str) -> list[int]:
    return [len(e["input_ids"]) for rows in loaded if rows.split == split for e in rows.encoded]


def _seconds_an_update(study: Study, method: str, sources: SharedSources) -> float:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        short = {"max_steps": UPDATES, "logging_steps": 1, "eval_strategy": "no",
                 "save_strategy": "no", "report_to": "none"}  # fmt: skip
        settings: Any = {f"training.{name}": value for name, value in short.items()}
        run = study.run_of(method, settings=settings, folder=Path(folder) / "run")
        root = logging.getLogger("rotmole")
        level = root.level
        root.setLevel(logging.ERROR)
        try:
            train(run, sources=sources, progress=False)
        finally:
            root.setLevel(level)
        rows = [row for row in read_metrics(Path(folder) / "run" / METRICS) if "loss" in row]
    times = [row["train_seconds"] for row in rows]
    return float((times[-1] - times[0]) / max(len(times) - 1, 1))


def _print_prices(study: Study, prices: dict[str, Price]) -> None:
    lines = [["method", "cells", "updates", "tokens", "s/update", "a cell", "all cells", "memory"]]
    for method, price in prices.items():
        lines.append(
            [
                method,
                str(price.cells),
                f"{price.updates:,}",
                f"{price.tokens:,}",
                f"{price.update:.3g}",
                duration(max(price.cell, 1)),
                duration(max(price.cell * price.cells, 1)),
                decimal(price.memory, precision=1),
            ]
        )
    print_lines_of(lines)
    whole = sum(price.cell * price.cells for price in prices.values())
    cells = sum(price.cells for price in prices.values())
    print(
        f"price       about {whole / 3600:.2g} hours for {cells} cells in one process "
        f"({torch.get_num_threads()} threads); --jobs N divides it"
    )
    print(f"            (from {UPDATES} measured updates of each method; a grid that grows adds)")
