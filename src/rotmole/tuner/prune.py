"""Pruning: a saved mixture without some of its experts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from rotmole.errors import ConfigError
from rotmole.files import atomic_write_bytes
from rotmole.tuner.config import RotMoleConfig
from rotmole.tuner.experts.experts import Experts, spec_of
from rotmole.tuner.settings.settings import Settings
from rotmole.tuner.storage.weights import EXPERTS, WEIGHTS

PREFIX = "base_model.model."
"""How PEFT's names of saved tensors begin."""
_ROUTING = ("router", "routed", "scoring", "selection", "norm_topk_prob", "top_p", "share_A")
"""Beginnings of the settings that say nothing where no layer has a router."""


@dataclass(frozen=True)
class Kept:
    """The experts of one layer that stay.

    Attributes:
        experts: their numbers, ascending, at least one.
        top_k: K of the layer before.
        rows: number of an expert that stays -> its new row [D] of a linear router.
    """

    experts: tuple[int, ...]
    top_k: int = 1
    rows: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def chosen(self) -> int:
        """K of the layer afterwards."""
        return min(self.top_k, len(self.experts))


def check_prunable(config: RotMoleConfig) -> None:
    """Refuse a mixture of which no expert can be taken away.

    Raises:
        ConfigError: naming the setting.
    """
    reasons = []
    if not config.is_routed:
        reasons.append("num_experts is 1, so there is nothing to choose from")
    if config.experts_added:
        reasons.append(
            f"experts_added is {config.experts_added!r}, and what a grown mixture computes depends "
            "on the number of experts of each growth"
        )
    if config.router == "hash":
        reasons.append(
            "router is 'hash', which gives every token its experts by their numbers; fewer experts "
            "would be other experts for almost every token"
        )
    if config.init_weights == "svd":
        reasons.append("init_weights is 'svd', whose layers subtract the start of all experts")
    if reasons:
        raise ConfigError([f"the adapter cannot be pruned: {reason}." for reason in reasons])


def prune_saved(folder: Path, kept: Mapping[str, Kept]) -> RotMoleConfig:
    """Take experts out of a saved adapter, in its folder.

    Args:
        folder: of the adapter; its weights and its configuration are written anew.
        kept: path of each layer with a router in the base model -> what stays.

    Returns:
        The new configuration, in which num_experts_pattern names the layers that differ.

    Raises:
        ConfigError: the mixture cannot be pruned.
        StorageError: the disk refused.
    """
    config = RotMoleConfig.from_pretrained(str(folder))
    check_prunable(config)
    tensors = load_file(folder / WEIGHTS)
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        place, found, parameter = name.rpartition(EXPERTS)
        if found:
            layers.setdefault(place, {})[parameter] = tensor
    counts: dict[str, int] = {}
    for place, old in layers.items():
        path = place.removeprefix(PREFIX)
        counts[path] = len(old["expert_B"])
        if path not in kept:
            continue
        new = _pruned(old, config, kept[path])
        counts[path] = len(kept[path].experts)
        for parameter in old:
            name = f"{place}{EXPERTS}{parameter}"
            if parameter in new:
                tensors[name] = new[parameter]
            else:
                del tensors[name]
    pruned = pruned_config(config, counts, kept)
    atomic_write_bytes(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    pruned.save_pretrained(str(folder))
    return pruned


def pruned_config(
    config: RotMoleConfig, counts: Mapping[str, int], kept: Mapping[str, Kept]
) -> RotMoleConfig:
    """Return the configuration of a mixture whose layers have these numbers of experts.

    Args:
        config: of the mixture before.
        counts: path of every adapted layer -> its number of experts.
        kept: path of every layer that had several experts -> what stays of them. Experts keep their
            names if the same ones stay in every layer; otherwise nobody has a name.
    """
    chosen = {path: layer.chosen for path, layer in kept.items()}
    common = Counter(counts.values()).most_common(1)[0][0]
    blocks = config.router_scope == "block"  # where a layer that is not named has one expert
    several = [chosen[path] for path, n in counts.items() if n > 1] or [1]
    usual, pattern = min(several), {}
    if config.selection in ("top_k", "expert_choice"):
        usual = Counter(several).most_common(1)[0][0]
        pattern = {p: chosen[p] for p, n in counts.items() if n > 1 and chosen[p] != usual}
    names = config.expert_names
    if names is not None:
        stays = {layer.experts for layer in kept.values()}
        names = [names[e] for e in stays.pop()] if len(stays) == 1 else None
    unrouted: dict[str, Any] = {}
    if several == [1]:  # no layer has a router any more
        unrouted = {e.name: e.default for e in fields(Settings) if e.name.startswith(_ROUTING)}
    return replace(
        config,
        **unrouted,
        expert_names=names,
        num_experts=common,
        num_experts_pattern={
            path: n for path, n in counts.items() if n != common or (blocks and n > 1)
        },
        top_k=usual,
        top_k_pattern=pattern,
    )


def _pruned(old: Mapping[str, Tensor], settings: Settings, kept: Kept) -> dict[str, Tensor]:
    """Return the tensors of one layer without the experts that go.

    Which axes of a tensor count experts is read off its shape in a layer with fewer of them.
    """
    number, left = len(old["expert_B"]), len(kept.experts)
    before, after = _shapes(old, settings, number), _shapes(old, settings, left)
    index = torch.tensor(kept.experts)
    new = {}
    for name, tensor in old.items():
        if name not in after:  # a single expert has no router
            continue
        stays = tensor.clone()
        for row, value in kept.rows.items() if name == "router_weight" else ():
            stays[row] = value.to(stays)
        for axis, (size, wanted) in enumerate(zip(before[name], after[name], strict=True)):
            if size == wanted:
                continue
            if size == number:
                stays = stays.index_select(axis, index)
            else:  # pairs of experts, side by side
                pairs = (index[:, None] * number + index).flatten()
                stays = stays.index_select(axis, pairs)
        new[name] = stays.contiguous()
    if left == 1:  # routed_scaling_factor is not for a single expert
        new["expert_B"] = new["expert_B"] * settings.routed_scaling_factor
    return new


def _shapes(
    old: Mapping[str, Tensor], settings: Settings, experts: int
) -> dict[str, tuple[int, ...]]:
    """Return name and shape of what is saved of a layer with this number of experts."""
    rank, outputs = old["expert_B"].shape[1:]
    inputs = old["expert_A"].shape[-1]
    layer = replace(settings.plain(), r=rank, num_experts=experts, top_k=1)
    routed = any(name.startswith("router_") for name in old)  # not within a block-routed block
    with torch.device("meta"):
        module = Experts(
            layer,
            spec_of(layer, inputs),
            in_features=inputs,
            out_features=outputs,
            has_router=routed,
        )
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
