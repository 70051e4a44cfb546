"""The plug-in for ms-swift: `--tuner_type rotmole`, with the settings of ROTMOLE_ADAPTER."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import TYPE_CHECKING

from peft import get_peft_model
from swift.arguments.tuner_args import TunerArguments
from swift.tuner_plugin import PeftTuner, tuners_map

from rotmole.errors import ConfigError
from rotmole.plugins import adapter_config, changed, foreign, read_settings

if TYPE_CHECKING:
    from swift.arguments import SftArguments
    from torch import nn

NAME = "rotmole"
VARIABLE = "ROTMOLE_ADAPTER"


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
        if given := changed(args, fields(TunerArguments)):
            raise foreign(given, "ms-swift", f"the environment variable {VARIABLE}")
        settings = read_settings(os.environ.get(VARIABLE, ""), VARIABLE)
        return get_peft_model(model, adapter_config(settings, VARIABLE))


tuners_map[NAME] = RotMoleTuner
