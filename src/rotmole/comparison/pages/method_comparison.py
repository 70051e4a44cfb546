"""A study in the layout of PEFT's method_comparison: settings and results of each final cell.

    experiments/METHOD/NAME/adapter_config.json, training_params.json
    results/METHOD--NAME.json

METHOD is the PEFT type in lower case, NAME the method's name in the study and the seed. PEFT's own
processing reads the results. Its word "accuracy" means the tasks' own metric here, and where the
device has no memory of its own, memory is that of the process.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from rotmole.comparison.differences import finite_or_none
from rotmole.comparison.judgement import Judgement
from rotmole.comparison.results import Result, Results
from rotmole.comparison.scores import OWN
from rotmole.config.load import load_run, sft_arguments
from rotmole.config.schema import RunFile
from rotmole.errors import InputError
from rotmole.files import atomic_write_text, make_folder
from rotmole.models.adapter import CONFIG
from rotmole.training.callbacks.metrics import read_metrics
from rotmole.training.folder.layout import ADAPTER, MANIFEST, METRICS

FOLDER = "method_comparison"
_PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")


def write_method_comparison(results: Results, judgement: Judgement, study: Path) -> Path:
    """Write the folder method_comparison of a study.

    Args:
        results: of the study; the run folders of its final cells are read.
        judgement: of these results.
        study: the study folder.

    Raises:
        InputError: a cell's folder has lost a file.
        StorageError: a file cannot be written.
    """
    folder = study / FOLDER
    for cell in results.final:
        try:
            config = _read(cell.folder / ADAPTER / CONFIG)
            manifest = _read(cell.folder / MANIFEST)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # said when the cell was trained
                run = load_run(cell.folder / "run.yaml", anchored=False)
            size = (cell.folder / ADAPTER / "adapter_model.safetensors").stat().st_size
        except (OSError, ValueError) as error:
            raise InputError(
                f"{str(cell.folder)!r} is finished but has lost a file ({error}); delete the "
                "folder, and `rotmole compare` makes the cell again."
            ) from error
        method = str(config["peft_type"]).lower()
        name = f"{cell.method}-seed-{cell.seed}"
        training = training_params(run, cell, str(manifest["model"]))
        place = make_folder(folder / "experiments" / method / name)
        _write(place / "adapter_config.json", config)
        _write(place / "training_params.json", training)
        result = {
            "run_info": {
                "created_at": manifest["started"],
                "total_time": cell.train_seconds,
                "experiment_name": f"{method}/{name}",
                "peft_branch": None,
                "train_config": training,
                "peft_config": config,
                "error_msg": "",
            },
            "train_info": _train_info(cell, judgement, manifest, size),
            "meta_info": _meta_info(manifest, run),
        }
        _write(make_folder(folder / "results") / f"{method}--{name}.json", result)
    return folder


def training_params(run: RunFile, cell: Result, model: str) -> dict[str, Any]:
    """Return the settings of training by the names that PEFT gives them.

    Args:
        run: of the cell.
        cell: the cell.
        model: name of the base model.
    """
    given = sft_arguments(run)

    def setting(name: str) -> Any:
        return given.get(name, TrainingArguments.__dataclass_fields__[name].default)

    updates = cell.updates
    every = given.get("eval_steps") or updates
    rows = given["per_device_train_batch_size"] * given.get("gradient_accumulation_steps", 1)
    return {
        "model_id": model,
        "dtype": cell.facts.get("dtype"),
        "max_seq_length": given["max_length"],
        "batch_size": rows,
        "batch_size_eval": run.evaluation.batch_size,
        "max_steps": updates,
        "eval_steps": max(1, round(every * updates if every < 1 else every)),
        "compile": False,
        "use_gc": bool(given.get("gradient_checkpointing", False)),
        "query_template": "{query}",
        "seed": cell.seed,
        "grad_norm_clip": setting("max_grad_norm"),
        "optimizer_type": str(run.optimizer.name or given.get("optim") or "AdamW"),
        "optimizer_kwargs": {"lr": cell.rate, "weight_decay": setting("weight_decay")},
        "lr_scheduler": str(given.get("lr_scheduler_type", "linear")),
        "use_amp": bool(given.get("bf16") or given.get("fp16")),
        "autocast_adapter_dtype": True,
        "generation_kwargs": {"max_new_tokens": run.evaluation.max_new_tokens},
        "attn_implementation": run.model.attn_implementation,
        "init_kv_cache_prefix": None,
    }


def _train_info(
    cell: Result, judgement: Judgement, manifest: Mapping[str, Any], size: int
) -> dict[str, Any]:
    lines = read_metrics(cell.folder / METRICS)
    last: dict[str, Any] = next((row for row in reversed(lines) if "train_loss" in row), {})
    memory = int(last.get("peak_memory_bytes", 0))
    own = judgement.score(cell.method, OWN)
    samples = manifest["data"]["splits"]["train"]
    points = [
        {
            "step": point.update,
            "valid nll": finite_or_none(point.nll),
            "train total tokens": point.tokens,
            "elapsed time": point.seconds,
        }
        for point in cell.curve
    ]
    nll = judgement.score(cell.method, "nll")
    end = {
        "step": cell.updates,
        "test accuracy": own.by_seed.get(cell.seed) if own else None,
        "test nll": nll.by_seed.get(cell.seed) if nll else None,
        "train loss": last.get("train_loss"),
        "train samples": sum(task["rows"] for task in samples.values()),
        "train total tokens": cell.tokens,
    }
    return {
        "accelerator_memory_reserved_avg": memory,
        "accelerator_memory_max": memory,
        "accelerator_memory_reserved_99th": memory,
        "train_time": cell.train_seconds,
        "file_size": size,
        "num_trainable_params": cell.parameters,
        "num_total_params": manifest["adapter"]["all_parameters"],
        "status": "success",
        "metrics": [*points, end],
    }


def _meta_info(manifest: Mapping[str, Any], run: RunFile) -> dict[str, Any]:
    versions, machine = manifest["versions"], manifest["machine"]
    packages: dict[str, Any] = {}
    for name in _PACKAGES:
        packages |= {f"{name}-version": versions.get(name), f"{name}-commit-hash": None}
    system, _, rest = str(machine["platform"]).partition("-")
    return {
        "model_info": {"sha": run.model.revision, "created_at": None},
        "dataset_info": {
            task: {"sha": part["sha256"], "created_at": None}
            for task, part in manifest["data"]["splits"]["train"].items()
        },
        "package_info": packages,
        "system_info": {
            "system": system,
            "release": rest,
            "version": "",
            "machine": machine["processor"],
            "processor": machine["processor"],
            "accelerator": ", ".join(machine["devices"]) or "cpu",
        },
        "pytorch_info": f"torch {versions.get('torch')}",
    }


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write(path: Path, content: Mapping[str, Any]) -> None:
    atomic_write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
