"""RotMoleConfig: every setting of the adapter, checked all at once."""

from __future__ import annotations

import difflib
import json
import re
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, PeftType

from rotmole.errors import AdapterError, ConfigError
from rotmole.tuner.config_rules import (
    FORMAT_VERSION,
    choice_problems,
    count_problems,
    fingerprint_problems,
    foreign_module,
    notices,
    number_problems,
    rule_problems,
    target_problems,
)
from rotmole.tuner.stored import WEIGHTS, header_problems, read_header, refuse_pickle

REQUIRED = (
    "base_model_name_or_path", "r", "lora_alpha", "num_experts", "top_k", "selection",
    "norm_topk_prob", "rotation", "target_modules", "format_version",
)  # fmt: skip
"""Keys of a saved configuration without which a default would change the outputs silently."""

# A key in a saved configuration that this version does not know changes the mathematics if it
# speaks of one of these; PEFT's own future keys do not.
_OUR_WORDS = (
    "r", "alpha", "balance", "expert", "experts", "gate", "lora", "norm", "num", "radar", "rank",
    "rotation", "router", "scaling", "selection", "share", "top",
)  # fmt: skip


@dataclass
class RotMoleConfig(PeftConfig):  # type: ignore[misc] # peft ships no types
    """Configuration of a mixture of low-rank experts gated by scaling and rotation.

        y = W x + s * sum_{e in S(x)} g_e(x) * R_e(x)[ A_e drop(x) ] B_e

    Names are PEFT's where PEFT's LoRA has the setting, and the field's where it has not.

    Args:
        r: R, rank of each expert.
        lora_alpha: s = lora_alpha / r (with `use_rslora`, lora_alpha / sqrt(r)).
        lora_dropout: probability of dropping an input of A and of vector gates.
        use_rslora: see lora_alpha.
        num_experts: E. With 1 there is no router, and rotation "none" is LoRA itself.
        top_k: K, experts a token uses; None is 2, or 1 if there is one expert.
        router: how experts are scored: "linear".
        selection: "top_k" or "dense" (every expert, weighted by its probability).
        norm_topk_prob: whether the K weights sum to one; false leaves them at their probability.
        rotation: the rotation gate, a name in rotmole.ops.ROTATIONS; see docs/method.md.
        rotation_input: what the vector gate of `bias` reads: "x" or "z".
        rotation_metric: "rank" keeps the length of z, "output" that of the expert's output.
        rotation_planes: planes of `givens`; None is r/2.
        radar_rank: hidden width of `radar` (None is 8) and of `radar_pairs` (None: constant).
        radar_normalize: divide radar's features by their root mean square.
        router_aux_loss_coef: weight of the load-balance loss (1 when balanced), averaged over the
            adapted layers; it acts through the gradient and is not part of the reported loss.
        router_aux_loss_scope: "sequence" (does not depend on how a batch is split) or
            "micro_batch" (does).
        router_z_loss_coef: weight of the router z-loss, treated likewise.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, rank_pattern,
            alpha_pattern, modules_to_save, trainable_token_indices: as in PEFT's LoraConfig.
        init_weights: True starts at the base model's output (B = 0, rotations at the identity);
            False draws everything at random, for tests.
        format_version: version of the saved format; set by the library.
        base_fingerprint: what the base model looks like (rotmole.tuner.fingerprint); set by the
            library when the adapter is put on a model, compared when a saved one is.

    Raises:
        ConfigError: (a ValueError) listing every setting that is wrong.
    """

    r: int = field(default=8, metadata={"help": "Rank of each expert."})
    lora_alpha: float = field(default=16, metadata={"help": "The scale is lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the experts' input."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r)."})
    num_experts: int = field(default=4, metadata={"help": "Experts in each adapted layer."})
    top_k: int | None = field(default=None, metadata={"help": "Experts a token uses."})
    router: str = field(default="linear", metadata={"help": "How experts are scored."})
    selection: str = field(default="top_k", metadata={"help": "top_k or dense."})
    norm_topk_prob: bool = field(default=True, metadata={"help": "Selected weights sum to one."})
    rotation: str = field(default="tangent", metadata={"help": "The rotation gate."})
    rotation_input: str = field(default="x", metadata={"help": "x, or z for bias."})
    rotation_metric: str = field(default="rank", metadata={"help": "rank or output."})
    rotation_planes: int | None = field(default=None, metadata={"help": "Planes of givens."})
    radar_rank: int | None = field(default=None, metadata={"help": "Hidden width of radar."})
    radar_normalize: bool = field(default=True, metadata={"help": "Normalise radar's features."})
    router_aux_loss_coef: float = field(default=0.0, metadata={"help": "Load-balance weight."})
    router_aux_loss_scope: str = field(default="sequence", metadata={"help": "Over what it acts."})
    router_z_loss_coef: float = field(default=0.0, metadata={"help": "Router z-loss weight."})
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names, a regular expression, or 'all-linear'."}
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names or a regular expression to leave out."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Layer indices to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Rank of modules that match a pattern."}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "lora_alpha of modules that match a pattern."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save whole."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Token embeddings to train."}
    )
    init_weights: bool = field(default=True, metadata={"help": "False: random, for tests."})
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Saved format."})
    base_fingerprint: dict[str, Any] | None = field(
        default=None, metadata={"help": "What the base model looks like."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("ROTMOLE")
        self.is_saved = self.base_fingerprint is not None  # only a saved one comes with it
        foreign = foreign_module(self.auto_mapping)
        if foreign:
            warnings.warn(foreign, stacklevel=3)
            self.auto_mapping: dict[str, Any] | None = None
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)  # as PEFT's own configs keep it
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)
        if self.top_k is None and isinstance(self.num_experts, int):
            self.top_k = min(2, max(1, self.num_experts))
        problems = [*count_problems(self), *number_problems(self), *choice_problems(self)]
        problems += [*target_problems(self), *fingerprint_problems(self)]
        broken = {re.split(r"[ \[]", problem, maxsplit=1)[0] for problem in problems}
        problems += rule_problems(self, broken)
        if problems:
            raise ConfigError(problems, "RotMoleConfig")
        for notice in notices(self):
            warnings.warn(notice, stacklevel=3)

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Refuse keys of a saved configuration that would change the mathematics.

        Raises:
            AdapterError: naming each such key and the nearest known one; other unknown keys are
                left to PEFT, which warns about them.
        """
        if kwargs.get("peft_type", "ROTMOLE") != "ROTMOLE":
            return kwargs  # another method's file: PEFT makes that method's configuration of it
        absent = [key for key in REQUIRED if key not in kwargs]
        if absent and "peft_type" in kwargs:
            raise AdapterError(
                f"adapter_config.json: {', '.join(absent)} missing; without them the outputs could "
                "change unseen, so save the adapter again or restore the file"
            )
        known = {entry.name for entry in fields(cls)}
        problems = []
        for key in sorted(set(kwargs) - known):
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
            if near or key.split("_")[0] in _OUR_WORDS:
                hint = f"did you mean {near[0]!r}? " if near else ""
                problems.append(f"unknown key {key!r} = {kwargs[key]!r}; {hint}")
        if problems:
            raise AdapterError(
                "adapter_config.json: " + "".join(problems) + "this version of rotmole cannot tell "
                "what it does to the outputs; update rotmole, or remove the key if it is a typo"
            )
        return kwargs

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> RotMoleConfig:
        """Read a saved configuration; what lies beside it in a local folder is looked at as well.

        Raises:
            AdapterError: a key that changes the outputs is missing or unknown, or the weights are
                a pickle, damaged, of no float format, or of another rank or number of experts.
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
