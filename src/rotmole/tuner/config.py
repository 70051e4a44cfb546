"""RotMoleConfig: every setting of the adapter, checked all at once."""

from __future__ import annotations

import difflib
import json
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from peft.config import PeftConfig
from peft.utils import PeftType

from rotmole.errors import AdapterError, ConfigError
from rotmole.ops.rotation import ROTATIONS, Rotation
from rotmole.ops.routing import SELECTIONS

FORMAT_VERSION = 1
ROUTERS = ("linear",)
SCOPES = ("sequence", "micro_batch")
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

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("ROTMOLE")
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)  # as PEFT's own configs keep it
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)
        if self.top_k is None and isinstance(self.num_experts, int):
            self.top_k = min(2, max(1, self.num_experts))
        problems = [*_count_problems(self), *_number_problems(self), *_choice_problems(self)]
        problems += _target_problems(self)
        broken = {re.split(r"[ \[]", problem, maxsplit=1)[0] for problem in problems}
        problems += _rule_problems(self, broken)
        if problems:
            raise ConfigError(problems, "RotMoleConfig")
        for notice in _notices(self):
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


def _is_number(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)  # type: ignore[arg-type] # checked the line before


def _count_problems(config: RotMoleConfig) -> Iterator[str]:
    """Yield what is wrong with numbers that count something."""
    counts: dict[str, object] = {"r": config.r, "num_experts": config.num_experts}
    for name in ("top_k", "rotation_planes", "radar_rank"):
        if getattr(config, name) is not None:
            counts[name] = getattr(config, name)
    counts |= {f"rank_pattern[{key!r}]": rank for key, rank in _items(config.rank_pattern)}
    for name, count in counts.items():
        if not (isinstance(count, int) and not isinstance(count, bool) and count >= 1):
            yield f"{name} is {count!r}; it must be a whole number of at least 1"
    if config.format_version != FORMAT_VERSION:
        yield (
            f"format_version is {config.format_version!r}; this version of rotmole reads "
            f"{FORMAT_VERSION}, so a newer rotmole is needed to read this adapter"
        )


def _number_problems(config: RotMoleConfig) -> Iterator[str]:
    """Yield what is wrong with real numbers and flags."""
    alphas = {"lora_alpha": config.lora_alpha}
    alphas |= {f"alpha_pattern[{key!r}]": alpha for key, alpha in _items(config.alpha_pattern)}
    for name, alpha in alphas.items():
        if not (_is_number(alpha) and alpha > 0):
            yield f"{name} is {alpha!r}; it must be a number above 0"
    if not (_is_number(config.lora_dropout) and 0 <= config.lora_dropout < 1):
        yield f"lora_dropout is {config.lora_dropout!r}; it must lie in 0 <= lora_dropout < 1"
    for name in ("router_aux_loss_coef", "router_z_loss_coef"):
        value = getattr(config, name)
        if not (_is_number(value) and value >= 0):
            yield f"{name} is {value!r}; it must be a number of at least 0"
    for name in ("use_rslora", "norm_topk_prob", "radar_normalize", "init_weights"):
        if not isinstance(getattr(config, name), bool):
            yield f"{name} is {getattr(config, name)!r}; it must be true or false"


def _items(pattern: object) -> Iterator[tuple[str, Any]]:
    """Iterate over a pattern; a wrong type is reported by _target_problems."""
    if isinstance(pattern, dict):
        yield from pattern.items()


def _choice_problems(config: RotMoleConfig) -> Iterator[str]:
    """Yield what is wrong with settings that take one of a few values."""
    choices: dict[str, tuple[str, ...]] = {
        "router": ROUTERS,
        "selection": SELECTIONS,
        "rotation": tuple(ROTATIONS),
        "rotation_input": ("x", "z"),
        "rotation_metric": ("rank", "output"),
        "router_aux_loss_scope": SCOPES,
    }
    for name, allowed in choices.items():
        value = getattr(config, name)
        if value not in allowed:
            near = difflib.get_close_matches(str(value), allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            yield f"{name} is {value!r}; it must be one of {', '.join(allowed)}{hint}"


def _rule_problems(config: RotMoleConfig, broken: set[str]) -> Iterator[str]:
    """Yield rules between settings that are broken, where each setting by itself is right."""
    if not broken & {"top_k", "num_experts"}:
        assert config.top_k is not None
        if config.top_k > config.num_experts:
            yield (
                f"top_k is {config.top_k} but num_experts is {config.num_experts}; "
                "a token cannot use more experts than there are, so top_k <= num_experts"
            )
    if "rotation" in broken:
        return
    row = ROTATIONS[config.rotation]
    if not broken & {"r", "rank_pattern", "rotation_planes"}:
        ranks = {"r": config.r}
        ranks |= {f"rank_pattern[{key!r}]": rank for key, rank in config.rank_pattern.items()}
        for name, rank in ranks.items():
            yield from _rank_problems(row, name, rank, config.rotation_planes)
    if config.rotation_input == "z" and not row.input_z:
        yield f"rotation_input is 'z'; only bias defines it, rotation is {row.name!r}"
    if config.rotation_metric == "output" and not row.metric:
        able = ", ".join(name for name, other in ROTATIONS.items() if other.metric)
        yield f"rotation_metric is 'output'; only {able} define it, rotation is {row.name!r}"


def _rank_problems(row: Rotation, name: str, rank: int, planes: int | None) -> Iterator[str]:
    """Yield why a rotation cannot work at a rank."""
    if rank < row.min_rank:
        yield f"rotation {row.name!r} needs a rank of at least {row.min_rank}; {name} is {rank}"
    if row.max_rank is not None and rank > row.max_rank:
        yield f"rotation {row.name!r} needs a rank of at most {row.max_rank}; {name} is {rank}"
    if row.even_rank and rank % 2:
        yield f"rotation {row.name!r} pairs coordinates and needs an even rank: {name}={rank}"
    if planes is not None and planes > rank // 2:
        yield f"rotation_planes is {planes}; {name}={rank} has {rank // 2} pairs"


def _target_problems(config: RotMoleConfig) -> Iterator[str]:
    """Yield what is wrong with the choice of modules; PEFT's LoRA has the same rules."""
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(getattr(config, name), dict):
            yield f"{name} is {getattr(config, name)!r}; it must map module patterns to values"
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        if not (
            value is None
            or isinstance(value, str)
            or (isinstance(value, set) and all(isinstance(entry, str) for entry in value))
        ):
            yield f"{name} is {value!r}; it must be a list of module names or one string"
    for name in ("layers_to_transform", "layers_pattern"):
        if isinstance(config.target_modules, str) and getattr(config, name) is not None:
            yield f"{name} cannot be used when target_modules is a regular expression (a string)"
    if config.layers_pattern and config.layers_to_transform is None:
        yield "layers_pattern is set, so layers_to_transform must be set as well"


def _notices(config: RotMoleConfig) -> Iterator[str]:
    """Yield one sentence for each setting that cannot do what its name says."""
    routed = config.num_experts > 1
    if routed and config.selection == "top_k" and config.top_k == 1 and config.norm_topk_prob:
        yield (
            "top_k=1 with norm_topk_prob=True gives the selected expert the constant weight 1, so "
            "the scaling gate cannot learn; set norm_topk_prob=False (as Switch does) or top_k >= 2"
        )
    if config.rotation == "radar_pairs" and (config.top_k == 1 or not routed):
        yield "rotation='radar_pairs' does nothing with one selected expert: it has no pairs"
    idle = {
        "rotation_planes": config.rotation != "givens" and config.rotation_planes is not None,
        "radar_rank": not config.rotation.startswith("radar") and config.radar_rank is not None,
        "radar_normalize": config.rotation != "radar" and not config.radar_normalize,
        "router_aux_loss_coef": not routed and config.router_aux_loss_coef > 0,
        "router_z_loss_coef": not routed and config.router_z_loss_coef > 0,
        "norm_topk_prob": config.selection == "dense" and not config.norm_topk_prob,
    }
    for name, is_idle in idle.items():
        if is_idle:
            yield f"{name}={getattr(config, name)!r} has no effect with the other settings"
