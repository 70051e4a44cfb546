"""Read a run file, lay key=value over it, and report every wrong setting at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from rotmole.config.adapter import check_adapter
from rotmole.config.experts_from import imported_experts
from rotmole.config.names import did_you_mean_place
from rotmole.config.paths import anchor_paths
from rotmole.config.problems import sentences
from rotmole.config.schema import (
    METRICS,
    DataSection,
    ExpertsFromSection,
    ModelSection,
    RunFile,
    Section,
    TaskSection,
)
from rotmole.config.sections import early_stopping_problems, optimizer_problems, task_group_problems
from rotmole.config.start import settings_from
from rotmole.config.training import (
    arguments,
    best_problems,
    check_training,
    has_validation,
    sft_arguments,
    warn_without_effect,
)
from rotmole.config.yaml_text import parse_yaml, write_yaml
from rotmole.errors import ConfigError, one_of
from rotmole.tuner.settings.presets import FREE

if TYPE_CHECKING:
    from peft import PeftConfig

    from rotmole.tuner.loras import Lora

_S = TypeVar("_S", bound=Section)
ModelProblems = Callable[[ModelSection, "PeftConfig | None", "Sequence[Lora]"], list[str]]
"""(model section, adapter, trained adapters) -> why they do not fit; no adapter if it is wrong."""

__all__ = ["load_run", "resolved_yaml", "sft_arguments"]


def load_run(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    text: str | None = None,
    *,
    data_problems: Callable[[DataSection], list[str]] | None = None,
    model_problems: ModelProblems | None = None,
    anchored: bool = True,
    check_trainer: bool = True,
) -> RunFile:
    """Read and check a run file; nothing of the model or the data is loaded.

    Relative paths in the file (output_dir, data.root, a local model.name) are relative to its
    folder; those of overrides to the working directory.

    Args:
        path: the YAML file; if `text` is given, only a name for messages.
        overrides: ``a.b=c`` settings that replace the file's; c is read as YAML.
        text: the content, in place of reading `path`.
        data_problems: a further check of the data section, such as whether its files exist; its
            problems are reported with all others.
        model_problems: a further check of whether the adapter, and the trained adapters of
            experts_from, fit the model; likewise.
        anchored: False leaves relative paths to the working directory, as in a run folder's own
            run.yaml: rotmole 0.1 wrote them so, later versions write absolute ones.
        check_trainer: False takes the `training:` section as it is; trl, which checks it, takes
            seconds to import.

    Returns:
        The run, with values under `adapter:` and `training:` converted to their fields' types, and
        with the adapter's configuration (`RunFile.adapter_config`).

    Raises:
        ConfigError: holding one sentence for each wrong setting.
    """
    where = str(path) if path is not None else "run file"
    raw = parse_yaml(read_text(path) if text is None else text, where) or {}
    if not isinstance(raw, dict):
        raise ConfigError(
            "a run file is a mapping of settings, such as `output_dir: runs/1`", where
        )
    if path is not None and anchored:
        anchor_paths(raw, Path(path).expanduser().parent)
    _replace_by_preset(raw, overrides, where)
    problems = [*lay_over(raw, overrides)]
    try:
        run: RunFile | None = RunFile.model_validate(raw)
    except ValidationError as error:
        run = None
        problems += sentences(error.errors(), raw, RunFile, suggest=did_you_mean_place)
    checked = _check_sections(
        raw, model_problems, schema_is_right=run is not None, check_trainer=check_trainer
    )
    problems += checked.problems
    problems += optimizer_problems(_section(raw, "optimizer"), checked.training, checked.adapter)
    data = _valid_data(raw)
    if data is not None and data_problems is not None:
        problems += data_problems(data)
    if problems or run is None or checked.config is None:
        raise ConfigError([problem.rstrip(".") for problem in problems], where)
    warn_without_effect(checked.training)
    _warn_idle_sections(run, checked.adapter)
    run.training = checked.training
    run.set_adapter(checked.adapter, checked.config)
    return run


@dataclass(frozen=True)
class _Checked:
    """The sections whose keys belong to other classes, after checking.

    Attributes:
        adapter, training: the values that passed, converted.
        config: made of `adapter`; None if it has a problem.
        problems: one sentence each.
    """

    adapter: dict[str, Any]
    training: dict[str, Any]
    config: PeftConfig | None
    problems: list[str]


def _check_sections(
    raw: Mapping[str, Any],
    model_problems: ModelProblems | None,
    *,
    schema_is_right: bool,
    check_trainer: bool,
) -> _Checked:
    """Check what the schema cannot know: the keys that belong to other classes, and metrics."""
    section: Mapping[str, Any] = _section(raw, "adapter")
    start_problems: list[str] = []
    starts = isinstance(raw.get("init_from"), str) and bool(raw["init_from"])
    if starts:
        section, start_problems = settings_from(raw["init_from"], section)
    imported = imported_experts(_valid(raw, "experts_from", ExpertsFromSection), section)
    if starts and imported.decided:
        start_problems.append(
            "init_from and experts_from both say where the weights start; leave one of them out"
        )
    adapter, config, problems = check_adapter(
        section, did_you_mean_place, imported.decided, starts=starts
    )
    problems = [*start_problems, *imported.problems, *problems]
    config = None if imported.problems else config
    tasks = _valid_tasks(raw)
    model = _valid(raw, "model", ModelSection)
    if model_problems is not None and model is not None and (config or imported.loras):
        problems += model_problems(model, config, imported.loras)
    # a task with a wrong setting may have validation rows, so do not report that none has any
    validated = any(has_validation(task) for task in tasks.values()) or not schema_is_right
    section = _section(raw, "training")
    training = dict(section)
    if check_trainer:
        training, training_problems = check_training(
            section, model or ModelSection(), validated, did_you_mean_place
        )
        problems += training_problems
        problems += best_problems(training, tasks)
        if not training_problems:
            merged = arguments(training, "run", 0, model or ModelSection(), validated)
            problems += early_stopping_problems(_section(raw, "evaluation"), merged, validated)
    problems += task_group_problems(tasks, adapter)
    for name, task in tasks.items():
        problems += _metric_problems(name, task)
    return _Checked(adapter, training, config, problems)


def resolved_yaml(run: RunFile) -> str:
    """Write a run as YAML that `load_run` reads back to the same run, with every default.

    Its paths are absolute, so that the file can be moved.
    """
    content = run.model_dump(mode="json")
    anchor_paths(content, Path.cwd())
    return write_yaml(content)


def read_text(path: str | Path | None) -> str:
    """Read a run file or a study file.

    Raises:
        ConfigError: there is no such file, or it is no text.
    """
    if path is None:
        raise ConfigError("give a run file; `rotmole init` writes one")
    path = Path(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = sorted(file.name for file in path.parent.glob("*.y*ml")) if path.parent else []
        hint = f" (there is {', '.join(near[:5])})" if near else ""
        raise ConfigError(
            f"there is no such file{hint}; `rotmole init` writes a run file.", str(path)
        ) from None
    except IsADirectoryError:
        raise ConfigError("it is a folder; give the run file itself.", str(path)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"not UTF-8 text (byte {error.start}); save it as UTF-8.", str(path)
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}.", str(path)) from error


def _replace_by_preset(raw: dict[str, Any], overrides: Sequence[str], where: str) -> None:
    """Drop what the file says of the method, if the command line chooses another one."""
    adapter = raw.get("adapter")
    keys = [entry.partition("=")[0].strip() for entry in overrides]
    chosen = [key for key in ("adapter.preset", "adapter.peft_type") if key in keys]
    if not chosen or not isinstance(adapter, dict):
        return
    dropped = [name for name in adapter if name not in FREE]
    for name in dropped:
        del adapter[name]
    dropped = [name for name in dropped if name not in ("preset", "peft_type")]
    if dropped:
        warnings.warn(
            f"{chosen[0]} on the command line replaces {', '.join(dropped)} of {where}.",
            stacklevel=3,
        )


def lay_over(raw: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Lay key=value settings over a file as parsed.

    Args:
        raw: changed in place.
        overrides: ``a.b=c``; c is read as YAML.

    Returns:
        One sentence for each that cannot be laid over it.
    """
    problems = []
    for entry in overrides:
        key, equals, text = entry.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            problems.append(
                f"{entry!r} is not of the form key=value, such as training.max_steps=10."
            )
            continue
        try:
            value = parse_yaml(text, entry)
        except ConfigError as error:
            problems.append(str(error))
            continue
        section: Any = raw
        for depth, part in enumerate(parts[:-1]):
            if section.get(part) is None:
                section[part] = {}
            section = section[part]
            if not isinstance(section, dict):
                problems.append(f"{entry!r}: {'.'.join(parts[: depth + 1])} holds no settings.")
                break
        else:
            section[parts[-1]] = value
    return problems


def _section(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = raw.get(name)
    return {str(k): v for k, v in section.items()} if isinstance(section, dict) else {}


def _valid_tasks(raw: Mapping[str, Any]) -> dict[str, TaskSection]:
    """Return the tasks without a problem, so that a wrong task does not hide another one."""
    tasks = _section(_section(raw, "data"), "tasks")
    valid = {}
    for name, task in tasks.items():
        try:
            valid[name] = TaskSection.model_validate(task)
        except ValidationError:  # reported with the whole file
            continue
    return valid


def _valid(raw: Mapping[str, Any], name: str, kind: type[_S]) -> _S | None:
    try:
        return kind.model_validate(_section(raw, name))
    except ValidationError:  # reported with the whole file
        return None


def _valid_data(raw: Mapping[str, Any]) -> DataSection | None:
    try:
        return DataSection.model_validate({**_section(raw, "data"), "tasks": _valid_tasks(raw)})
    except ValidationError:  # reported with the whole file
        return None


def _metric_problems(name: str, task: TaskSection) -> list[str]:
    return [
        one_of(f"data.tasks.{name}.metrics", metric, METRICS)
        for metric in task.metrics or []
        if metric not in METRICS
    ]


def _warn_idle_sections(run: RunFile, adapter: Mapping[str, Any]) -> None:
    """Warn of settings that have no effect in this run."""
    idle = []
    grouped = [name for name, task in run.data.tasks.items() if task.task_group is not None]
    if grouped and not adapter.get("router_task_loss_coef"):
        setting = f"data.tasks.{grouped[0]}.task_group"
        idle.append((setting, "adapter.router_task_loss_coef is 0"))
    other = adapter.get("peft_type")
    chosen = run.optimizer.name or "not set"
    if run.optimizer.riemannian_delta is not None and not chosen.startswith("riemannian"):
        reason = f"optimizer.name is {chosen}"
        idle.append(("optimizer.riemannian_delta", reason))
    if other is not None:
        idle += [
            (f"optimizer.{name}", f"adapter.peft_type is {other}, which has no such parameters")
            for name in ("scaling_gate_lr", "rotation_gate_lr", "lora_plus_ratio")
            if getattr(run.optimizer, name) is not None
        ]
    elif run.optimizer.rotation_gate_lr is not None and adapter.get("rotation") == "none":
        idle.append(("optimizer.rotation_gate_lr", "adapter.rotation is none"))
    if run.optimizer.scaling_gate_lr is not None and adapter.get("num_experts") == 1:
        idle.append(("optimizer.scaling_gate_lr", "with one expert there is no scaling gate"))
    if run.optimizer.expert_lr_by_load != "none" and adapter.get("num_experts") == 1:
        idle.append(("optimizer.expert_lr_by_load", "with one expert nothing is chosen"))
    weights = [name for name, task in run.data.tasks.items() if task.weight is not None]
    if run.data.temperature is not None and len(run.data.tasks) == 1:
        idle.append(("data.temperature", "there is only one task"))
    if weights and len(run.data.tasks) == 1:
        idle.append((f"data.tasks.{weights[0]}.weight", "there is only one task"))
    for name, reason in idle:
        warnings.warn(f"{name} has no effect, because {reason}.", stacklevel=3)
