"""The adapter's model card: how to load it, what it is, the figures of its run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rotmole import __version__
from rotmole.config.schema import RunFile
from rotmole.models.builtin import built_in_named
from rotmole.tuner.card import adapter_card, shown_name


def model_card(run: RunFile, note: str | None, figures: Mapping[str, str]) -> str:
    """Write the adapter's README: how to load it, what it is, the run's figures.

    Args:
        run: the run.
        note: a line about the base model that belongs beside every figure, or None.
        figures: what -> figure in words, in order.

    Returns:
        Markdown with the hub's header; it names no folder of this machine.
    """
    built_in = built_in_named(run.model.name)
    place = Path(run.model.name)
    base = str(place.resolve()) if place.exists() else run.model.name
    if built_in:
        base = built_in.hub_id
    tasks = run.data.tasks
    data = ", ".join(
        f"{name} ({task.dataset})" if task.dataset else name for name, task in tasks.items()
    )
    datasets = sorted({task.dataset for task in tasks.values() if task.dataset})
    settings = ", ".join(f"{key} {value}" for key, value in run.adapter.items()) or "defaults"
    rows = "\n".join(f"| {name.strip()} | {value} |" for name, value in figures.items())
    remark = f"\nBase model: {note}.\n" if note else ""
    return adapter_card(
        base,
        code=_loading_code(run),
        datasets=datasets,
        other=run.adapter.get("peft_type"),
        text=f"""
Settings: {settings}.
Trained on: {data}. Seed {run.seed}; rotmole {__version__}.
{remark}
| figure | value |
|---|---|
{rows}

One seed decides nothing: another seed may give figures that differ by more than two methods do.
""",
    )


def _loading_code(run: RunFile) -> str | None:
    """Return the code for models that transformers alone cannot load as they were trained on."""
    name = run.model.name
    if not built_in_named(name) and not name.lower().endswith(".gguf"):
        return None
    where = "  # the file" if name.lower().endswith(".gguf") else ""
    first = "" if "peft_type" in run.adapter else "import rotmole\n"
    return f"""{first}from peft import PeftModel
from rotmole.config.schema import ModelSection
from rotmole.models.load import load_model

base = load_model(ModelSection(name="{shown_name(name)}")){where}
adapter = "path/to/this/folder"  # or its hub id
model, tokenizer = PeftModel.from_pretrained(base.model, adapter), base.tokenizer
"""
