"""The adapted model without weights: which modules match, how much is trained, what is wrong."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from rotmole.config.peft_types import OURS
from rotmole.config.schema import ModelSection
from rotmole.errors import InputError, RotMoleError, did_you_mean
from rotmole.models.load import adapt, empty_model
from rotmole.tuner.batch.losses import balance_states
from rotmole.tuner.layer import RotMoleLayer
from rotmole.tuner.loras import Lora, base_problems


def preview(
    section: ModelSection,
    config: PeftConfig,
    dtype: torch.dtype,
    *,
    trust_remote_code: bool = False,
) -> Any:
    """Build the adapted model on the meta device.

    Args:
        section: the run file's `model:` section.
        config: the adapter's configuration; the model gets a copy.
        dtype: of the base model.
        trust_remote_code: let transformers run code that came with the model.

    Returns:
        A PeftModel whose parameters hold no memory.

    Raises:
        ModelError: the base model's configuration cannot be read.
        ConfigError, ModelError: the adapter does not fit the model.
    """
    base = empty_model(section, dtype, trust_remote_code=trust_remote_code)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the real run shows them
        return adapt(base, config)


def adapter_problems(
    section: ModelSection,
    config: PeftConfig | None,
    loras: Sequence[Lora] = (),
    *,
    trust_remote_code: bool = False,
) -> list[str]:
    """Say why the adapter does not fit the model; reads only the model's configuration.

    Args:
        section: the run file's `model:` section.
        config: the adapter's configuration; None if it has problems of its own.
        loras: trained adapters that become its experts.
        trust_remote_code: let transformers run code that came with the model.

    Returns:
        One sentence per problem: a model that cannot be found, each target that matches nothing
        (with the nearest module names), modules of a type that cannot be adapted.
    """
    try:
        base = empty_model(section, trust_remote_code=trust_remote_code)
    except RotMoleError as error:
        return [str(error)]
    problems = [f"experts_from.paths: {problem}" for problem in base_problems(base, loras)]
    if config is None or problems:
        return problems
    if problems := _unmatched(base, getattr(config, "target_modules", None)):
        return problems
    try:
        model = preview(section, config, torch.float32, trust_remote_code=trust_remote_code)
    except InputError as error:
        reason = " ".join(str(error).removeprefix("adapter: ").split())
        ours = str(config.peft_type.value) == OURS
        return [f"adapter{'.target_modules' if ours else ''}: {reason}"]
    if isinstance(model.get_base_model().get_output_embeddings(), BaseTunerLayer):
        return [
            "adapter.target_modules: the output layer (lm_head) cannot be adapted, because the "
            "trainer computes the loss from its weight directly; leave it out"
        ]
    return []


def matched(model: Any) -> dict[tuple[str, int, int], int]:
    """Count the adapted modules.

    Returns:
        (last part of the name, in_features, out_features) -> how many.
    """
    counts: dict[tuple[str, int, int], int] = {}
    base = model.get_base_model()
    for path in model.base_model.targeted_module_names:
        layer = base.get_submodule(path)
        plain = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        shape = plain.weight.shape[::-1]
        widths = [
            getattr(layer, name, shape[i]) for i, name in enumerate(("in_features", "out_features"))
        ]
        key = (path.rpartition(".")[2], widths[0], widths[-1])
        counts[key] = counts.get(key, 0) + 1
    return counts


def trainable_by_role(model: Any) -> dict[str, int]:
    """Count the trainable parameters by what they are for.

    Returns:
        expert, scaling_gate, rotation_gate and other (modules_to_save and the like, and all
        parameters of PEFT's other methods) -> count.
    """
    counts = {"expert": 0, "scaling_gate": 0, "rotation_gate": 0}
    for module in model.modules():
        if isinstance(module, RotMoleLayer):
            for name in module.rotmole_experts:
                experts = module.experts(name)
                for key, parameter in experts.named_parameters():
                    if parameter.requires_grad:  # not what `frozen` or an SVD start keeps
                        counts[experts.role(key)] += parameter.numel()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    counts["other"] = trainable - sum(counts.values())
    return counts


def flops_per_token(model: Any) -> int:
    """Count the floating-point operations that the adapter adds to one token's forward pass.

    Each multiplication of a matrix product counts 2, as in torch.utils.flop_counter; elementwise
    operations and small linear systems (rotation cayley) are not counted. Experts that are not
    selected count too, because the activation of every expert is computed.

    Args:
        model: the adapted model, on the meta device.

    Returns:
        Floating-point operations of all adapted layers together.
    """
    base = model.get_base_model()
    for state in balance_states(base):
        state.ids = torch.zeros(1, 1, dtype=torch.long, device="meta")  # for router hash
    widths: dict[str, int] = {}
    for path, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            # the layers of a block-routed block only work together
            place = path.rpartition(".")[0] if getattr(module, "rotmole_blocks", None) else path
            widths.setdefault(place, module.get_base_layer().in_features)
    counted: dict[tuple[Any, ...], int] = {}
    total = 0
    for path, width in widths.items():
        owner = base.get_submodule(path)
        key = tuple((name, tensor.shape) for name, tensor in owner.state_dict().items())
        if key not in counted:  # modules of equal shapes cost the same
            with model.disable_adapter():
                plain = _forward_flops(owner, width)
            counted[key] = _forward_flops(owner, width) - plain
        total += counted[key]
    return total


def _forward_flops(module: nn.Module, width: int) -> int:
    x = torch.empty(1, 1, width, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(x)
    return int(counter.get_total_flops())


def _unmatched(base: nn.Module, targets: Any) -> list[str]:
    """Say which names match no module; PEFT raises only if all of them match none."""
    if not isinstance(targets, set):
        return []
    names = [name for name, _ in base.named_modules()]
    linear = sorted(
        {
            name.rpartition(".")[2]
            for name, module in base.named_modules()
            if isinstance(module, (nn.Linear, Conv1D))
        }
    )
    return [
        f"adapter.target_modules: {target!r} matches no module of this model"
        f"{did_you_mean(target, linear) or '; its linear modules are ' + ', '.join(linear)}"
        for target in sorted(targets)
        if not any(name == target or name.endswith(f".{target}") for name in names)
    ]
