"""``rotmole check``: all mistakes of a run file at once, or else the cost of the run."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rotmole.config.load import load_run, sft_arguments
from rotmole.config.schema import RunFile
from rotmole.data import Example, data_problems, encode_all, learnt_messages, load_splits
from rotmole.data.encode import IGNORED
from rotmole.models.builtin import built_in_named
from rotmole.models.limits import check_readable, check_vocabulary
from rotmole.models.load import load_tokenizer
from rotmole.models.memory import MemoryEstimate, estimate_memory, resident_bytes
from rotmole.models.precision import QUANTIZATION_PACKAGE, choose_device, choose_dtype
from rotmole.models.preview import adapter_problems, matched, preview, trainable_by_role


def check(path: Path, overrides: Sequence[str], *, trust_remote_code: bool = False) -> int:
    """Check a run file and print modules, parameters, tokens and memory.

    Raises:
        ConfigError: holding every problem of the file, the data's files and the adapter's fit.
        InputError: the tokenizer or the data cannot be read.
    """
    fits = partial(adapter_problems, trust_remote_code=trust_remote_code)
    run = load_run(path, overrides, data_problems=data_problems, model_problems=fits)
    package = QUANTIZATION_PACKAGE.get(run.model.quantization)
    if package and find_spec(package) is None:
        print(
            f"note: training needs the package {package}, which is not installed: "
            "pip install 'rotmole[quant]'"
        )
    device = choose_device(run.model)
    dtype = choose_dtype(run.model, device)
    model = preview(run.model, run.adapter_config, dtype, trust_remote_code=trust_remote_code)
    print(f"{path} has no mistakes.")
    print(f"model       {run.model.name}, {str(dtype).removeprefix('torch.')} on {device.type}")
    built_in = built_in_named(run.model.name)
    if built_in:
        print(f"            {built_in.note}")
    _print_modules(model)
    tokenizer = load_tokenizer(run.model, trust_remote_code=trust_remote_code)
    check_vocabulary(model, tokenizer, run.model.name)
    longest = _print_tokens(run, model, tokenizer)
    importlib.import_module("rotmole.training.build")  # so resident_bytes counts its imports
    settings = sft_arguments(run)
    batch = settings["per_device_train_batch_size"]
    estimate = estimate_memory(
        model,
        batch=batch,
        length=longest,
        settings=settings,
        process=resident_bytes(),
        quantization=run.model.quantization,
    )
    _print_memory(estimate, batch, longest, device.type)
    return 0


def _print_modules(model: Any) -> None:
    for (name, inputs, outputs), count in matched(model).items():
        print(f"modules     {count:>4} x {name} [{inputs} -> {outputs}]")
    roles = {role: count for role, count in trainable_by_role(model).items() if count}
    trainable = sum(roles.values())
    total = sum(parameter.numel() for parameter in model.parameters())
    print(f"parameters  {trainable:,} trainable of {total:,} ({trainable / total:.2%})")
    for role, count in roles.items():
        print(f"            {count:>12,} {role.replace('_', ' ')}")


def _print_tokens(run: RunFile, model: Any, tokenizer: Any) -> int:
    """Print the table of tokens by task; return the length of the longest training row."""
    limit = run.training.get("max_length", sft_arguments(run)["max_length"]) or 1 << 30
    columns = f"{'rows':>8}{'tokens':>11}{'learnt':>11}{'answers':>9}{'longest':>9}"
    print(f"tokens      {'task':<20}{'split':<12}{columns}")
    longest = 1
    for split, examples in load_splits(run.data, seed=run.seed, tokenizer=tokenizer).items():
        for task, rows in examples.items():
            if rows:
                length = _print_task(task, split, rows, model, tokenizer, limit)
                longest = max(longest, length) if split == "train" else longest
    return longest


def _print_task(
    task: str, split: str, rows: Sequence[Example], model: Any, tokenizer: Any, limit: int
) -> int:
    """Print one line of the table of tokens; return the length of the longest row."""
    encoded = encode_all(rows, tokenizer, max_length=limit)
    texts = [row["input_ids"] for row in encoded]
    check_readable(model, tokenizer, zip([row.place for row in rows], texts, strict=True))
    lengths = [len(text) for text in texts]
    labels = sum(label != IGNORED for row in encoded for label in row["labels"])
    answers = sum(map(learnt_messages, rows))
    numbers = f"{len(rows):>8,}{sum(lengths):>11,}{labels:>11,}{answers:>9,}{max(lengths):>9,}"
    print(f"            {task:<20}{split:<12}{numbers}")
    return max(lengths)


def _print_memory(estimate: MemoryEstimate, batch: int, length: int, device: str) -> None:
    parts = {
        "base weights": estimate.weights,
        "adapter": estimate.adapter,
        "optimizer": estimate.optimizer,
        f"one update ({batch} x {length} tokens)": estimate.step,
    }
    if device == "cpu":
        parts = {"interpreter and libraries": estimate.process, **parts}
    print(f"memory      about {_size(sum(parts.values()))} at the peak of training on {device}")
    for name, size in parts.items():
        print(f"            {_size(size):>10} {name}")


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
