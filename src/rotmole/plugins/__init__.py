"""The method in other programs that train: plug-ins for axolotl and ms-swift, a script for TRL.

All take the settings of the run file's `adapter:` section, checked as there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any

from rotmole.config.adapter import check_adapter
from rotmole.config.yaml_text import parse_yaml
from rotmole.errors import ConfigError
from rotmole.tuner.config import RotMoleConfig


def adapter_config(settings: Mapping[str, Any], where: str) -> RotMoleConfig:
    """Return the configuration that the keys of an `adapter:` section describe.

    Args:
        settings: names and values as in a run file, `preset` included.
        where: the section's name in the message of an error.

    Raises:
        ConfigError: listing every setting that is wrong.
    """
    _, config, problems = check_adapter(settings)
    if config is not None and not isinstance(config, RotMoleConfig):
        problems = [f"adapter.peft_type is {config.peft_type.value}; this plug-in makes ROTMOLE"]
    if problems:
        raise ConfigError([problem.replace("adapter.", f"{where}.", 1) for problem in problems])
    assert isinstance(config, RotMoleConfig)
    return config


def read_settings(given: str, where: str) -> dict[str, Any]:
    """Return settings that are given as text: between braces, or the path of a YAML file with them.

    Args:
        given: `{r: 4, num_experts: 8}`, or a path; empty for none.
        where: what holds the text, in the message of an error.

    Raises:
        ConfigError: there is no such file, or it holds no settings.
    """
    given = given.strip()
    try:
        inline = not given or given.startswith("{")
        text = given if inline else Path(given).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{where} is {given!r}, a file that cannot be read ({error}); give the path of a YAML "
            "file, or settings between braces, such as {r: 4, num_experts: 8}"
        ) from error
    values = parse_yaml(text, where) or {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{where} is {given!r}, which holds no settings; write them as in the adapter section "
            "of a run file, such as {r: 4, num_experts: 8}"
        )
    return values


def changed(given: Any, options: Iterable[Field[Any]]) -> dict[str, Any]:
    """Return --name and value of the options that are not at their defaults, compared as text.

    As text, because ms-swift turns 'true' into True.

    Args:
        given: the dataclass that the other program has parsed.
        options: those of its fields that are about adapters.
    """
    result = {}
    for option in options:
        factory = option.default_factory
        default = option.default if factory is MISSING else factory()
        value = getattr(given, option.name)
        if str(value).lower() != str(default).lower():
            result[f"--{option.name}"] = value
    return result


def foreign(given: Mapping[str, Any], program: str, where: str) -> ConfigError:
    """Return the error for settings of the other program that this method would not follow.

    Args:
        given: name and value of each.
        program: the other program.
        where: the section that takes their place.
    """
    return ConfigError(
        [
            f"{name} is {value!r}, a setting of {program}'s own adapters, which ROTMOLE would not "
            f"follow; leave it out, and write what you mean into {where}"
            for name, value in given.items()
        ]
    )
