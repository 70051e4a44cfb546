"""The `training:` section: names of TRL's SFTConfig, our defaults, and which names are refused."""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any, cast, get_type_hints

from rotmole.config.fields import Suggest, check_fields, no_hint
from rotmole.config.schema import ModelSection, RunFile, TaskSection
from rotmole.errors import did_you_mean, one_of
from rotmole.tuner.settings.ranges import Range, above, at_least, or_null, share, whole

_ROWS = "rows are rendered and tokenised by the data: section"
_METRICS = "metrics come from `rotmole eval`"
_HUB = "a run writes to its own folder only; upload the adapter afterwards"

REFUSED: dict[str, str] = {
    "output_dir": "write output_dir at the top level of the run file",
    "seed": "write seed at the top level of the run file",
    "data_seed": "the order of rows follows seed at the top level of the run file",
    "do_train": "the command decides (rotmole train, rotmole eval)",
    "do_eval": "the command decides (rotmole train, rotmole eval)",
    "do_predict": "the command decides (rotmole train, rotmole eval)",
    "resume_from_checkpoint": "use rotmole train RUN.yaml --resume auto",
    "use_cpu": "write model.device: cpu",
    "model_init_kwargs": "the model: section says how the model is loaded",
    "trust_remote_code": "only the option --trust-remote-code lets code that came with a model run",
    "router_aux_loss_coef": "write it under adapter:",
    "eval_packing": "validation scores rows one by one, and packing changes no score",
    "completion_only_loss": "write loss_on under each task of data.tasks",
    "assistant_only_loss": "write loss_on under each task of data.tasks",
    "dataset_text_field": _ROWS,
    "dataset_kwargs": _ROWS,
    "dataset_num_proc": _ROWS,
    "chat_template_path": _ROWS,
    "eos_token": _ROWS,
    "pad_token": _ROWS,
    "truncation_mode": _ROWS,
    "shuffle_dataset": "the mixture is shuffled by seed already",
    "remove_unused_columns": "batches are built by rotmole's own collator",
    "label_names": "batches are built by rotmole's own collator",
    "include_for_metrics": _METRICS,
    "batch_eval_metrics": _METRICS,
    "prediction_loss_only": _METRICS,
    "eval_do_concat_batches": _METRICS,
    "logging_nan_inf_filter": "a loss that is not finite stops the run",
    "push_to_hub": _HUB,
    "hub_model_id": _HUB,
    "hub_token": _HUB,
    "hub_strategy": _HUB,
    "hub_private_repo": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    "loss_type": "the loss is the negative log-likelihood",
    "activation_offloading": "it is not tested with this method",
    "save_only_model": "a checkpoint without the optimizer's state cannot be resumed from",
    "local_rank": "torchrun sets it",
    "deepspeed": "it is not supported; use fsdp",
}

RANGES: dict[str, Range] = {
    "per_device_train_batch_size": whole(1),
    "per_device_eval_batch_size": whole(1),
    "gradient_accumulation_steps": whole(1),
    "max_length": or_null(whole(1)),
    "save_total_limit": or_null(whole(1)),
    "eval_accumulation_steps": or_null(whole(1)),
    "max_steps": Range(
        "a whole number of at least 1, or -1 for no limit", lambda steps: steps == -1 or steps >= 1
    ),
    "num_train_epochs": above(0),
    "logging_steps": above(0),
    "save_steps": above(0),
    "eval_steps": or_null(above(0)),
    "adam_epsilon": above(0),
    "learning_rate": at_least(0),
    "weight_decay": at_least(0),
    "max_grad_norm": or_null(at_least(0)),
    "warmup_steps": or_null(at_least(0)),
    "eval_delay": or_null(at_least(0)),
    "dataloader_num_workers": whole(0),
    "adam_beta1": share(zero=True),
    "adam_beta2": share(zero=True),
    "label_smoothing_factor": share(zero=True),
}
"""Ranges that SFTConfig does not check."""

_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}

DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 16,
    "learning_rate": 5e-4,
    "num_train_epochs": 1.0,
    "max_length": 512,
    "bf16": False,
    "fp16": False,
    "activation_checkpointing": False,
    "ddp_find_unused_parameters": False,  # every parameter has a gradient in every update
    "logging_steps": 10,
    "logging_first_step": True,
    "save_strategy": "steps",
    "save_steps": 0.2,
    "save_total_limit": 2,
    "report_to": "none",
}
"""Defaults that replace TRL's, which suit large GPUs (bf16, checkpointing, length 1024)."""

ABOUT: dict[str, tuple[str, Any]] = {
    "per_device_train_batch_size": ("Rows in a training batch of each device.", 4),
    "per_device_eval_batch_size": ("Rows in a validation batch of each device.", 32),
    "gradient_accumulation_steps": ("Batches in an optimizer update.", 4),
    "learning_rate": ("Learning rate after warm-up; optimizer: has others by role.", 1e-3),
    "num_train_epochs": ("Passes over the mixture; max_steps replaces it.", 3.0),
    "max_steps": ("Number of optimizer updates.", 1000),
    "max_length": ("Largest number of tokens in a row; data.tasks.NAME.long_rows.", 1024),
    "packing": ("Put rows into sequences of up to max_length tokens; docs/data.md.", True),
    "packing_strategy": ("How rows are packed: bfd, which cuts none.", "bfd"),
    "padding_free": ("Join the rows of a batch to one sequence; docs/data.md.", True),
    "train_sampling_strategy": (
        "Order of rows: random, sequential or group_by_length.",
        "group_by_length",
    ),
    "warmup_steps": ("Updates over which the learning rate rises; below 1 a share of all.", 0.05),
    "weight_decay": ("Weight decay of the optimizer.", 0.01),
    "max_grad_norm": ("Norm that gradients are clipped to; 0: they are not clipped.", 1.0),
    "adam_beta1": ("First beta of AdamW.", 0.9),
    "adam_beta2": ("Second beta of AdamW.", 0.99),
    "adam_epsilon": ("Epsilon of AdamW.", 1e-8),
    "label_smoothing_factor": ("Label smoothing of the loss.", 0.1),
    "bf16": ("Train under bfloat16 autocast.", True),
    "fp16": ("Train under float16 autocast with a gradient scaler; needs a GPU.", True),
    "activation_checkpointing": ("Compute activations again in the backward pass.", True),
    "ddp_find_unused_parameters": ("DDP's search for parameters without a gradient.", True),
    "dataloader_num_workers": ("Processes that prepare batches; 0: the training process.", 2),
    "logging_steps": ("Updates between two lines of metrics.jsonl; below 1 a share of all.", 50),
    "logging_first_step": ("Whether the first update is logged as well.", False),
    "save_strategy": ("When checkpoints are saved: no, steps, epoch or best.", "epoch"),
    "save_steps": ("Updates between two checkpoints; below 1 a share of all.", 500),
    "save_total_limit": ("Number of checkpoints that are kept.", 1),
    "eval_strategy": ("When validation runs: no, steps or epoch.", "epoch"),
    "eval_steps": ("Updates between two validations; below 1 a share of all.", 500),
    "eval_delay": ("Updates or epochs before the first validation.", 100),
    "eval_accumulation_steps": ("Batches after which predictions move to the CPU.", 8),
    "report_to": ("Trackers that get the metrics.", "tensorboard"),
}
"""Meaning and an example of each setting that has a default or a range here."""

LARGE_RATE = 0.1

VALIDATION_DEFAULTS: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 0.2}
"""Further defaults, if a task may have validation rows."""


def training_hints() -> dict[str, Any]:
    """Return the type of every setting of trl.SFTConfig."""
    from trl import SFTConfig

    hints = {
        name: hint
        for name, hint in get_type_hints(SFTConfig).items()
        if name in SFTConfig.__dataclass_fields__
    }
    for old, new in _RENAMED.items():  # either name works with every version of transformers
        hints[new] = hints[old] = hints[new] if new in hints else hints[old]
    return hints | {"fsdp": bool | str | None}  # transformers' hint lacks bool


def check_training(
    values: Mapping[str, Any],
    model: ModelSection,
    has_validation: bool,
    suggest: Suggest = no_hint,
) -> tuple[dict[str, Any], list[str]]:
    """Check the `training:` section, last of all by making an SFTConfig.

    Args:
        values: the section as parsed.
        model: the `model:` section (device and dtype decide what is possible).
        has_validation: whether any task has validation rows.
        suggest: as of `check_fields`.

    Returns:
        The converted values and one sentence per problem.
    """
    passed, problems = check_fields(
        values, training_hints(), REFUSED, "training", suggest, owner="trl.SFTConfig"
    )
    problems += _range_problems(passed)
    problems += _pair_problems(passed, model, has_validation)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        problems.append(
            "training: the run was launched with DeepSpeed, which is not supported; launch it with "
            "FSDP2 (docs/scale.md) or as ordinary processes (torchrun)"
        )
    if not problems:
        problems += _library_problems(arguments(passed, "run", 0, model, has_validation))
    return passed, problems


def best_problems(training: Mapping[str, Any], tasks: Iterable[str]) -> list[str]:
    """Check that validation computes the metric by which the best checkpoint is chosen.

    Trainer would raise an error only at the first validation.

    Args:
        training: the checked section.
        tasks: names of those that may have validation rows.

    Returns:
        One sentence per problem.
    """
    metric = training.get("metric_for_best_model")
    losses = ["loss", *(f"{name}_loss" for name in tasks)]
    if metric is None or str(metric).removeprefix("eval_") in losses:
        return []
    return [one_of("training.metric_for_best_model", metric, [f"eval_{name}" for name in losses])]


def sft_arguments(run: RunFile) -> dict[str, Any]:
    """Build the keyword arguments of trl.SFTConfig: our defaults under the user's settings.

    Args:
        run: a run file that `load_run` has checked.

    Returns:
        Only arguments that SFTConfig knows. eval_strategy is "steps" if a task may have validation
        rows; the caller switches it off if there are none.
    """
    validated = any(has_validation(task) for task in run.data.tasks.values())
    return arguments(run.training, run.output_dir, run.seed, run.model, validated)


def longest_row(run: RunFile) -> int | None:
    """Return training.max_length, the most tokens of a row; trl is not needed for it."""
    longest: int | None = _laid_over(run.training, False)["max_length"]
    return longest


def chooses_by_validation(run: RunFile) -> bool:
    """Tell whether the result of a run with validation rows is the checkpoint that they choose."""
    validated = any(has_validation(task) for task in run.data.tasks.values())
    values = _laid_over(run.training, validated)
    if values.get("eval_strategy", "no") == "no":
        return False
    if "load_best_model_at_end" in values:
        return bool(values["load_best_model_at_end"])
    return saves_when_it_validates(values)


def _laid_over(training: Mapping[str, Any], validated: bool) -> dict[str, Any]:
    """Lay the user's settings over our defaults, by their new names."""
    user = {_RENAMED.get(k, k): v for k, v in training.items()}
    merged = DEFAULTS | (VALIDATION_DEFAULTS if validated else {}) | user
    if merged.get("save_strategy") != "steps":
        merged.pop("save_steps")
    if merged.get("eval_strategy", "no") != "steps":
        merged.pop("eval_steps", None)
    return merged


def arguments(
    training: Mapping[str, Any], output_dir: str, seed: int, model: ModelSection, validated: bool
) -> dict[str, Any]:
    """Merge defaults, the user's settings and the settings that only rotmole may make.

    Args:
        training: the checked section.
        output_dir: the run folder.
        seed: of the run.
        model: the `model:` section; device decides use_cpu.
        validated: whether any task may have validation rows.

    Returns:
        Keyword arguments for SFTConfig.
    """
    from trl import SFTConfig

    names = SFTConfig.__dataclass_fields__
    merged = _laid_over(training, validated)
    cpu = _on_cpu(model)
    merged |= {
        "output_dir": output_dir,
        "seed": seed,
        "data_seed": seed,
        "use_cpu": cpu,
        "remove_unused_columns": False,
        "prediction_loss_only": True,
        "logging_nan_inf_filter": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    merged.setdefault("dataloader_pin_memory", not cpu)
    if "activation_checkpointing" not in names:  # older transformers
        older = {new: old for old, new in _RENAMED.items()}
        merged = {older.get(k, k): v for k, v in merged.items()}
    return {k: v for k, v in merged.items() if k in names}


def saves_when_it_validates(values: Mapping[str, Any]) -> bool:
    """Tell whether each checkpoint has a validation loss, so that the best is known.

    Args:
        values: the arguments of SFTConfig, with all defaults.
    """
    save, validate = values.get("save_strategy"), values.get("eval_strategy", "no")
    if save == "best" or (save == validate and save == "epoch"):
        return True
    if save == validate == "steps":
        steps = values.get("save_steps", 500), values.get("eval_steps") or values["logging_steps"]
        if round(steps[0] * 10**6) % round(steps[1] * 10**6) == 0:
            return bool((steps[0] < 1) == (steps[1] < 1))
    return False


def count_updates(
    rows: int, *, batch: int, accumulation: int, epochs: float, max_steps: int, drop_last: bool
) -> int:
    """Return the number of optimizer updates of a training, as transformers' Trainer counts them.

    Args:
        rows: of the mixture.
        batch: rows of a batch of all processes together.
        accumulation: batches of an update.
        epochs: passes over the mixture.
        max_steps: replaces epochs if it is above 0.
        drop_last: whether an epoch's last, smaller batch is left out.

    >>> count_updates(
    ...     10, batch=4, accumulation=2, epochs=1.0, max_steps=-1, drop_last=False
    ... )
    2
    """
    if max_steps > 0:
        return max_steps
    batches = rows // batch if drop_last else math.ceil(rows / batch)
    return math.ceil(max(math.ceil(batches / accumulation), 1) * epochs)


NO_VALIDATION = (
    "validation rows, but no task has any; give files: {validation: ...} or validation_fraction."
)
"""How a sentence ends about a setting that needs what the data do not have."""


def has_validation(task: TaskSection) -> bool:
    """Tell whether a task may have validation rows.

    Returns:
        True for locale tasks, with a validation_fraction, with validation files, and for datasets
        of the hub and folders, which may have a validation split.
    """
    return (
        task.source in ("locale", "hub")
        or task.validation_fraction > 0
        or isinstance(task.files, str)
        or "validation" in task.files
    )


def warn_without_effect(training: Mapping[str, Any]) -> None:
    """Warn of settings of the checked section that have no effect because of another one."""
    idle = []
    if training.get("max_steps", -1) > 0 and "num_train_epochs" in training:
        idle.append(("num_train_epochs", "max_steps is set"))
    for what in ("save", "eval", "logging"):
        strategy = training.get(f"{what}_strategy")
        if f"{what}_steps" in training and strategy not in (None, "steps"):
            idle.append((f"{what}_steps", f"{what}_strategy is {strategy!r}"))
    packing = bool(training.get("packing"))
    if packing and training.get("train_sampling_strategy") == "group_by_length":
        idle.append(("train_sampling_strategy", "packs are of similar length already"))
    if "packing_strategy" in training and not packing:
        idle.append(("packing_strategy", "packing is not on"))
    for name, reason in idle:
        warnings.warn(f"training.{name} has no effect, because {reason}.", stacklevel=3)
    if training.get("learning_rate", 0) > LARGE_RATE:
        warnings.warn(
            f"training.learning_rate is {training['learning_rate']:g}; adapters are usually "
            f"trained with 1e-5 to 5e-3, and above {LARGE_RATE:g} training hardly ever converges.",
            stacklevel=3,
        )


def _on_cpu(model: ModelSection) -> bool:
    import torch

    if model.device != "auto":
        return model.device == "cpu"
    return not (torch.cuda.is_available() or torch.backends.mps.is_available())


def _range_problems(values: Mapping[str, Any]) -> list[str]:
    problems: list[str] = []
    for name, allowed in RANGES.items():
        if values.get(name) is not None:
            problems += allowed.problems(f"training.{name}", values[name])
    return problems


def _pair_problems(values: Mapping[str, Any], model: ModelSection, validated: bool) -> list[str]:
    problems = []
    for old, new in _RENAMED.items():
        if old in values and new in values:
            problems.append(f"training.{old} and training.{new} are two names of one setting.")
    if values.get("bf16") and values.get("fp16"):
        problems.append("training.bf16 and training.fp16 are both true; choose one.")
    if values.get("fp16") and _on_cpu(model):
        problems.append("training.fp16: true needs a GPU; on a CPU use model.dtype instead.")
    wants_validation = [
        name
        for name, value in values.items()
        if (name == "eval_strategy" and value != "no")
        or (name in ("load_best_model_at_end", "eval_on_start") and value is True)
    ]
    if not validated:
        problems += [
            f"training.{name}: {values[name]} needs {NO_VALIDATION}" for name in wants_validation
        ]
    problems += _packing_problems(values)
    if values.get("use_liger_kernel") and find_spec("liger_kernel") is None:
        problems.append("training.use_liger_kernel: true needs: pip install liger-kernel.")
    reports = values.get("report_to", "none")
    for report in [reports] if isinstance(reports, str) else reports or []:
        problems += _report_problem(report)
    return problems


def _packing_problems(values: Mapping[str, Any]) -> list[str]:
    problems = []
    if values.get("packing") and values.get("max_length", 0) is None:
        problems.append(
            "training.packing: true needs training.max_length, the tokens of a pack; it is null."
        )
    if values.get("packing_strategy", "bfd") != "bfd":
        problems.append(
            f"training.packing_strategy is {values['packing_strategy']!r}; it must be bfd, because "
            "the others cut rows in two."
        )
    if values.get("padding_free") and values.get("pad_to_multiple_of"):
        problems.append(
            "training.pad_to_multiple_of has no meaning with padding_free: true, whose batches "
            "have no padding; leave one of them out."
        )
    return problems


def _report_problem(report: str) -> list[str]:
    packages = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
    trackers = ["none", "all", *packages, "trackio", "comet_ml", "clearml", "swanlab", "dvclive"]
    if report not in trackers and (hint := did_you_mean(report, trackers)):
        return [f"training.report_to: {report!r} is not known{hint}"]
    package = packages.get(report)
    if package and find_spec(package) is None:
        return [f"training.report_to: {report} needs the package {package}: pip install {package}."]
    return []


def _library_problems(merged: dict[str, Any]) -> list[str]:
    """Make an SFTConfig for its own checks, without letting it choose the process's device."""
    import torch
    from trl import SFTConfig

    def cpu(_: Any) -> torch.device:
        return torch.device("cpu")

    kind = cast(Any, type("_Values", (SFTConfig,), {"device": property(cpu)}))
    errors = (ValueError, TypeError, ImportError, NotImplementedError, KeyError, AttributeError)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = kind(**merged)
    except errors as error:
        return [f"training: {' '.join(str(error).split())}"]
    problems = []
    for name, build in (("optim", _optimizer), ("lr_scheduler_type", _schedule)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                build(config)
        except errors as error:
            value = str(getattr(config, name)).rpartition(".")[2].lower()
            reason = " ".join(str(error).split()) or type(error).__name__
            problems.append(f"training.{name}: {value!r} cannot be built: {reason}")
    return problems


def _optimizer(config: Any) -> Any:
    """Build the optimizer of an SFTConfig for one number, to see whether that works here."""
    import torch
    from transformers import Trainer

    kind, options = Trainer.get_optimizer_cls_and_kwargs(config)
    matrix = torch.nn.Parameter(torch.zeros(1, 1))
    names = inspect.signature(kind).parameters
    return kind([matrix], **{k: v for k, v in options.items() if k in names or "kwargs" in names})


def _schedule(config: Any) -> None:
    """Build the schedule of an SFTConfig, to see whether it has the arguments that it needs."""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        num_warmup_steps=1,
        num_training_steps=10,
        scheduler_specific_kwargs=dict(config.lr_scheduler_kwargs or {}),
    )
