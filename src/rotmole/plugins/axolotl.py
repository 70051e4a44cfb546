"""The plug-in for axolotl, rotmole.plugins.axolotl.RotMolePlugin: `adapter: rotmole`."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from axolotl.utils.schemas.peft import LoraConfig
from peft import PeftModel, get_peft_model
from pydantic import BaseModel, Field

from rotmole.errors import ConfigError
from rotmole.plugins import adapter_config, foreign
from rotmole.tuner.config import RotMoleConfig

NAME = "rotmole"
FOLLOWED = {"adapter", "lora_model_dir", "merge_method", "peft_autocast_adapter_dtype"}
QUANTISED = {"load_in_4bit", "load_in_8bit", "gptq", "bnb_config_kwargs"}


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

    def register(self, cfg: dict[str, Any]) -> None:
        """Refuse to merge, which axolotl would try for every adapter.

        Raises:
            ConfigError: for `axolotl merge-lora`.
        """
        if cfg.get("adapter") == NAME and cfg.get("merge_lora"):
            raise ConfigError(
                "merge_lora is set, and a mixture cannot be merged into its base, because each "
                "token gets a map of its own; `rotmole export --lora` writes the nearest LoRA"
            )

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
            name: cfg[name]
            for name, field in LoraConfig.model_fields.items()
            if name not in FOLLOWED | QUANTISED
            and cfg.get(name) not in (None, False, field.default)
        }
        if given:
            raise foreign(given, "axolotl", "the section rotmole:")
        if quantised := [name for name in sorted(QUANTISED) if cfg.get(name)]:
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
