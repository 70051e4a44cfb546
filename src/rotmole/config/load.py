"""Read a run file, lay key=value over it, and report every wrong setting at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import ValidationError

from rotmole.config.fields import check_fields, one_of
from rotmole.config.problems import sentences
from rotmole.config.schema import METRICS, DataSection, ModelSection, RunFile, TaskSection
from rotmole.config.sections import optimizer_problems, task_group_problems
from rotmole.config.training import (
    best_problems,
    check_training,
    has_validation,
    sft_arguments,
    warn_without_effect,
)
from rotmole.config.yaml_text import parse_yaml, write_yaml
from rotmole.errors import ConfigError

__all__ = ["load_run", "resolved_yaml", "sft_arguments"]

ADAPTER_REFUSED = {
    "peft_type": "it is always ROTMOLE",
    "task_type": "it is always CAUSAL_LM here",
    "base_model_name_or_path": "write model.name",
    "revision": "write model.revision",
    "auto_mapping": "PEFT fills it in",
    "peft_version": "PEFT fills it in",
    "inference_mode": "training needs it off",
    "format_version": "the library fills it in",
    "base_fingerprint": "the library fills it in",
}


def load_run(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    text: str | None = None,
    *,
    data_problems: Callable[[DataSection], list[str]] | None = None,
    model_problems: Callable[[ModelSection, Mapping[str, Any]], list[str]] | None = None,
) -> RunFile:
    """Read and check a run file; nothing of the model or the data is loaded.

    Args:
        path: the YAML file; only a name in messages where `text` is given.
        overrides: ``a.b=c`` settings laid over the file; c is read as YAML.
        text: the content, in place of reading `path`.
        data_problems: looks further into the data section, such as at whether its files exist; its
            findings are reported with all others.
        model_problems: looks at how model and adapter sections fit; likewise.

    Returns:
        The run, with values under `adapter:` and `training:` converted to their fields' types.

    Raises:
        ConfigError: holding one sentence per wrong setting, all of them.

    Source: our choice.
    """
    where = str(path) if path is not None else "run file"
    raw = parse_yaml(_read(path) if text is None else text, where) or {}
    if not isinstance(raw, dict):
        raise ConfigError(
            "a run file is a mapping of settings, such as `output_dir: runs/1`", where
        )
    problems = [*_override(raw, overrides)]
    try:
        run: RunFile | None = RunFile.model_validate(raw)
    except ValidationError as error:
        run = None
        problems += sentences(error.errors(), raw, RunFile)
    adapter, training, found = _check_sections(raw, model_problems, schema_is_right=run is not None)
    problems += found
    problems += optimizer_problems(_section(raw, "optimizer"), training)
    data = _valid_data(raw)
    if data is not None and data_problems is not None:
        problems += data_problems(data)
    if problems or run is None:
        raise ConfigError([problem.rstrip(".") for problem in problems], where)
    warn_without_effect(training)
    _warn_idle_sections(run, adapter)
    return run.model_copy(update={"adapter": adapter, "training": training})


def _check_sections(
    raw: Mapping[str, Any],
    model_problems: Callable[[ModelSection, Mapping[str, Any]], list[str]] | None,
    *,
    schema_is_right: bool,
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Check what the schema cannot know: the keys that belong to other classes, and metrics."""
    adapter, problems = _check_adapter(_section(raw, "adapter"))
    tasks = _valid_tasks(raw)
    model = _valid_model(raw)
    if model_problems is not None and model is not None and not problems:
        problems += model_problems(model, adapter)
    # a task that is wrong may have had validation rows, so their lack is said only of right files
    validated = any(has_validation(task) for task in tasks.values()) or not schema_is_right
    training, found = check_training(_section(raw, "training"), model or ModelSection(), validated)
    problems += found
    problems += best_problems(training, tasks)
    problems += task_group_problems(tasks, adapter)
    for name, task in tasks.items():
        problems += _metric_problems(name, task)
    return adapter, training, problems


def resolved_yaml(run: RunFile) -> str:
    """Write a run as YAML that `load_run` reads back to the same run, every default spelt out.

    Args:
        run: the run.

    Returns:
        YAML text.

    Source: our choice.
    """
    return write_yaml(run.model_dump(mode="json"))


def _read(path: str | Path | None) -> str:
    if path is None:
        raise ConfigError("give a run file; `rotmole init` writes one to start from")
    path = Path(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = sorted(file.name for file in path.parent.glob("*.y*ml")) if path.parent else []
        hint = f" (there is {', '.join(near[:5])})" if near else ""
        raise ConfigError(
            f"there is no such file{hint}; `rotmole init` writes one to start from.", str(path)
        ) from None
    except IsADirectoryError:
        raise ConfigError("it is a folder; give the run file itself.", str(path)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"not UTF-8 text (byte {error.start}); save it as UTF-8.", str(path)
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}.", str(path)) from error


def _override(raw: dict[str, Any], overrides: Sequence[str]) -> list[str]:
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
    """Return the tasks that are right by themselves, so that one bad task hides no other."""
    tasks = _section(_section(raw, "data"), "tasks")
    valid = {}
    for name, task in tasks.items():
        try:
            valid[name] = TaskSection.model_validate(task)
        except ValidationError:  # reported with the whole file
            continue
    return valid


def _valid_model(raw: Mapping[str, Any]) -> ModelSection | None:
    try:
        return ModelSection.model_validate(_section(raw, "model"))
    except ValidationError:  # reported with the whole file
        return None


def _valid_data(raw: Mapping[str, Any]) -> DataSection | None:
    try:
        return DataSection.model_validate({**_section(raw, "data"), "tasks": _valid_tasks(raw)})
    except ValidationError:  # reported with the whole file
        return None


def _check_adapter(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    from rotmole.tuner.config import RotMoleConfig
    from rotmole.tuner.settings.presets import PRESETS, preset_fields

    names = RotMoleConfig.__dataclass_fields__
    hints = {k: v for k, v in get_type_hints(RotMoleConfig).items() if k in names}
    known = hints | {"preset": str}
    passed, problems = check_fields(values, known, ADAPTER_REFUSED, "adapter")
    preset = passed.pop("preset", None)
    if preset in PRESETS:
        passed = preset_fields(preset, passed)
    elif preset is not None:
        problems.append(f"adapter.preset: {preset!r} is not {one_of(preset, list(PRESETS))}")
    if passed.get("frozen") == "AB" and passed.get("init_weights") != "svd":
        problems.append(
            "adapter.frozen: AB keeps B at zero here, so nothing would be trained; it is for "
            "experts imported with RotMoleModel.from_adapters"
        )
    try:
        with warnings.catch_warnings():
            if problems:
                warnings.simplefilter("ignore")
            RotMoleConfig(task_type="CAUSAL_LM", **passed)
    except ConfigError as error:
        problems += [
            f"adapter{'.' if problem.partition(' is ')[0] in hints else ': '}{problem}"
            for problem in error.problems
        ]
    except (ValueError, TypeError) as error:  # PEFT's own rules
        problems.append(f"adapter: {' '.join(str(error).split())}")
    return passed, problems


def _metric_problems(name: str, task: TaskSection) -> list[str]:
    return [
        f"data.tasks.{name}.metrics: {metric!r} is not {one_of(metric, METRICS)}"
        for metric in task.metrics or []
        if metric not in METRICS
    ]


def _warn_idle_sections(run: RunFile, adapter: Mapping[str, Any]) -> None:
    """Warn by name of settings that cannot act in this run."""
    idle = []
    grouped = [name for name, task in run.data.tasks.items() if task.task_group is not None]
    if grouped and not adapter.get("router_task_loss_coef"):
        setting = f"data.tasks.{grouped[0]}.task_group"
        idle.append((setting, "adapter.router_task_loss_coef is 0"))
    if run.optimizer.riemannian_delta is not None and run.optimizer.name is None:
        idle.append(("optimizer.riemannian_delta", "optimizer.name is not set"))
    if run.optimizer.rotation_gate_lr is not None and adapter.get("rotation") == "none":
        idle.append(("optimizer.rotation_gate_lr", "adapter.rotation is none"))
    if run.optimizer.scaling_gate_lr is not None and adapter.get("num_experts") == 1:
        idle.append(("optimizer.scaling_gate_lr", "with one expert there is no scaling gate"))
    weights = [name for name, task in run.data.tasks.items() if task.weight is not None]
    if run.data.temperature is not None and len(run.data.tasks) == 1:
        idle.append(("data.temperature", "there is only one task"))
    if weights and len(run.data.tasks) == 1:
        idle.append((f"data.tasks.{weights[0]}.weight", "there is only one task"))
    for name, reason in idle:
        warnings.warn(f"{name} has no effect, because {reason}.", stacklevel=3)
