"""The rules a RotMoleConfig must keep: one sentence for every setting that breaks one."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rotmole.ops.mixture.fused import can_fuse
from rotmole.ops.rotation.table import ROTATIONS, Rotation
from rotmole.ops.routing.routers import ROUTERS
from rotmole.ops.routing.selection import SCORINGS, SELECTIONS
from rotmole.tuner.settings.expert_rules import is_number, is_routed

if TYPE_CHECKING:
    from rotmole.tuner.config import RotMoleConfig

FORMAT_VERSION = 1
SCOPES = ("sequence", "micro_batch")


def count_problems(config: RotMoleConfig) -> Iterator[str]:
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


def number_problems(config: RotMoleConfig) -> Iterator[str]:
    """Yield what is wrong with real numbers and flags."""
    alphas = {"lora_alpha": config.lora_alpha}
    alphas |= {f"alpha_pattern[{key!r}]": alpha for key, alpha in _items(config.alpha_pattern)}
    for name, alpha in alphas.items():
        if not (is_number(alpha) and alpha > 0):
            yield f"{name} is {alpha!r}; it must be a number above 0"
    if not (is_number(config.lora_dropout) and 0 <= config.lora_dropout < 1):
        yield f"lora_dropout is {config.lora_dropout!r}; it must lie in 0 <= lora_dropout < 1"
    for name in ("router_aux_loss_coef", "router_z_loss_coef"):
        value = getattr(config, name)
        if not (is_number(value) and value >= 0):
            yield f"{name} is {value!r}; it must be a number of at least 0"
    for name in ("use_rslora", "norm_topk_prob", "radar_normalize"):
        if not isinstance(getattr(config, name), bool):
            yield f"{name} is {getattr(config, name)!r}; it must be true or false"


def _items(pattern: object) -> Iterator[tuple[str, Any]]:
    """Iterate over a pattern; a wrong type is reported by target_problems."""
    if isinstance(pattern, dict):
        yield from pattern.items()


def choice_problems(config: RotMoleConfig) -> Iterator[str]:
    """Yield what is wrong with settings that take one of a few values."""
    choices: dict[str, tuple[str, ...]] = {
        "router": tuple(ROUTERS),
        "scoring": SCORINGS,
        "selection": tuple(SELECTIONS),
        "rotation": tuple(ROTATIONS),
        "rotation_input": ("x", "z"),
        "rotation_metric": ("rank", "output"),
        "router_aux_loss_scope": SCOPES,
        "compute_dtype": ("adapter", "input"),
        "dispatch": ("auto", "fused", "grouped"),
    }
    for name, allowed in choices.items():
        value = getattr(config, name)
        if value not in allowed:
            near = difflib.get_close_matches(str(value), allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            yield f"{name} is {value!r}; it must be one of {', '.join(allowed)}{hint}"


def rule_problems(config: RotMoleConfig, broken: set[str]) -> Iterator[str]:
    """Yield rules between settings that are broken, where each setting by itself is right."""
    if not broken & {"top_k", "num_experts"} and not config.num_experts_pattern:
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
    fits = can_fuse(config.rotation, config.rotation_input, config.rotation_metric)
    fits = fits and config.selection == "top_k" and not (config.share_A or config.router_sqrt_gate)
    if config.dispatch == "grouped" and not fits:
        yield (
            "dispatch is 'grouped', which needs selection top_k and a rotation of each expert by "
            "itself in rank space, without share_A and router_sqrt_gate; use dispatch auto"
        )


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


def target_problems(config: RotMoleConfig) -> Iterator[str]:
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


def fingerprint_problems(config: RotMoleConfig) -> Iterator[str]:
    """Yield why a saved fingerprint of the base model cannot be one."""
    saved = config.base_fingerprint
    if saved is None:
        return
    rule = "it must hold architecture (text), shapes (names to text) and final_norm (text or null)"
    if not isinstance(saved, dict) or saved.keys() != {"architecture", "shapes", "final_norm"}:
        yield f"base_fingerprint is {saved!r}; {rule}"
        return
    words = [saved["architecture"], saved["final_norm"] or ""]
    shapes = saved["shapes"]
    if isinstance(shapes, dict):
        words += [*shapes, *shapes.values()]
    if not isinstance(shapes, dict) or not all(isinstance(word, str) for word in words):
        yield f"base_fingerprint is {saved!r}; {rule}"


def foreign_module(mapping: object) -> str | None:
    """Return a notice if an auto_mapping names a module that is not transformers'."""
    if mapping is None:
        return None
    library = mapping.get("parent_library") if isinstance(mapping, dict) else mapping
    if isinstance(library, str) and library.partition(".")[0] == "transformers":
        return None
    return (
        f"auto_mapping names the module {library!r}, which is not transformers' and so is never "
        "imported for it; auto_mapping is ignored"
    )


def notices(config: RotMoleConfig) -> Iterator[str]:
    """Yield one sentence for each setting that cannot do what its name says."""
    routed = is_routed(config)
    learned = ROUTERS[config.router].weight == "learned"
    one = config.selection == "top_k" and config.top_k == 1 and config.norm_topk_prob
    if routed and one and learned:
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
    }
    for name, is_idle in idle.items():
        if is_idle:
            yield f"{name}={getattr(config, name)!r} has no effect with the other settings"
