"""RotMoleConfig: the settings of the method as a configuration of PEFT's, checked all at once."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, PeftType

from rotmole.errors import AdapterError, ConfigError, did_you_mean
from rotmole.tuner.settings.notices import notices
from rotmole.tuner.settings.presets import preset_fields
from rotmole.tuner.settings.rules import setting_problems
from rotmole.tuner.settings.settings import Settings
from rotmole.tuner.storage.fingerprint import fingerprint_problems
from rotmole.tuner.storage.saved import complete_folder
from rotmole.tuner.storage.weights import WEIGHTS, header_problems, read_header, refuse_pickle

FORMAT_VERSION = 1

REQUIRED = (
    "base_model_name_or_path", "r", "lora_alpha", "num_experts", "top_k", "selection",
    "norm_topk_prob", "rotation", "target_modules", "format_version",
)  # fmt: skip
"""Keys that a saved configuration must have, because their defaults could change the outputs."""

# An unknown key in a saved configuration changes the outputs if its first word is one of these;
# PEFT's own future keys do not.
_OUR_WORDS = (
    "r", "alpha", "balance", "expert", "experts", "gate", "lora", "norm", "num", "radar", "rank",
    "rotation", "routed", "router", "scaling", "scoring", "selection", "share", "shared", "top",
)  # fmt: skip


@dataclass
class RotMoleConfig(Settings, PeftConfig):  # type: ignore[misc] # peft ships no types
    """Configuration of a mixture of low-rank experts gated by scaling and rotation.

        y = W x + s * sum_{e in S(x)} g_e(x) * R_e(x)[ A_e drop(x) ] B_e
              + s_0 * g_0(x) * R_0(x)[ A_0 drop(x) ] B_0             with a shared expert

    Settings that PEFT's LoRA has too keep PEFT's names. docs/reference.md lists every setting with
    its default, its allowed values and its meaning.

    Raises:
        ConfigError: (a ValueError) listing every setting that is wrong.
    """

    format_version: int = field(
        default=FORMAT_VERSION,
        metadata={"help": "Version of the saved format; the library sets it.", "range": None},
    )
    base_fingerprint: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Architecture and shapes of the base model; the library sets it when the "
            "adapter is put on a model, and compares it when a saved adapter is loaded.",
            "range": None,
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("ROTMOLE")
        self.is_saved = self.base_fingerprint is not None  # only a saved one comes with it
        if self.ensure_weight_tying:
            self.modules_to_tie: Any = None  # PEFT fills it in, and saves it not
        foreign = foreign_module(self.auto_mapping)
        if foreign:
            warnings.warn(foreign, stacklevel=3)
            self.auto_mapping: dict[str, Any] | None = None
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)  # as PEFT's own configs keep it
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)
        if self.top_k is None and isinstance(self.num_experts, int):
            self.top_k = 2 if self.is_routed else 1
        problems = setting_problems(self, self.task_type)
        if self.format_version != FORMAT_VERSION:
            problems.append(
                f"format_version is {self.format_version!r}; this version of rotmole reads "
                f"{FORMAT_VERSION}, so a newer rotmole is needed to read this adapter"
            )
        problems += fingerprint_problems(self.base_fingerprint)
        if problems:
            raise ConfigError(problems, "RotMoleConfig")
        for notice in notices(self):
            warnings.warn(notice, stacklevel=3)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> RotMoleConfig:
        """Make the configuration of a published method; docs/family.md describes the methods.

            RotMoleConfig.preset("goat", r=4, task_type="CAUSAL_LM")

        Args:
            name: "lora" (arXiv 2106.09685), "moe_lora" (1701.06538), "hydralora" (2404.19245),
                "loramoe" (2312.09979), "mola" (2402.08562), "mixlora" (2404.15159), "adamole"
                (2405.00361), "goat" (2502.16894), "switch" (2101.03961), "top_p" (2403.07652),
                "deepseekmoe" (2401.06066), "radargate" (2505.23184), "rotmole" (2605.25565),
                "flylora" (2510.08396) or "deepseek_v3" (2412.19437).
            overrides: further settings, which replace the preset's.

        Raises:
            ConfigError: no such preset, or settings that do not fit.
        """
        return cls(**preset_fields(name, overrides))

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the configuration, which PEFT does last; then complete what else it saved.

        See rotmole.tuner.storage.saved: no pickles, readable files, a card that can be followed.
        """
        super().save_pretrained(save_directory, **kwargs)
        complete_folder(Path(save_directory), self.base_model_name_or_path)

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Refuse keys of a saved configuration that would change the mathematics.

        Raises:
            AdapterError: naming each such key and the nearest known one; other unknown keys are
                left to PEFT, which warns about them.
        """
        if kwargs.get("peft_type", "ROTMOLE") != "ROTMOLE":
            return (
                kwargs  # another method's file, from which PEFT makes that method's configuration
            )
        absent = [key for key in REQUIRED if key not in kwargs]
        if absent and "peft_type" in kwargs:
            raise AdapterError(
                f"adapter_config.json: {', '.join(absent)} missing; their defaults could change "
                "the outputs, so save the adapter again or restore the file"
            )
        names = {entry.name for entry in fields(cls)}
        problems = []
        for key in sorted(set(kwargs) - names):
            hint = did_you_mean(key, names, cutoff=0.8)
            if hint or key.split("_")[0] in _OUR_WORDS:
                problems.append(f"unknown key {key!r} = {kwargs[key]!r}{hint}")
        if problems:
            raise AdapterError(
                f"adapter_config.json: {'; '.join(problems)}; this version of rotmole does not "
                "know what it does to the outputs; update rotmole, or remove the key if it is a "
                "typo"
            )
        return kwargs

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> RotMoleConfig:
        """Read a saved configuration; in a local folder, check the header of the weights as well.

        Raises:
            AdapterError: a key that changes the outputs is missing or unknown, or the weights are
                a pickle, damaged, not floating-point, or of another rank or number of experts.
            ConfigError: a value is wrong.
        """
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        local = (folder / CONFIG_NAME).is_file()
        if local:
            refuse_pickle(folder)
        config: RotMoleConfig = super().from_pretrained(
            pretrained_model_name_or_path, subfolder=subfolder, **kwargs
        )
        if local and (folder / WEIGHTS).is_file():
            problems = header_problems(config, read_header(folder / WEIGHTS))
            if problems:
                raise AdapterError(f"{folder / WEIGHTS}: {'; '.join(problems)}")
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Read a saved configuration.

        Raises:
            AdapterError: the file is not a JSON object.
        """
        try:
            attributes: Any = super().from_json_file(path_json_file, **kwargs)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise AdapterError(f"{path_json_file} is not valid JSON: {error}") from error
        if not isinstance(attributes, dict):
            raise AdapterError(f"{path_json_file} must hold a JSON object of settings")
        return attributes


def foreign_module(mapping: object) -> str | None:
    """Return a notice if an auto_mapping names a module that is not transformers'."""
    if mapping is None:
        return None
    library = mapping.get("parent_library") if isinstance(mapping, dict) else mapping
    if isinstance(library, str) and library.partition(".")[0] == "transformers":
        return None
    return (
        f"auto_mapping names the module {library!r}, which is not part of transformers; it is "
        "never imported, and auto_mapping is ignored"
    )
