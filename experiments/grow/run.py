"""Learn de, fr, es, then pl: a grown mixture beside one LoRA trained on and a joint run.

    OMP_NUM_THREADS=1 python experiments/grow/run.py [--cells DIR] [--seeds 0 1 2]

Every cell is an ordinary run folder in DIR (runs/grow); a finished cell is not run again, so the
command goes on where it was stopped. Each is also scored on text that no task has to do with, and
so is the base model. Then results.json beside this file is written anew from the
cells that are there; docs/scripts/grow_table.py makes the table of docs/grow.md from it.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from rotmole.cli.grow import grow
from rotmole.config.load import load_run
from rotmole.config.schema import RunFile
from rotmole.data import Example, load_examples
from rotmole.evaluation.scoring import scored_answers
from rotmole.evaluation.target import find_target, load_target
from rotmole.export.text import general_passages, tokenised
from rotmole.files import atomic_write_text
from rotmole.models.load import load_model
from rotmole.training.folder.layout import is_finished
from rotmole.training.run import train

HERE = Path(__file__).parent
RUN, RESULTS = HERE / "run.yaml", HERE / "results.json"
KINDS = ("units", "currency", "dates", "times", "lists", "numbers")
FIRST, ADDED = ("de", "fr", "es"), ("pl",)
LORA = ("adapter.num_experts=1", "adapter.top_k=1", "adapter.r=16", "adapter.lora_alpha=64")
"""One LoRA with as many ranks as the mixture's four experts have together, at the same scale."""
BATCH = 24


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        name: of its folders and in the table.
        languages: what it is trained on.
        updates: how often.
        settings: what it changes of run.yaml.
        start: the cell whose adapter it goes on with; None begins anew.
        grows: experts that each layer gets before.
        freezes: what is kept of the old mixture.
        replays: old rows of each kind and first language among the new ones.
    """

    name: str
    languages: Sequence[str]
    updates: int
    settings: Sequence[str] = ()
    start: str | None = None
    grows: int = 0
    freezes: Sequence[str] = ()
    replays: int = 0


ALL = FIRST + ADDED
CELLS = (
    Cell("mixture", FIRST, 100),
    Cell("lora", FIRST, 100, LORA),
    Cell("grown-frozen", ADDED, 50, start="mixture", grows=2, freezes=("experts", "router")),
    Cell("lora-on", ADDED, 50, start="lora"),
    Cell("joint-lora", ALL, 150, LORA),
    Cell(
        "grown-replay",
        ADDED,
        50,
        start="mixture",
        grows=2,
        freezes=("experts", "router"),
        replays=10,
    ),
    Cell("lora-replay", ADDED, 50, start="lora", replays=10),
)


def run_file(cell: Cell, seed: int, folder: Path) -> RunFile:
    """Return the run file of a cell; the adapter that it starts from is made if it is not there."""
    spoken = f"[{', '.join(cell.languages)}]"
    overrides = [f"data.tasks.{kind}.languages={spoken}" for kind in KINDS]
    overrides += [f"training.max_steps={cell.updates}", f"seed={seed}", f"output_dir={folder}"]
    if cell.replays:  # the first rows of those that were trained on before
        rows = f"languages: [{', '.join(FIRST)}], limit: {{train: {cell.replays}}}"
        overrides += [
            f"data.tasks.{kind}_old={{source: locale, kind: {kind}, {rows}}}" for kind in KINDS
        ]
    if cell.start is not None:
        start = folder.with_name(f"{cell.start}-{seed}")
        if cell.grows:
            source, start = start, folder.with_name(f"{cell.name}-{seed}-start")
            if not start.is_dir():
                grow(source, cell.grows, start, freeze_old=cell.freezes, seed=seed)
        overrides += ["adapter={}", f"init_from={start}"]
    return load_run(RUN, [*overrides, *cell.settings])


def test_rows(run: RunFile) -> dict[str, list[Example]]:
    """Return the test rows of all four languages, the same for every cell of a seed."""
    tasks = {name: run.data.tasks[name].model_copy(update={"languages": [*ALL]}) for name in KINDS}
    data = run.data.model_copy(update={"tasks": tasks})
    rows = load_examples(data, "test", seed=run.seed)
    return {task: list(examples) for task, examples in rows.items()}


@torch.no_grad()
def score(model: Any, tokenizer: Any, run: RunFile) -> dict[str, dict[str, float]]:
    """Return each language's share of exact answers and its loss in nats a token.

    An answer is exact if each of its tokens, the end included, is the most probable one after the
    right ones before it: then greedy decoding writes that answer.
    """
    rows = [row for examples in test_rows(run).values() for row in examples]
    texts = scored_answers(rows, tokenizer)
    order = sorted(range(len(rows)), key=lambda i: len(texts[i].tokens))
    sums: dict[str, list[float]] = {language: [0.0, 0.0, 0.0, 0.0] for language in ALL}
    model.eval()
    for start in range(0, len(order), BATCH):
        batch = [texts[i] for i in order[start : start + BATCH]]
        longest = max(len(text.tokens) for text in batch)
        ids, mask = torch.zeros(2, len(batch), longest, dtype=torch.long)
        for n, text in enumerate(batch):
            ids[n, : len(text.tokens)] = torch.tensor(text.tokens)
            mask[n, : len(text.tokens)] = 1
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        for n, text in enumerate(batch):
            places = torch.tensor(text.positions)
            said, right = logits[n, places - 1], ids[n, places]
            exact = bool((said.argmax(-1) == right).all())
            nll = float(cross_entropy(said, right, reduction="sum"))
            group = rows[order[start + n]].group
            new = (1, exact, nll, len(places))
            sums[group] = [old + more for old, more in zip(sums[group], new, strict=True)]
    return {
        language: {"exact_match": exact / count, "nll": nll / tokens, "rows": count}
        for language, (count, exact, nll, tokens) in sums.items()
    }


def do(cell: Cell, seed: int, cells: Path) -> None:
    """Train and score a cell, unless its figures are there."""
    folder = cells / f"{cell.name}-{seed}"
    figures = folder / "figures.json"
    if figures.is_file() and is_finished(folder):
        return
    run = run_file(cell, seed, folder)
    started = time.perf_counter()
    result = train(run, progress=False, resume="auto")
    if result.interrupted is not None:
        raise SystemExit(f"stopped in {folder}; run the command again to go on")
    built = result.built
    seconds = time.perf_counter() - started
    scores = score(built.model, built.base.tokenizer, run)
    record = {
        "cell": cell.name,
        "seed": seed,
        "languages": list(cell.languages),
        "updates": cell.updates,
        "trainable_parameters": result.trainable_parameters,
        "seconds": round(seconds, 1),
        "scores": scores,
    }
    atomic_write_text(figures, json.dumps(record, indent=1) + "\n")
    short = {k: (round(v["exact_match"], 3), round(v["nll"], 4)) for k, v in scores.items()}
    print(cell.name, seed, short, f"{seconds:.0f} s", flush=True)


@torch.no_grad()
def text_nll(model: Any, tokenizer: Any) -> float:
    """Return the loss in nats a token of the passages that come with the package."""
    nll, tokens = 0.0, 0
    for row in tokenised(general_passages(), tokenizer):
        ids = torch.tensor([row])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        nll += float(cross_entropy(logits, ids[0, 1:], reduction="sum"))
        tokens += len(row) - 1
    return nll / tokens


def score_text(cells: Path, seeds: Sequence[int]) -> None:
    """Score the base model and every finished cell on text, unless its text.json is there."""
    folders = [cells / f"{cell.name}-{seed}" for cell in CELLS for seed in seeds]
    (cells / "base").mkdir(exist_ok=True)
    for folder in [cells / "base", *filter(is_finished, folders)]:
        if (folder / "text.json").is_file():
            continue
        if folder.name == "base":
            loaded = load_model(load_run(RUN).model)
            loaded.model.eval()
        else:
            loaded = load_target(find_target(folder, needs_data=False))
        nll = text_nll(loaded.model, loaded.tokenizer)
        atomic_write_text(folder / "text.json", json.dumps({"nll": nll}) + "\n")
        print(folder.name, f"text {nll:.4f} nats a token", flush=True)


def collect(cells: Path, seeds: Sequence[int]) -> None:
    """Write results.json from the figures that are there."""
    records = []
    for folder in [cells / f"{cell.name}-{seed}" for cell in CELLS for seed in seeds]:
        if (folder / "figures.json").is_file():
            record = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
            text = json.loads((folder / "text.json").read_text(encoding="utf-8"))
            records.append({**record, "text_nll": text["nll"]})
    base = json.loads((cells / "base" / "text.json").read_text(encoding="utf-8"))
    packages = ("rotmole", "torch", "transformers", "peft", "babel", "num2words")
    made_with = {name: version(name) for name in packages} | {"machine": platform.machine()}
    content = {"made_with": made_with, "base_text_nll": base["nll"], "cells": records}
    atomic_write_text(RESULTS, json.dumps(content, indent=1) + "\n")


def main() -> None:
    """Run what is missing, then write results.json."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--cells", type=Path, default=HERE.parents[1] / "runs" / "grow")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--only", nargs="*", metavar="CELL", help="run these cells; none at all")
    given = options.parse_args()
    for seed in given.seeds:
        for cell in CELLS:
            if given.only is None or cell.name in given.only:
                do(cell, seed, given.cells.resolve())
    score_text(given.cells.resolve(), given.seeds)
    collect(given.cells.resolve(), given.seeds)


if __name__ == "__main__":
    main()
