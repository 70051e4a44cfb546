"""The plug-in for ms-swift: `--external_plugins` and `--tuner_type rotmole`; settings by ROTMOLE_ADAPTER."""

from __future__ import annotations

import os
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import get_peft_model
from swift.arguments.tuner_args import TunerArguments
from swift.tuner_plugin import PeftTuner, tuners_map

from rotmole.config.yaml_text import parse_yaml
from rotmole.errors import ConfigError
from rotmole.plugins import adapter_config, foreign

if TYPE_CHECKING:
    from swift.arguments import SftArguments
    from torch import nn

NAME = "rotmole"
VARIABLE = "ROTMOLE_ADAPTER"


def settings() -> dict[str, Any]:
    """Read the environment variable: settings between braces, or the path of a YAML file with them.

    Raises:
        ConfigError: if the text or the file holds no settings.
    """
    given = os.environ.get(VARIABLE, "").strip()
    try:
        inline = not given or given.startswith("{")
        text = given if inline else Path(given).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{VARIABLE} is {given!r}, and that file cannot be read: {error}") from error
    values = parse_yaml(text, VARIABLE) or {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{VARIABLE} is {given!r}, which holds no settings; write them as in the adapter "
            "section of a run file, such as {r: 4, num_experts: 8}, or give a file that has them"
        )
    return values


def changed(args: SftArguments) -> dict[str, Any]:
    """Return ms-swift's own settings of adapters that differ from their defaults."""
    result = {}
    for field in fields(TunerArguments):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        value = getattr(args, field.name)
        if str(value).lower() != str(default).lower():  # it turns 'true' into True
            result[f"--{field.name}"] = value
    return result


class RotMoleTuner(PeftTuner):
    """A mixture of rotated LoRA experts as ms-swift's `--tuner_type rotmole`."""

    @staticmethod
    def prepare_model(args: SftArguments, model: nn.Module) -> nn.Module:
        """Add an adapter with the settings of ROTMOLE_ADAPTER to the model.

        Raises:
            ConfigError: for a setting that is wrong, or that this adapter would not follow.
        """
        if args.task_type != "causal_lm":
            raise ConfigError(f"--task_type is {args.task_type}; ROTMOLE trains causal_lm here")
        if given := changed(args):
            raise foreign(given, "ms-swift", f"the environment variable {VARIABLE}")
        return get_peft_model(model, adapter_config(settings(), VARIABLE))


tuners_map[NAME] = RotMoleTuner
