"""The papers of a run: manifest.json, and the adapter's model card."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from rotmole import __version__
from rotmole.config.schema import RunFile
from rotmole.models.builtin import built_in_named

PACKAGES = (
    "torch",
    "peft",
    "transformers",
    "trl",
    "accelerate",
    "datasets",
    "safetensors",
    "tokenizers",
    "babel",
    "num2words",
)

_FIGURES = (
    "train_loss", "train_tokens_per_second", "num_input_tokens_seen", "peak_memory_bytes",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Return the versions of rotmole, Python and the packages a run depends on."""
    found = {"rotmole": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Return what decides speed and the last bits: platform, cores, threads, devices."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": devices,
    }


def git_commit(folder: Path | None = None) -> str | None:
    """Return the commit of the git repository around a folder.

    Args:
        folder: None is the current one.

    Returns:
        The hash, followed by "+changes" where tracked files differ; None outside a repository.

    Source: our choice.
    """
    try:
        commit = _git("rev-parse", "HEAD", folder=folder)
        changes = _git("status", "--porcelain", "--untracked-files=no", folder=folder)
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+changes" if changes else commit


def _git(*arguments: str, folder: Path | None) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()


def earlier_resumes(path: Path) -> list[dict[str, Any]]:
    """Read from a run's manifest how often it was resumed; a missing or broken one tells nothing.

    Args:
        path: manifest.json.

    Returns:
        {"from": checkpoint, "changes": [...]} for each time, in order.

    Source: our choice.
    """
    try:
        resumes = json.loads(path.read_text(encoding="utf-8")).get("resumes", [])
    except (OSError, ValueError, AttributeError):
        return []
    return resumes if isinstance(resumes, list) else []


def manifest(
    run: RunFile,
    fingerprint: Mapping[str, Any],
    adapter: Mapping[str, Any],
    resumes: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Describe a run so that it can be repeated; no environment variable, no token.

    Args:
        run: the run.
        fingerprint: of the data, from rotmole.data.data_fingerprint.
        adapter: trainable parameters and adapted modules.
        resumes: the checkpoints it went on from, and what changed there.

    Returns:
        JSON text.

    Source: our choice.
    """
    content = {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": run.model.name,
        "seed": run.seed,
        "adapter": adapter,
        "data": fingerprint,
        "versions": versions(),
        "machine": machine(),
        "git_commit": git_commit(),
        "resumes": list(resumes),
    }
    return json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n"


def model_card(run: RunFile, note: str | None, figures: Mapping[str, Any]) -> str:
    """Write the adapter's README: how to load it, what it is, the run's figures.

    Args:
        run: the run.
        note: a line about the base model that belongs beside every figure, or None.
        figures: name -> value, in order.

    Returns:
        Markdown that starts with the import without which PEFT does not know the adapter.

    Source: our choice.
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


def final_metrics(rows: Sequence[dict[str, Any]], step: int) -> dict[str, Any]:
    """Pick a run's figures from its log: those of the weights that are its result.

    Args:
        rows: the lines of metrics.jsonl.
        step: the update that the result's weights are of.

    Returns:
        train_loss, train_tokens_per_second, peak_memory_bytes, num_input_tokens_seen, and, where
        there was validation by then, every eval loss of the last one and the step it was made at.

    Source: our choice.
    """
    found: dict[str, Any] = {}
    for row in rows:
        if "train_loss" in row:
            found |= {name: row[name] for name in _FIGURES if name in row}
    validated = [r for r in rows if r.get("eval_loss") is not None and r["step"] <= step]
    if validated:
        row = max(validated, key=lambda row: row["step"])
        found |= {name: value for name, value in row.items() if name.endswith("_loss")}
        found["eval_step"] = row["step"]
    return found
