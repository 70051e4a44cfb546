"""Checks of an adapter folder before anything is loaded from it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, get_type_hints

from rotmole.config.fields import convert
from rotmole.errors import AdapterError, ConfigError, did_you_mean
from rotmole.files import atomic_write_text
from rotmole.models.builtin import BUILT_IN, BuiltIn, built_in_folder
from rotmole.tuner.config import foreign_module
from rotmole.tuner.storage.weights import (
    WEIGHTS,
    header_problems,
    read_header,
    refuse_pickle,
    value_problems,
)

CONFIG = "adapter_config.json"


def check_adapter_folder(path: str | Path) -> dict[str, Any]:
    """Check the configuration and the weights of an adapter folder; no model is needed.

    Args:
        path: the folder, of any PEFT method; only RotMoLE's are checked field by field.

    Returns:
        The configuration as saved.

    Raises:
        AdapterError: the folder has problems; lists all of them with value and rule.
    """
    folder = Path(path)
    config = read_config(folder)
    problems = field_problems(config)
    comparable = config.get("peft_type") == "ROTMOLE" and not problems
    problems += weight_problems(folder, config if comparable else {})
    if len(problems) == 1:
        raise AdapterError(f"adapter folder {str(folder)!r}: {problems[0].rstrip('.')}.")
    if problems:
        lines = "".join(f"\n  - {problem.rstrip('.')}" for problem in problems)
        raise AdapterError(f"adapter folder {str(folder)!r}: {len(problems)} problems:{lines}")
    return config


def name_base(folder: Path) -> None:
    """Name a built-in base model in a saved adapter as others find it: by its id on the hub.

    Args:
        folder: of the adapter; its configuration may name a folder of this machine's cache.

    Raises:
        StorageError: the file cannot be written.
    """
    file = folder / CONFIG
    if not file.is_file():
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    built_in = _named_in_cache(config.get("base_model_name_or_path"))
    if built_in is not None:
        config["base_model_name_or_path"] = built_in.hub_id
        atomic_write_text(file, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _named_in_cache(name: str | None) -> BuiltIn | None:
    for built_in in BUILT_IN.values():
        if name and Path(name) == built_in_folder(built_in):
            return built_in
    return None


def read_config(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json.

    Raises:
        AdapterError: the folder or file is missing, or the file is not a JSON object.
    """
    if not folder.is_dir():
        raise AdapterError(f"adapter folder {str(folder)!r}: there is no such folder.")
    file = folder / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        subfolders = sorted(str(p.parent.relative_to(folder)) for p in folder.glob(f"*/{CONFIG}"))
        hint = f"; did you mean {str(folder / subfolders[0])!r}?" if subfolders else "."
        raise AdapterError(f"adapter folder {str(folder)!r}: it has no {CONFIG}{hint}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterError(
            f"{file}: not JSON ({error}); save the adapter again or restore the file."
        ) from error
    except OSError as error:
        raise AdapterError(f"{file}: cannot be read: {error.strerror}.") from error
    if not isinstance(config, dict):
        raise AdapterError(
            f"{file}: a JSON {type(config).__name__}, not an object of settings; save the adapter "
            "again or restore the file."
        )
    return config


def field_problems(config: dict[str, Any]) -> list[str]:
    """Return every problem with the fields of an adapter configuration, one sentence each.

    Warns of unknown keys that do not belong to the method, and of modules outside transformers.
    """
    from peft import PeftType

    from rotmole.tuner.config import REQUIRED, RotMoleConfig

    kind = config.get("peft_type")
    if kind is None:
        return ["peft_type is missing; it must name the method, such as ROTMOLE"]
    if kind not in [str(member.value) for member in PeftType]:
        words = [str(member.value) for member in PeftType]
        hint = did_you_mean(kind, words)
        return [f"peft_type is {kind!r}, which the installed PEFT does not know{hint}"]
    if kind != "ROTMOLE":
        return []
    problems = [
        f"{key} is missing; it must be there because it changes the outputs"
        for key in REQUIRED
        if key not in config
    ]
    names = RotMoleConfig.__dataclass_fields__
    hints = {k: v for k, v in get_type_hints(RotMoleConfig).items() if k in names}
    settings = {}
    for key, value in config.items():
        if key in hints:
            _, problem = convert(value, hints[key], key)
            problems += [problem] if problem else []
            settings |= {} if problem else {key: value}
    problems += _unknown_problems({key: v for key, v in config.items() if key not in hints})
    foreign = foreign_module(config.get("auto_mapping"))
    if foreign:
        warnings.warn(f"{CONFIG}: {foreign}.", stacklevel=3)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            RotMoleConfig(**settings)
    except ConfigError as error:
        problems += error.problems
    except (ValueError, TypeError) as error:  # PEFT's own rules
        problems.append(" ".join(str(error).split()))
    return problems


def _unknown_problems(unknown: dict[str, Any]) -> list[str]:
    from rotmole.tuner.config import RotMoleConfig

    try:
        RotMoleConfig.check_kwargs(**unknown)
    except AdapterError as error:
        return [str(error).removeprefix(f"{CONFIG}: ")]
    for key in unknown:
        warnings.warn(f"{CONFIG}: the unknown key {key!r} is ignored.", stacklevel=4)
    return []


def weight_problems(folder: Path, config: dict[str, Any]) -> list[str]:
    """Return every problem with the weights of an adapter folder, one sentence each.

    The file's header is read, then each tensor's format and values. Pickle files are refused by
    name and never opened.

    Args:
        config: a correct RotMoLE configuration, with which the weights are compared; {} compares
            nothing.
    """
    from safetensors import safe_open

    from rotmole.tuner.config import RotMoleConfig

    file = folder / WEIGHTS
    try:
        refuse_pickle(folder)
        if not file.is_file():
            return [f"it has a configuration but no {WEIGHTS}; copy the whole folder again"]
        header = read_header(file)
    except AdapterError as error:
        return [str(error).removeprefix(f"{folder}: ").removeprefix(f"{folder}/")]
    if not header:
        return [f"{WEIGHTS} contains no tensor; save the adapter again"]
    problems = []
    if config:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # field_problems has already shown the warnings
            names = RotMoleConfig.__dataclass_fields__
            settings = RotMoleConfig(**{k: v for k, v in config.items() if k in names})
        problems += header_problems(settings, header)
        if not problems:
            with safe_open(file, framework="pt") as weights:
                problems += value_problems((name, weights.get_tensor(name)) for name in header)
    return [f"{WEIGHTS}: {problem}" for problem in problems]
