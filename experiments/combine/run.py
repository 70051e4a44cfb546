"""Adapters trained apart, combined by gates: beside each alone, their mean, and one LoRA for all.

    OMP_NUM_THREADS=1 python experiments/combine/run.py [--cells DIR] [--seeds 0 1 2]

Every cell is an ordinary run folder in DIR (runs/combine); a finished cell is not run again, so the
command goes on where it was stopped. When all cells of all seeds are there, results.json beside
this file is written anew; docs/scripts/combine_table.py makes the tables of docs/combine.md from
it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from rotmole.config.load import load_run
from rotmole.config.schema import RunFile
from rotmole.data import load_examples
from rotmole.evaluation.scoring import evaluating, log_likelihoods, scored_answers
from rotmole.files import atomic_write_text
from rotmole.training.build import Built
from rotmole.training.folder.layout import is_finished
from rotmole.training.run import train
from rotmole.tuner.layer import RotMoleLayer

HERE = Path(__file__).parent
RUN, RESULTS = HERE / "run.yaml", HERE / "results.json"
KINDS = ("units", "currency", "dates", "times", "lists", "numbers")
GROUPS = {"A": ("de", "fr", "es"), "B": ("it", "pt", "pl")}
SINGLES = {"de": ("de",), "es": ("es",), "pl": ("pl",)}
SETS = {"groups": GROUPS, "languages": SINGLES}
LANGUAGES = ("de", "fr", "es", "it", "pt", "pl")
UPDATES, DOUBLE = 200, ("adapter.r=24", "adapter.lora_alpha=96")


@dataclass(frozen=True)
class Cell:
    """One run: its languages, its updates, what it changes of run.yaml, and the run it goes on."""

    name: str
    languages: Sequence[str]
    updates: int = UPDATES
    settings: Sequence[str] = ()
    after: str | None = None


ADAPTERS = [Cell(name, part) for parts in SETS.values() for name, part in parts.items()]
ONE_FOR_ALL = [
    Cell("A then B", GROUPS["B"], after="A"),
    Cell("de then es", ("es",), after="de"),
    Cell("de then es then pl", ("pl",), after="de then es"),
    Cell("A and B", LANGUAGES, 2 * UPDATES, DOUBLE),
    Cell(
        "de and es and pl",
        ("de", "es", "pl"),
        3 * UPDATES,
        ("adapter.r=36", "adapter.lora_alpha=144"),
    ),
]


def folder_of(cells: Path, name: str, seed: int) -> Path:
    """Return where a cell's run lies."""
    return cells / f"{name.replace(' ', '-')}-{seed}"


def run_file(languages: Sequence[str], seed: int, folder: Path, settings: Sequence[str]) -> RunFile:
    """Return run.yaml with other languages and settings."""
    spoken = f"[{', '.join(languages)}]"
    overrides = [f"data.tasks.{kind}.languages={spoken}" for kind in KINDS]
    return load_run(RUN, [*overrides, f"seed={seed}", f"output_dir={folder}", *settings])


def score(model: nn.Module, tokenizer: Any, run: RunFile) -> dict[str, dict[str, float]]:
    """Return the mean loss of an answer, in nats a token, and the share of answers all right.

    An answer is all right if each of its tokens is the most probable one after the tokens before it.

    Returns:
        Language -> {"nll", "rows"}; rows and tokens are the same for every cell of a seed.
    """
    tasks = {
        name: task.model_copy(update={"languages": list(LANGUAGES)})
        for name, task in run.data.tasks.items()
    }
    data = run.data.model_copy(update={"tasks": tasks})
    rows = [row for part in load_examples(data, "test", seed=run.seed).values() for row in part]
    texts = scored_answers(rows, tokenizer)
    with evaluating(model):
        values = log_likelihoods(model, texts, batch_size=run.evaluation.batch_size)
    figures = {}
    for language in LANGUAGES:
        chosen = [
            (value, len(text.positions))
            for row, text, value in zip(rows, texts, values, strict=True)
            if row.group == language
        ]
        loss = -sum(value for value, _ in chosen) / sum(tokens for _, tokens in chosen)
        figures[language] = {"nll": round(loss, 5), "rows": len(chosen)}
    return figures


def go_on_from(folder: Path) -> Any:
    """Return what copies the weights of a finished run of the same shapes into a new one."""
    stored = load_file(folder / "adapter" / "adapter_model.safetensors")

    def prepare(built: Built) -> None:
        own = dict(built.model.named_parameters())
        with torch.no_grad():
            for name, value in stored.items():
                path, _, last = name.rpartition(".")
                own[f"{path}.default.{last}"].copy_(value)

    return prepare


def save_as_lora(model: Any, base: nn.Module, run: RunFile, folder: Path) -> None:
    """Save an adapter of one expert without rotation as the PEFT LoRA that it is."""
    targets = run.adapter["target_modules"]
    config = LoraConfig(
        r=run.adapter["r"], lora_alpha=run.adapter["lora_alpha"], target_modules=targets,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    layers = {n: m.experts("default") for n, m in model.get_base_model().named_modules()
              if isinstance(m, RotMoleLayer)}  # fmt: skip
    plain = model.unload()
    lora = get_peft_model(plain, config)
    with torch.no_grad():
        for name, module in lora.get_base_model().named_modules():
            if name in layers and hasattr(module, "lora_A"):
                module.lora_A["default"].weight.copy_(layers[name].expert_A[0])
                module.lora_B["default"].weight.copy_(layers[name].expert_B[0].T)
    lora.save_pretrained(folder)


def do(cell: Cell, seed: int, cells: Path) -> None:
    """Train and score a cell, unless its figures are there."""
    folder = folder_of(cells, cell.name, seed)
    figures = folder / "figures.json"
    if figures.is_file() and is_finished(folder):
        return
    settings = [f"training.max_steps={cell.updates}", *cell.settings]
    run = run_file(cell.languages, seed, folder, settings)
    started = time.perf_counter()
    prepare = go_on_from(folder_of(cells, cell.after, seed)) if cell.after else None
    result = train(run, progress=False, prepare=prepare)
    seconds = time.perf_counter() - started
    built = result.built
    scores = score(built.model, built.base.tokenizer, run)
    save_as_lora(built.model, built.base.model, run, folder / "lora")
    write(figures, cell.name, seed, scores, seconds, result.trainable_parameters, cell.updates)


def write(
    file: Path, name: str, seed: int, scores: Any, seconds: float, parameters: int, updates: int
) -> None:
    """Write a cell's figures."""
    record = {
        "cell": name, "seed": seed, "updates": updates, "trainable_parameters": parameters,
        "seconds": round(seconds, 1), "scores": scores,
    }  # fmt: skip
    atomic_write_text(file, json.dumps(record, indent=1) + "\n")
    print(name, seed, {k: v["nll"] for k, v in scores.items()}, f"{seconds:.0f} s", flush=True)


def main() -> None:
    """Run what is missing, then write results.json."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--cells", type=Path, default=HERE.parents[1] / "runs" / "combine")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = options.parse_args()
    for seed in given.seeds:
        for cell in ADAPTERS:
            do(cell, seed, given.cells.resolve())
    for seed in given.seeds:
        for cell in ONE_FOR_ALL:
            do(cell, seed, given.cells.resolve())


if __name__ == "__main__":
    main()
