"""What may not change between a checkpoint and the run that goes on from it, and the difference."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict

from rotmole.config.load import sft_arguments
from rotmole.config.schema import RunFile
from rotmole.data import Example, fingerprint
from rotmole.errors import InputError
from rotmole.processes import world_size
from rotmole.training.checkpoints.seal import read_seal, storage_of
from rotmole.training.folder.manifest import versions
from rotmole.tuner.config import RotMoleConfig
from rotmole.tuner.storage.weights import EXPERTS, WEIGHTS, read_header

logger = logging.getLogger(__name__)

_SHAPES = {
    f"adapter.{name}"
    for name in (
        "peft_type", "r", "num_experts", "num_experts_pattern", "experts_added", "share_A",
        "router", "router_scope", "rotation", "rotation_input", "rotation_dim", "router_dim",
        "rotation_planes", "radar_rank", "shared_expert_r", "shared_expert_rotation",
        "shared_expert_gate",
        "rank_pattern", "target_modules", "exclude_modules", "layers_to_transform",
        "layers_pattern", "modules_to_save", "trainable_token_indices",
    )
}  # fmt: skip
"""Settings that decide which tensors there are; `check_tensors` finds what others change."""
_STATE = ("training.optim", "training.optim_args", "optimizer.name")
"""Settings that the state of another optimizer cannot follow."""
_KEEPS_RATES = ("reduce_lr_on_plateau", "greedy")
"""Schedules whose state holds the rates."""
_SCHEDULE = ("training.learning_rate", "training.lr_scheduler", "optimizer.")
"""Beginnings of the settings that such a schedule is made from."""

_NOT_THE_ADAPTERS = (
    "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision",
    "inference_mode", "task_type",
)  # fmt: skip
_MODEL = ("name", "dtype", "revision", "quantization", "attn_implementation")
_TRAINING = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "learning_rate",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "weight_decay",
    "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "label_smoothing_factor", "neftune_noise_alpha", "bf16", "fp16", "train_sampling_strategy",
    "dataloader_drop_last", "pad_to_multiple_of", "average_tokens_across_devices",
)  # fmt: skip
_LENGTH = ("training.max_steps", "training.num_train_epochs")
_ORDER = "order of data.tasks"
_VALIDATION, _VALIDATED = "validation rows of ", "tasks with validation rows"
_LOADED = ("rows of ", _VALIDATION, _VALIDATED, "dtype of ")
"""How the names of facts begin that are known when model and data are loaded."""
_CHOICE = ("training.metric_for_best_model", "training.greater_is_better")
"""Settings that say which checkpoint is the best."""
_MEASURED = (_VALIDATION, _VALIDATED, "dtype of ", *_CHOICE, "training.max_length", "model.",
             "adapter.")  # fmt: skip
"""How the names begin of what decides a validation loss, for given weights."""
_ONLY_WHILE_TRAINING = (
    "adapter.lora_dropout", "adapter.router_jitter", "adapter.router_aux_loss",
    "adapter.router_z_loss", "adapter.router_task_", "adapter.router_bias_rate",
    "adapter.router_sqrt_gate", "adapter.frozen", "adapter.freeze_old", "adapter.init_weights",
)  # fmt: skip
"""Beginnings of those adapter settings that do not."""
_PACKAGES = ("rotmole", "torch", "transformers", "peft", "accelerate", "tokenizers")


@dataclass(frozen=True)
class Change:
    """A fact that differs: its name, the checkpoint's value and this run's."""

    name: str
    saved: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name} is {self.now!r}, the checkpoint has {self.saved!r}"


def facts_of(run: RunFile) -> dict[str, Any]:
    """Collect what decides a run's numbers and is known before anything is loaded.

    Args:
        run: a checked run file.

    Returns:
        Dotted name -> plain value: settings of adapter, model, training, optimizer and mixture,
        seed, number of processes, versions. Paths of files are left out, and settings that decide
        only what is written, logged or evaluated.
    """
    from trl import SFTConfig

    training = _defaults(SFTConfig) | sft_arguments(run)
    facts: dict[str, Any] = {"seed": run.seed, "processes": world_size()}
    facts |= _adapter_facts(run.adapter_config.to_dict())
    if "peft_type" in run.adapter:  # rotmole's own is not named, as in older checkpoints
        facts["adapter.peft_type"] = run.adapter["peft_type"]
    facts |= {f"model.{name}": getattr(run.model, name) for name in _MODEL}
    facts["model.name"] = _model_name(run.model.name)
    names = (*_TRAINING, *(name.partition(".")[2] for name in _LENGTH))
    facts |= {f"training.{name}": training.get(name) for name in names}
    joined = ("packing", "padding_free")  # off, they are not named, as in older checkpoints
    facts |= {f"training.{name}": True for name in joined if training.get(name)}
    metric = str(training.get("metric_for_best_model") or "loss").removeprefix("eval_")
    facts |= dict(zip(_CHOICE, (metric, bool(training.get("greater_is_better"))), strict=True))
    facts |= {f"optimizer.{k}": v for k, v in run.optimizer.model_dump().items()}
    facts["data.temperature"] = run.data.temperature
    facts[_ORDER] = list(run.data.tasks)
    for name, task in run.data.tasks.items():
        facts[f"data.tasks.{name}.weight"] = task.weight
        facts[f"data.tasks.{name}.task_group"] = task.task_group
    facts |= {f"version of {k}": v for k, v in versions().items() if k in _PACKAGES}
    return {name: _plain(value) for name, value in facts.items()}


def _adapter_facts(settings: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in settings.items() if name not in _NOT_THE_ADAPTERS}
    return {f"adapter.{name}": _plain(value) for name, value in kept.items()}


def _model_name(name: Any) -> Any:
    """Return the path of a local model, wherever the run is started from; else the name."""
    return str(Path(name).resolve()) if isinstance(name, str) and Path(name).exists() else name


def _defaults(config: Any) -> dict[str, Any]:
    """Return what a class of settings takes for those that are left out."""
    fields = config.__dataclass_fields__.items()
    return {name: field.default for name, field in fields if field.default is not MISSING}


def loaded_facts(fingerprint: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """Collect what decides a run's numbers and is known when model and data are loaded.

    Args:
        fingerprint: of the rows that are trained on and of those that validation scores, from
            rotmole.data.data_fingerprint.
        dtype: of the base model's weights, which model.dtype: auto leaves to the machine.

    Returns:
        Dotted name -> plain value.
    """
    facts: dict[str, Any] = {"dtype of the base model": str(dtype).removeprefix("torch.")}
    splits = fingerprint["splits"]
    facts |= {f"rows of {task}": _rows(entry) for task, entry in splits["train"].items()}
    validated = splits.get("validation", {})
    facts |= {f"{_VALIDATION}{task}": _rows(entry) for task, entry in validated.items()}
    return facts | {_VALIDATED: list(validated)}


def _rows(entry: Mapping[str, Any]) -> str:
    return _rows_fact(entry["rows"], entry["sha256"])


def scores_differ(changes: Iterable[str]) -> bool:
    """Tell whether validation losses from before these changes compare with those after them.

    Args:
        changes: from check_changes.

    Returns:
        True if other rows are scored, by another metric, or by a model that computes otherwise.
    """
    return any(
        change.startswith(_MEASURED) and not change.startswith(_ONLY_WHILE_TRAINING)
        for change in changes
    )


def check_changes(
    checkpoint: Path, now: Mapping[str, Any], *, allow: bool, weights_only: bool = False
) -> list[str]:
    """Compare this run with the one that a checkpoint is of; refuse what must not change.

    Args:
        checkpoint: a complete checkpoint.
        now: from facts_of, or from loaded_facts; compared with the checkpoint's of that kind.
        allow: go on with other settings, data, processes or versions.
        weights_only: the optimizer starts fresh, so it may be another one.

    Returns:
        What differs, in words; each was also logged.

    Raises:
        InputError: tensors would have other shapes; something else differs and `allow` is off; or
            the optimizer's state does not fit and `weights_only` is off.

    More or fewer updates are a reason to resume, so they are only reported.
    """
    content = read_seal(checkpoint)
    saved = dict(content.get("facts", {})) if isinstance(content, dict) else {}
    if _ORDER in saved and "adapter.peft_type" not in saved:
        saved = _adapter_facts(_defaults(RotMoleConfig)) | saved  # settings newer than it
    if "model.name" in saved:  # rotmole 0.1 kept it as it was written
        saved["model.name"] = _model_name(saved["model.name"])
    late = all(name.startswith(_LOADED) for name in now)
    removed = [name for name in saved if name not in now and name.startswith(_LOADED) == late]
    comparable = [name for name in now if _is_known(name, saved)]
    changes = [
        Change(name, saved.get(name), now.get(name))
        for name in (*comparable, *removed)
        if saved.get(name) != now.get(name)
    ]
    shapes = [change for change in changes if change.name in _SHAPES]
    refused = [change for change in changes if change.name not in _LENGTH]
    if shapes:
        raise InputError(
            f"cannot go on from {str(checkpoint)!r} with tensors of other shapes: "
            f"{_join(shapes)}. Use the settings of the checkpoint, or another output_dir."
        )
    plateau = any(d.get("training.lr_scheduler_type") in _KEEPS_RATES for d in (saved, now))
    bound = _STATE + (_SCHEDULE if plateau else ())
    unfit = not weights_only and any(change.name.startswith(bound) for change in changes)
    if refused and (unfit or not allow):
        flags = "--allow-change" + (" and --weights-only (a fresh optimizer)" if unfit else "")
        raise InputError(
            f"this run is not the one that {str(checkpoint)!r} is of: {_join(refused)}. Use what "
            f"the checkpoint has, or add {flags} to go on all the same."
        )
    for change in changes:
        logger.warning("going on with a change: %s", change)
    return [str(change) for change in changes]


def check_answers(checkpoint: Path, examples: Mapping[str, Sequence[Example]]) -> None:
    """Refuse chats of which the checkpoint's run learnt the last answer alone, as 0.1.0 did.

    Args:
        checkpoint: a complete checkpoint.
        examples: the training rows by task.

    Raises:
        InputError: this run would learn their earlier answers too.
    """
    content = read_seal(checkpoint)
    saved = content.get("facts", {}) if isinstance(content, dict) else {}
    for task, rows in examples.items():
        if not any(len(row.learnt) > 1 for row in rows):
            continue
        last = [replace(row, learnt=row.learnt[-1:]) for row in rows]
        if saved.get(f"rows of {task}") == _rows_fact(len(last), fingerprint({task: last})):
            raise InputError(
                f"the run that {str(checkpoint)!r} is of learnt the last answer of each chat of "
                f"task {task!r}, as rotmole 0.1.0 did; now loss_on: completion learns all answers. "
                f"Set data.tasks.{task}.loss_on to last to go on as before, or add --allow-change."
            )


def _rows_fact(number: int, sha256: str) -> str:
    return f"{number} rows, sha256 {sha256[:12]}"


def _is_known(name: str, saved: Mapping[str, Any]) -> bool:
    """Tell whether a checkpoint's facts say something about a name, if only by leaving it out."""
    if name.startswith((_VALIDATION, _VALIDATED, *_CHOICE)):  # since 0.2
        return name in saved or (name.startswith(_VALIDATION) and _VALIDATED in saved)
    # an older checkpoint holds no setting that was left to its default
    return name in saved or _ORDER in saved


def check_tensors(model: PeftModel, checkpoint: Path) -> None:
    """Compare the tensors that a run would save with those that a checkpoint holds.

    Args:
        model: that has not trained yet.
        checkpoint: a complete checkpoint.

    Raises:
        InputError: the adapter's tensors have other names or shapes; nothing was loaded.
    """
    if not (checkpoint / WEIGHTS).is_file():
        return
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    needed = {name: tuple(value.shape) for name, value in state.items()}
    stored = {name: entry.shape for name, entry in read_header(checkpoint / WEIGHTS).items()}
    problems = [
        f"{name} is {needed.get(name, 'gone')}, the checkpoint has {stored.get(name, 'none')}"
        for name in sorted(needed | {name: () for name in stored if EXPERTS in f".{name}"})
        if needed.get(name) != stored.get(name)
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise InputError(
            f"cannot go on from {str(checkpoint)!r} with tensors of other shapes: "
            f"{'; '.join(problems[:3])}{more}. Use the settings of the checkpoint, or another "
            "output_dir."
        )


def check_engine(checkpoint: Path, engine: str, *, weights_only: bool) -> bool:
    """Compare the engine that wrote a checkpoint with this run's.

    Each engine of transformers and accelerate reads its own files alone.

    Args:
        checkpoint: a complete checkpoint.
        engine: this run's, from checkpoints.engine_of.
        weights_only: the optimizer's state is not needed.

    Returns:
        Whether the engine can read the checkpoint; if not, its weights have to be loaded by PEFT.

    Raises:
        InputError: it cannot, and the optimizer's state is needed.
    """
    writer = storage_of(checkpoint)
    if writer != engine and not weights_only:
        raise InputError(
            f"{str(checkpoint)!r} was written by {writer}, which {engine} cannot read; start the "
            "run as it was started then, or add --weights-only to go on from its weights with a "
            "fresh optimizer."
        )
    return writer == engine


def _join(changes: list[Change]) -> str:
    return "; ".join(map(str, changes))


def _plain(value: Any) -> Any:
    """Turn a setting into what JSON gives back."""
    if isinstance(value, (set, frozenset)):
        return sorted(map(_plain, value), key=str)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return getattr(value, "value", value)  # an enum of text is its text
    return str(getattr(value, "value", value))
