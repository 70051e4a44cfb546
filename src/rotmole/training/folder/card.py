"""The adapter's model card: how to load it, what it is, the figures of its run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rotmole import __version__
from rotmole.config.schema import RunFile
from rotmole.models.builtin import built_in_named


def model_card(run: RunFile, note: str | None, figures: Mapping[str, Any]) -> str:
    """Write the adapter's README: how to load it, what it is, the run's figures.

    Args:
        run: the run.
        note: a line about the base model that belongs beside every figure, or None.
        figures: name -> value, in order.

    Returns:
        Markdown that starts with the import without which PEFT does not know the adapter.
    """
    settings = ", ".join(f"{key} {value}" for key, value in run.adapter.items()) or "defaults"
    rows = "\n".join(f"| {name} | {_figure(value)} |" for name, value in figures.items())
    return f"""```python
import rotmole
{_loading_code(run)}
```

`import rotmole` registers the method with PEFT; without it PEFT cannot read this adapter.

# RotMoLE adapter for {run.model.name}

A mixture of low-rank experts gated by scaling and rotation. Settings: {settings}.
Trained on: {", ".join(run.data.tasks)}. Seed {run.seed}; rotmole {__version__}.
{f"Base model: {note}." if note else ""}

| figure | value |
|---|---|
{rows}

One seed decides nothing: another seed may give figures that differ by more than two methods do.
"""


def _loading_code(run: RunFile) -> str:
    name = run.model.name
    folder = str(Path(run.output_dir, "adapter"))
    if built_in_named(name) or name.lower().endswith(".gguf"):  # transformers alone cannot
        return (
            "from peft import PeftModel\n"
            "from rotmole.config.schema import ModelSection\n"
            "from rotmole.models.load import load_model\n\n"
            f"base = load_model(ModelSection(name={name!r}))\n"
            f"model, tokenizer = PeftModel.from_pretrained(base.model, {folder!r}), base.tokenizer"
        )
    return (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained({name!r})\n"
        f"base = AutoModelForCausalLM.from_pretrained({name!r})\n"
        f"model = PeftModel.from_pretrained(base, {folder!r})"
    )


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
