"""Growing: a trained mixture gets further experts, and computes at first what it computed before.

    y = W x + s sum_{old e} g_e(x) R_e(x)[A_e x] B_e + s sum_{new e} g_e(x) R_e(x)[A_e x] B_e

The old weights g are those of the mixture before (ops/routing/generations.py), and new experts
start with B = 0. docs/grow.md says what that means for each selection, router and rotation.
"""

from __future__ import annotations

import itertools
import shutil
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save
from torch import Tensor

from rotmole.errors import ConfigError, ModelError
from rotmole.files import atomic_write_bytes
from rotmole.tuner.config import RotMoleConfig
from rotmole.tuner.experts.experts import Experts, spec_of
from rotmole.tuner.experts.initial import draw
from rotmole.tuner.experts.ways import ways_for
from rotmole.tuner.layer import RotMoleLayer
from rotmole.tuner.settings.by_module import module_settings
from rotmole.tuner.settings.ranges import entries_of
from rotmole.tuner.settings.settings import PARTS, Settings
from rotmole.tuner.storage.weights import EXPERTS, WEIGHTS

PREFIX = "base_model.model."
"""How PEFT's names of saved tensors begin."""


def grow(
    model: PeftModel,
    experts: int,
    *,
    freeze_old: Iterable[str] = (),
    adapter_name: str = "default",
) -> None:
    """Give every adapted layer of a model further experts; its outputs stay what they were.

        rotmole.grow(model, 2, freeze_old=["experts", "router"])

    The new experts are parameters of their own, so make the optimizer afterwards. Saving and
    loading need nothing else: the numbers are in the adapter's configuration.

    Args:
        model: a PeftModel with a RotMoLE adapter.
        experts: how many experts each layer gets, at least 1.
        freeze_old: what is not trained any more of what is there: "experts" (A, B, rotation
            gates), "router", "shared_expert". What all experts share (share_A, rotation_dim, a
            router's hidden layer) is old as well. An earlier growth's choice does not count.
        adapter_name: of the adapter.

    Raises:
        ConfigError: a number or name that is none of these, or a mixture that cannot grow.
        ModelError: there is no such adapter.
    """
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, RotMoleConfig):
        raise ModelError(
            f"the model has no RotMoLE adapter named {adapter_name!r}; it has "
            f"{', '.join(getattr(model, 'peft_config', {})) or 'none'}"
        )
    tuner, base = model.base_model, model.get_base_model()
    new = grown_config(config, experts, freeze_old)
    layers = [
        layer
        for layer in base.modules()
        if isinstance(layer, RotMoleLayer) and adapter_name in layer.rotmole_experts
    ]
    for layer in layers:
        settings = module_settings(new, base, layer.rotmole_path)
        old = layer.experts(adapter_name)
        tensors = dict(old.named_parameters()) | dict(old.named_buffers())
        layer.rotmole_experts[adapter_name] = _grown(
            tensors, settings, layer.in_features, layer.out_features, training=old.training
        )
        layer.rotmole_ways[adapter_name] = ways_for(layer.experts(adapter_name).spec)
        if config.inference_mode or adapter_name not in tuner.active_adapters:
            layer.rotmole_experts[adapter_name].requires_grad_(False)
    model.peft_config[adapter_name] = new
    tuner._watch(base, adapter_name)


def grow_saved(
    folder: Path, output: Path, experts: int, *, freeze_old: Iterable[str] = (), seed: int = 0
) -> RotMoleConfig:
    """Write a grown copy of a saved adapter; no base model is needed.

    Args:
        folder: of the adapter, checked.
        output: an empty or new folder.
        experts, freeze_old: as of `grow`.
        seed: of the new experts' initial weights.

    Returns:
        The configuration of the copy.

    Raises:
        ConfigError: as of `grow`.
        AdapterError: the adapter is damaged.
        StorageError: the disk refused.
    """
    config = RotMoleConfig.from_pretrained(str(folder))
    new = grown_config(config, experts, freeze_old)
    tensors = load_file(folder / WEIGHTS)
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if EXPERTS in name:
            place, _, parameter = name.rpartition(EXPERTS)
            modules.setdefault(place, {})[parameter] = tensor
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for place, parameters in modules.items():
            number, rank, outputs = parameters["expert_B"].shape
            settings = replace(
                new.plain(),
                r=rank,
                num_experts=number + sum(new.experts_added),
                num_experts_pattern={},
                rank_pattern={},
            )
            inputs = parameters["expert_A"].shape[-1]
            grown = _grown(parameters, settings, inputs, outputs)
            tensors |= {f"{place}{EXPERTS}{n}": t for n, t in grown.state_dict().items()}
    output.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if file.is_file() and file.name not in (WEIGHTS, "adapter_config.json"):
            shutil.copy2(file, output / file.name)
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    atomic_write_bytes(output / WEIGHTS, save(stored, metadata={"format": "pt"}))
    new.save_pretrained(str(output))
    return new


def grown_config(
    config: RotMoleConfig, experts: int, freeze_old: Iterable[str] = ()
) -> RotMoleConfig:
    """Return the configuration of a mixture with further experts.

    Raises:
        ConfigError: see `grow`.
    """
    if isinstance(experts, bool) or not isinstance(experts, int) or experts < 1:
        raise ConfigError(f"experts is {experts!r}; it must be a whole number of at least 1")
    kept = list(freeze_old)
    if "shared_expert" in kept and config.shared_expert_r == 0:
        kept.remove("shared_expert")
        warnings.warn("there is no shared expert, so freeze_old keeps none", stacklevel=3)
    pattern: Any = config.num_experts_pattern
    if isinstance(pattern, Mapping):
        pattern = {name: count + experts for name, count in pattern.items()}
    else:
        pattern = [count + experts for count in pattern]
    counts = {config.num_experts, *(count for _, count in entries_of(config.num_experts_pattern))}
    factor = 1.0 if counts == {1} else config.routed_scaling_factor
    if factor != 1 and 1 in counts:
        raise ConfigError(
            f"routed_scaling_factor is {factor!r}, but it does not multiply modules with one "
            "expert; grown, they would have a router, and their outputs would change"
        )
    names = config.expert_names
    if names is not None:
        free = (f"added-{n}" for n in itertools.count(1) if f"added-{n}" not in names)
        names = [*names, *itertools.islice(free, experts)]
    return replace(
        config,
        expert_names=names,
        routed_scaling_factor=factor,
        num_experts=config.num_experts + experts,
        num_experts_pattern=pattern,
        experts_added=[*config.experts_added, experts],
        freeze_old=[part for part in PARTS if part in kept] if set(kept) <= set(PARTS) else kept,
    )


@torch.no_grad()
def _grown(
    old: Mapping[str, Tensor],
    settings: Settings,
    in_features: int,
    out_features: int,
    *,
    training: bool = True,
) -> Experts:
    """Return the experts of one layer: old tensors copied, new experts drawn with B = 0."""
    experts = Experts(
        settings,
        spec_of(settings, in_features),
        in_features=in_features,
        out_features=out_features,
    )
    draw(experts, "gaussian" if settings.init_weights == "gaussian" else True, settings.A_density)
    experts.to(old["expert_B"].device, old["expert_B"].dtype)
    for name, tensor in experts.state_dict().items():
        if name == "router_bias":
            before = old.get(name)
            if before is not None:
                tensor[: len(before)] = before
        elif name in old:
            tensor.copy_(old[name])
    _start_at_the_mean(experts)
    return experts.train(training)


def _start_at_the_mean(experts: Experts) -> None:
    """Add the mean of the old rows to those of the new experts in a softmax router.

    A softmax over the old experts says nothing of a number that is added to all their logits, so
    training lets it drift; with the mean in it, a new logit starts among the old ones all the same.
    """
    spec = experts.spec
    if spec.scoring != "softmax" or spec.router == "cosine":
        return
    for whole in ("router_weight", "router_key"):
        named = experts.named_parameters()
        rows: list[Tensor] = [p for n, p in named if experts.whole_name(n) == whole]
        if len(rows) > 1:
            rows[-1].add_(torch.cat(rows[:-1]).mean(0))
