"""The method in other programs that train: a plug-in each for axolotl and ms-swift.

Both take the settings of the run file's `adapter:` section, checked as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rotmole.config.adapter import check_adapter
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
