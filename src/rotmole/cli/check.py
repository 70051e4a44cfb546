"""``rotmole check``: all mistakes of a run file and its rows, what is learnt, and what it costs."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.filesize import decimal

from rotmole.cli.rows import Rows, load_rows, print_rows
from rotmole.comparison.study import is_study
from rotmole.config.load import load_run, sft_arguments
from rotmole.config.schema import RunFile
from rotmole.config.training import count_updates
from rotmole.data import Example, data_problems, mix
from rotmole.data.sources import together
from rotmole.errors import AdapterError, DataError
from rotmole.evaluation.render import print_lines
from rotmole.models.builtin import built_in_named
from rotmole.models.duration import estimate_update, measured_speed, typical_widths
from rotmole.models.limits import check_vocabulary
from rotmole.models.load import load_tokenizer
from rotmole.models.memory import (
    MemoryEstimate,
    UnknownCostError,
    estimate_memory,
    resident_bytes,
)
from rotmole.models.precision import QUANTIZATION_PACKAGE, choose_device, choose_dtype
from rotmole.models.preview import adapter_problems, matched, preview, trainable_by_role
from rotmole.models.rows_apart import check_without_weights
from rotmole.tuner.loras import read_lora
from rotmole.units import duration

if TYPE_CHECKING:
    from rotmole.cli.lengths import Lengths


def check(path: Path, overrides: Sequence[str], *, trust_remote_code: bool = False) -> int:
    """Check a run file, then its rows; print modules, parameters, rows, updates, time and memory.

    Raises:
        ConfigError: holding every problem of the file, of where the data's files are, and of the
            adapter's fit.
        DataError: holding every problem of all files and rows.
        InputError: the tokenizer cannot be read.
    """
    if is_study(path):
        from rotmole.cli.compare.check import check_study  # imports the trainer

        return check_study(path, overrides, trust_remote_code=trust_remote_code)
    fits = partial(adapter_problems, trust_remote_code=trust_remote_code)
    run = load_run(path, overrides, data_problems=data_problems, model_problems=fits)
    package = QUANTIZATION_PACKAGE.get(run.model.quantization)
    if package and find_spec(package) is None:
        print(
            f"note: training needs the package {package}, which is not installed:\n"
            "      pip install 'rotmole[quant]'"
        )
    device = choose_device(run.model)
    dtype = choose_dtype(run.model, device)
    model = preview(run.model, run.adapter_config, dtype, trust_remote_code=trust_remote_code)
    print(f"model       {run.model.name}, {str(dtype).removeprefix('torch.')} on {device.type}")
    built_in = built_in_named(run.model.name)
    if built_in:
        print(textwrap.fill(built_in.note, 80, initial_indent=" " * 12, subsequent_indent=" " * 12))
    _print_experts(run)
    _print_modules(model)
    tokenizer = load_tokenizer(run.model, trust_remote_code=trust_remote_code)
    check_vocabulary(model, tokenizer, run.model.name)
    _check_rows_apart(run, trust_remote_code=trust_remote_code)
    # slow, and so that resident_bytes counts its imports
    from rotmole.training.build import training_values, validation_rows

    settings = sft_arguments(run)
    loaded, faults = load_rows(run, model, tokenizer, settings.get("max_length"))
    print_rows(loaded, tokenizer)
    if faults:
        raise together(faults)
    if not any(rows.split == "train" for rows in loaded):
        raise DataError("no task has a row in its train split; name files: {train: ...}.")
    validation = {rows.task: rows.examples for rows in loaded if rows.split == "validation"}
    validation = validation_rows(run, validation)
    training_values(run, validated=validation)  # what only the rows can tell
    # a model can be traced once: layers may keep tensors of the trace
    fresh = preview(run.model, run.adapter_config, dtype, trust_remote_code=trust_remote_code)
    try:
        _print_cost(run, model, fresh, loaded, validation, device, dtype)
    except UnknownCostError as error:
        print_lines([f"time        {error}"])
    print(f"no mistakes found in {path}")
    return 0


def _check_rows_apart(run: RunFile, *, trust_remote_code: bool) -> None:
    """Try whether the model keeps rows of one sequence apart, if the run joins any."""
    settings = sft_arguments(run)
    if not (settings.get("packing") or settings.get("padding_free")):
        return
    flat = settings.get("padding_free") or "flash" in (run.model.attn_implementation or "")
    if check_without_weights(run.model, flat=bool(flat), trust_remote_code=trust_remote_code):
        print("packing     the model keeps rows of one sequence apart")
    else:
        print("packing     whether the model keeps rows apart is tried when training starts")


def _print_experts(run: RunFile) -> None:
    """Print which adapters become the experts, and the base model that each was trained on."""
    paths = run.experts_from.paths
    names = getattr(run.adapter_config, "expert_names", None)  # PEFT's other methods have none
    if not paths:
        if names:
            print(f"experts     {', '.join(names)}")
        return
    trained = "the gates alone are" if run.experts_from.trainable == "gates" else "all is"
    print(f"experts     {len(paths)} trained adapters; {trained} trained")
    for name, path in zip(names, paths, strict=True):
        try:
            lora = read_lora(path)
        except AdapterError as error:  # the run.yaml of a run, which can be resumed without them
            print(f"            {name}: {error}")
            continue
        base = lora.config.get("base_model_name_or_path") or "a model that it does not name"
        print(
            f"            {name}: rank {lora.rank} in {len(lora.factors)} modules, trained on "
            f"{base}, from {path}"
        )


def _print_cost(
    run: RunFile,
    model: Any,
    again: Any,
    loaded: Sequence[Rows],
    validation: Mapping[str, Sequence[Example]],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Print updates, tokens, time and memory of the training; `model` and `again` are equal."""
    from rotmole.cli.lengths import Lengths, padded  # imports the trainer

    settings = sft_arguments(run)
    trained = [rows for rows in loaded if rows.split == "train"]
    length = {
        id(example): len(encoded["input_ids"])
        for rows in loaded
        for example, encoded in zip(rows.examples, rows.encoded, strict=True)
    }
    order = mix({rows.task: rows.examples for rows in trained}, run.data, seed=run.seed)
    lengths = Lengths.of(settings, [length[id(example)] for example in order], run.seed)
    updates, epochs = _print_updates(lengths, settings)
    largest = lengths.largest_shape()
    memory = estimate_memory(
        model,
        batch=largest[0],
        length=largest[1],
        settings=settings,
        process=resident_bytes(),
        quantization=run.model.quantization,
    )
    shape = lengths.mean_shape()
    learnt = sum(rows.learnt for rows in trained) / sum(len(rows.examples) for rows in trained)
    learnt *= settings["per_device_train_batch_size"] * len(lengths.rows) / len(lengths.sequences)
    step = _step_seconds(again, settings, shape, learnt, device, dtype)
    checked = [length[id(row)] for examples in validation.values() for row in examples]
    of_validation = _validations(updates, epochs, settings) * (
        # a forward pass is about half of a forward and backward that leaves the base's weights out
        padded(checked, settings["per_device_eval_batch_size"]) / math.prod(shape) * step / 2
    )
    steps = updates * settings.get("gradient_accumulation_steps", 1)
    _print_time(steps * step, of_validation, device.type)
    _print_memory(memory, *largest, device.type)


def _print_updates(lengths: Lengths, settings: Mapping[str, Any]) -> tuple[int, float]:
    """Print how often a run updates, on how many tokens, and its padding.

    Returns:
        Number of updates, and of epochs.
    """
    batch = settings["per_device_train_batch_size"]
    accumulation = settings.get("gradient_accumulation_steps", 1)
    updates = count_updates(
        len(lengths.sequences),
        batch=batch,
        accumulation=accumulation,
        epochs=settings["num_train_epochs"],
        max_steps=settings.get("max_steps", -1),
        drop_last=bool(settings.get("dataloader_drop_last")),
    )
    epochs = updates * batch * accumulation / len(lengths.sequences)
    kind = "packs" if lengths.packing else "rows"
    print(
        f"training    {updates:,} updates of {batch * accumulation:,} {kind}, {epochs:.3g} epochs, "
        f"about {_rounded(epochs * sum(lengths.rows))} tokens"
    )
    if lengths.packing:
        print(
            f"            {len(lengths.rows):,} rows in {len(lengths.sequences):,} packs of up to "
            f"{settings['max_length']:,} tokens"
        )
    print(f"padding     {lengths.padding()}")
    return updates, epochs


def _step_seconds(
    model: Any,
    settings: Mapping[str, Any],
    shape: tuple[int, int],
    learnt: float,
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """Estimate the seconds of the forward and backward pass of one batch.

    Args:
        settings: the arguments of SFTConfig.
        shape: sequences of a batch, and tokens of each with its padding.
        learnt: tokens of a batch that have labels.
        dtype: of the model; bf16 and fp16 of the settings replace it.
    """
    half = next((t for n, t in (("bf16", torch.bfloat16), ("fp16", torch.float16))
                 if settings.get(n)), dtype)  # fmt: skip
    speed = measured_speed(device, half, rows=math.prod(shape), widths=typical_widths(model))
    return estimate_update(
        model,
        speed,
        batch=shape[0],
        length=shape[1],
        learnt=learnt,
        checkpointing=bool(
            settings.get("activation_checkpointing") or settings.get("gradient_checkpointing")
        ),
    )


def _print_time(training: float, validation: float, device: str) -> None:
    part = f", {duration(max(validation, 1))} of it validation" if validation else ""
    whole = duration(max(training + validation, 1))
    print(f"time        about {whole} in one process on this {device}{part}")
    print("            (estimated from the operations of an update and a short measurement)")


def _validations(updates: int, epochs: float, settings: Mapping[str, Any]) -> int:
    """Return how often validation runs."""
    strategy = settings.get("eval_strategy", "no")
    if strategy == "epoch":
        return math.ceil(epochs)
    every = settings.get("eval_steps") or settings["logging_steps"]
    every = math.ceil(updates * every) if every < 1 else every
    return int(updates // every) if strategy == "steps" else 0


def _print_modules(model: Any) -> None:
    for (name, inputs, outputs), count in matched(model).items():
        print(f"modules     {count:>4} x {name} [{inputs} -> {outputs}]")
    roles = {role: count for role, count in trainable_by_role(model).items() if count}
    trainable = sum(roles.values())
    total = sum(parameter.numel() for parameter in model.parameters())
    print(f"parameters  {trainable:,} trainable of {total:,} ({trainable / total:.2%})")
    for role, count in roles.items():
        print(f"            {count:>12,} {role.replace('_', ' ')}")


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
    return decimal(int(count), precision=1 if count >= 1e9 else 0)


def _rounded(count: float) -> str:
    """Write a number with two significant digits.

    >>> _rounded(1234567), _rounded(87.4)
    ('1,200,000', '87')
    """
    digits = len(str(int(count)))
    return f"{int(round(count, 2 - digits)):,}"
