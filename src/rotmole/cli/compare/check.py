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
from rotmole.comparison.cells import check_metrics
from rotmole.comparison.cost import flops_per_token
from rotmole.comparison.grid import trials
from rotmole.comparison.plan import make_plan
from rotmole.comparison.shared import SharedSources
from rotmole.comparison.study import Study, load_study
from rotmole.config.load import sft_arguments
from rotmole.config.schema import RunFile
from rotmole.config.training import count_updates
from rotmole.data.encode import IGNORED
from rotmole.data.sources import together
from rotmole.errors import DataError
from rotmole.evaluation.render import print_lines
from rotmole.evaluation.render import print_table as print_lines_of
from rotmole.models.duration import estimate_update, measured_speed, typical_widths
from rotmole.models.load import has_weights, load_tokenizer
from rotmole.models.memory import UnknownCostError, estimate_memory, resident_bytes
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
        update: seconds of an update, measured, or estimated for a model without weights; None if
            it is not known.
        cell: seconds of a cell, None if it is not known.
        memory: bytes at its peak, an estimate; None if it is not known.
        operations: floating-point operations of a cell's training; None if they are not known.
    """

    cells: int
    updates: int
    tokens: int
    update: float | None
    cell: float | None
    memory: int | None
    operations: float | None


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
    measured = has_weights(study.model)
    prices = {}
    for method in study.file.methods:
        what = f"measuring {UPDATES} updates" if measured else "estimating an update"
        note(f"{what} of {method}")
        prices[method] = price_of(study, method, loaded, sources if measured else None)
    _print_prices(prices, measured)
    print(f"no mistakes found in {path}")
    return 0


def study_rows(study: Study, *, held_out: bool = False) -> tuple[list[Rows], list[DataError], Any]:
    """Return the rows of a study, the faults of its files and rows, and its tokenizer.

    Args:
        held_out: those of the tasks that no cell trains on.
    """
    run = study.run_of(study.file.baseline, seed=study.file.first_seed, held_out=held_out)
    model = preview(
        run.model, run.adapter_config, torch.float32, trust_remote_code=study.trust_remote_code
    )
    tokenizer = load_tokenizer(run.model, trust_remote_code=study.trust_remote_code)
    loaded, faults = load_rows(run, model, tokenizer, sft_arguments(run).get("max_length"))
    return loaded, faults, tokenizer


def _print_rows(study: Study) -> list[Rows]:
    loaded, faults, tokenizer = study_rows(study)
    unseen: list[Rows] = []
    if study.file.held_out:
        rows, more, _ = study_rows(study, held_out=True)
        unseen, faults = [r for r in rows if r.split == study.file.split], faults + more
    print_rows([*loaded, *unseen], tokenizer)
    if faults:
        raise together(faults)
    for split in ("train", study.file.split):
        if not any(rows.split == split for rows in loaded):
            raise DataError(
                f"no task has a row in its {split} split; name files: {{{split}: ...}}."
            )
    if study.file.held_out and not unseen:
        raise DataError(f"no task of held_out has a row in its {study.file.split} split.")
    run = study.run_of(study.file.baseline, seed=study.file.first_seed)
    scored = {rows.task: rows.examples for rows in loaded if rows.split == study.file.split}
    check_metrics(study, run, scored)
    return loaded


def price_of(
    study: Study, method: str, loaded: Sequence[Rows], sources: SharedSources | None
) -> Price:
    """Train a few updates of a method in a folder that is removed, and count the rest.

    Args:
        loaded: of `study_rows`.
        sources: None for a model without weights: an update is estimated from its operations.
    """
    run = study.run_of(method, seed=study.file.first_seed)
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
    try:
        memory = _memory(study, run, loaded)
        seconds = None if sources else _estimated_update(study, run, loaded)
    except UnknownCostError:
        memory, seconds = None, None
    if sources is not None:
        seconds = _seconds_an_update(study, method, sources)
    cell = None
    if seconds is not None:
        # a forward pass takes about half of an update that leaves the base's weights out
        each = seconds / 2 / (batch * mean)
        every = settings.get("eval_steps") or 1
        times = updates // (max(updates * every, 1) if every < 1 else every)
        scored = times * sum(lengths["validation"]) + sum(lengths[study.file.split])
        cell = updates * seconds + each * scored
    tuning = 0
    if study.file.tune is not None:
        tried = trials(study.adapter_of(method), study.file.tune.grid)
        tuning = len(tried) * len(study.file.tune.seeds)
    tokens = updates * batch * mean
    operations = flops_per_token(run, _columns(loaded))
    return Price(
        cells=tuning + len(study.file.seeds),
        updates=updates,
        tokens=round(tokens),
        update=seconds,
        cell=cell,
        memory=memory,
        operations=None if operations is None else operations * tokens,
    )


def _columns(loaded: Sequence[Rows]) -> dict[str, list[list[int]]]:
    rows = [row for part in loaded if part.split == "train" for row in part.encoded]
    return {name: [row[name] for row in rows] for name in ("input_ids", "labels")}


def _memory(study: Study, run: RunFile, loaded: Sequence[Rows]) -> int:
    """Return the bytes of a run at its peak: on the CPU all of the process, else the device's."""
    settings, device = sft_arguments(run), choose_device(run.model)
    memory = estimate_memory(
        _without_weights(study, run),
        batch=settings["per_device_train_batch_size"],
        length=max(_lengths(loaded, "train")),
        settings=settings,
        process=resident_bytes(),
        quantization=run.model.quantization,
    )
    return memory.total if device.type == "cpu" else memory.total - memory.process


def _estimated_update(study: Study, run: RunFile, loaded: Sequence[Rows]) -> float:
    """Return the seconds of an update on this machine, from its operations."""
    settings, columns = sft_arguments(run), _columns(loaded)
    model, device = _without_weights(study, run), choose_device(run.model)
    batch, count = settings["per_device_train_batch_size"], len(columns["labels"])
    mean = max(round(sum(map(len, columns["input_ids"])) / count), 1)
    learnt = sum(label != IGNORED for labels in columns["labels"] for label in labels) / count
    dtype, widths = choose_dtype(run.model, device), typical_widths(model)
    names = ("activation_checkpointing", "gradient_checkpointing")
    seconds = estimate_update(
        model,
        measured_speed(device, dtype, rows=batch * mean, widths=widths),
        batch=batch,
        length=mean,
        learnt=batch * learnt,
        checkpointing=any(settings.get(name) for name in names),
    )
    return seconds * int(settings.get("gradient_accumulation_steps", 1))


def _without_weights(study: Study, run: RunFile) -> Any:
    dtype = choose_dtype(run.model, choose_device(run.model))
    return preview(run.model, run.adapter_config, dtype, trust_remote_code=study.trust_remote_code)


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


def _print_prices(prices: dict[str, Price], measured: bool) -> None:
    lines = [["method", "cells", "updates", "tokens", "s/update", "a cell", "all cells", "memory"]]
    for method, price in prices.items():
        cell = None if price.cell is None else duration(max(price.cell, 1))
        whole = None if price.cell is None else duration(max(price.cell * price.cells, 1))
        memory = None if price.memory is None else decimal(price.memory, precision=1)
        update = None if price.update is None else f"{price.update:.3g}"
        figures = [str(price.cells), f"{price.updates:,}", f"{price.tokens:,}"]
        lines.append([method, *figures, *(text or "-" for text in (update, cell, whole, memory))])
    print_lines_of(lines)
    known = [price for price in prices.values() if price.cell is not None]
    cells = sum(price.cells for price in known)
    seconds = sum(price.cell * price.cells for price in known if price.cell is not None)
    print(
        f"price       about {seconds / 3600:.2g} hours for {cells} cells in one process "
        f"({torch.get_num_threads()} threads); --jobs N divides it"
    )
    source = f"from {UPDATES} measured updates of each method"
    if not measured:
        source = "no weights here, so from the operations of an update and a short measurement"
    print_lines([f"            ({source}; a grid that grows adds)"])
    counted = [p.operations * p.cells for p in prices.values() if p.operations is not None]
    print_lines(
        [
            f"            {sum(counted):.2g} operations in training: {sum(counted) / 3.6e17:.2g} "
            "hours where 100 of 10^12 are done in a second, checkpointing left out"
        ]
    )
    unknown = [name for name, price in prices.items() if price.operations is None]
    if unknown:
        print_lines(
            [
                f"            {', '.join(unknown)}: the operations depend on values, so memory and "
                "operations are not known before training"
            ]
        )
