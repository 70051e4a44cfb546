"""The plug-in for axolotl: `plugins: [rotmole.plugins.axolotl.RotMolePlugin]` and `adapter: rotmole`."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftModel, get_peft_model
from pydantic import BaseModel, Field

from rotmole.errors import ConfigError
from rotmole.plugins import adapter_config, foreign
from rotmole.tuner.config import RotMoleConfig

NAME = "rotmole"
FOLLOWED = {"lora_model_dir", "peft_autocast_adapter_dtype"}
PREFIXES = ("lora_", "loraplus_", "peft", "qlora", "relora")
QUANTISED = ("load_in_4bit", "load_in_8bit", "gptq")


class RotMoleArgs(BaseModel):
    """The section that the plug-in adds to axolotl's file."""

    rotmole: dict[str, Any] = Field(
        default_factory=dict,
        description="Settings of RotMoleConfig, as in the adapter section of a run file.",
    )


class RotMolePlugin(BasePlugin):
    """A mixture of rotated LoRA experts as axolotl's `adapter: rotmole`."""

    def get_input_args(self) -> str:
        """Return the class of the section, by name."""
        return f"{__name__}.{RotMoleArgs.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """Return the name of the adapter; no setting of LoRA's applies to it."""
        return [AdapterCapabilities(name=NAME)]

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[Any, RotMoleConfig] | None:
        """Add the adapter to the model, or load the one in `lora_model_dir`.

        Returns:
            The model (None if only the configuration is asked for) and the configuration; None if
            the file names another adapter.

        Raises:
            ConfigError: for a setting that is wrong, or that this adapter would not follow.
        """
        if cfg.adapter != NAME:
            return None
        given = {
            name: value
            for name, value in cfg.items()
            if name.startswith(PREFIXES) and name not in FOLLOWED and value
        }
        if given:
            raise foreign(given, "axolotl", "the section rotmole:")
        if quantised := [name for name in QUANTISED if cfg.get(name)]:
            raise ConfigError(
                f"{quantised[0]} is set, and axolotl quantises only for its own adapters; leave it "
                "out, or train with `rotmole train` and model.quantization"
            )
        config = adapter_config(cfg.rotmole or {}, NAME)
        if config_only:
            return None, config
        more = {}
        if cfg.peft_autocast_adapter_dtype is not None:
            more["autocast_adapter_dtype"] = cfg.peft_autocast_adapter_dtype
        if cfg.lora_model_dir:
            model = PeftModel.from_pretrained(
                model, cfg.lora_model_dir, is_trainable=not inference, **more
            )
            return model, _agrees(model.peft_config["default"], config, cfg)
        return get_peft_model(model, config, **more), config


def _agrees(saved: RotMoleConfig, config: RotMoleConfig, cfg: Any) -> RotMoleConfig:
    """Return the saved configuration; refuse a section that says something else."""
    problems = [
        f"{NAME}.{name} is {getattr(config, name)!r}, and the adapter in {cfg.lora_model_dir} was "
        f"made with {getattr(saved, name)!r}; leave it out"
        for name in cfg.rotmole or {}
        if name != "preset" and getattr(config, name) != getattr(saved, name)
    ]
    if problems:
        raise ConfigError(problems)
    return saved
