"""Count what the published studies cost, from the widths of their models; nothing is trained.

    python experiments/published/price.py DATA      writes price.json beside this file

DATA has the rows that the study files name. Texts are counted with the tokenizer of the built-in
model, which needs about as many tokens for English as those of the models do.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from widths import write_folders

from rotmole.cli.compare.check import price_of, study_rows
from rotmole.comparison.study import load_study
from rotmole.config.schema import ModelSection
from rotmole.models.load import load_tokenizer

HERE = Path(__file__).parent


def price(study_file: Path, model: Path, data: str) -> dict[str, Any]:
    """Return what each method of a study costs: cells, updates, tokens, operations, bytes."""
    study = load_study(study_file, [f"model.name={model}", f"data.root={data}"])
    loaded, faults, _ = study_rows(study)
    if faults:
        raise faults[0]
    found = {}
    for method, sized in study.sized.items():
        print(f"{study_file.stem}: {method}", flush=True)
        cost = price_of(study, method, loaded, None)
        found[method] = {
            "parameters": sized.parameters,
            "cells": cost.cells,
            "updates": cost.updates,
            "tokens": cost.tokens,
            "operations": cost.operations,
            "memory": cost.memory,
        }
    return {"model": model.name, "methods": found}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as root:
        tokenizer = load_tokenizer(ModelSection(name="smollm2-135m"))
        content = {
            name: price(HERE / f"{name}.yaml", folder, sys.argv[1])
            for name, folder in write_folders(Path(root), tokenizer).items()
        }
    file = HERE / "price.json"
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"written: {file}")
