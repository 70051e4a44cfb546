"""RotMoleModel: puts adapted layers into a model, as PEFT's other methods do."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from rotmole.errors import ConfigError, ModelError
from rotmole.tuner.balance import BalanceSettings, watch_masks
from rotmole.tuner.config import RotMoleConfig
from rotmole.tuner.fingerprint import base_fingerprint, compare_bases
from rotmole.tuner.layer import Experts, Linear, RotMoleLayer, layer_widths
from rotmole.tuner.names import check_adapter_name
from rotmole.tuner.stored import check_state

try:
    from peft.utils.error import NoMatchingPeftModuleError
except ImportError:  # peft 0.20 raises a plain ValueError
    NoMatchingPeftModuleError = ValueError


class NoTargetError(ModelError, NoMatchingPeftModuleError):  # type: ignore[misc] # untyped peft
    """target_modules match no module; also PEFT's own error for that."""


class RotMoleModel(BaseTuner):  # type: ignore[misc] # peft ships no types
    """A model whose target layers carry mixtures of rotated low-rank experts.

    Made by `peft.get_peft_model(model, RotMoleConfig(...))`. Nothing outside the adapted layers is
    changed, but for a forward hook that keeps the attention mask where a balance loss is on.

    Args:
        model: the base model.
        config: a RotMoleConfig, or {adapter name: RotMoleConfig}.
        adapter_name: the adapter's name.
    """

    prefix: str = "rotmole_"
    tuner_layer_cls = RotMoleLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Adapt the target layers; see peft.tuners.tuners_utils.BaseTuner.inject_adapter.

        Raises:
            NoTargetError: target_modules match nothing; names the nearest modules.
            ModelError: a matched module is of a type that cannot be adapted.
            AdapterError: the name is no folder name, or a saved adapter belongs to another model.
        """
        check_adapter_name(adapter_name)
        self._check_base(model, self.peft_config[adapter_name])
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except ValueError as error:
            near = _nearest_modules(model, self.peft_config[adapter_name].target_modules)
            if "not found in the base model" not in str(error) or not near:
                raise
            raise NoTargetError(
                f"{error} The nearest module names are {', '.join(near)}."
            ) from error
        self._set_balance(model, adapter_name)

    def _check_base(self, model: nn.Module, config: RotMoleConfig) -> None:
        """Compare the model with the one a saved adapter was made for; note it in a new one."""
        found = base_fingerprint(model)
        if not config.is_saved or config.base_fingerprint is None:
            config.base_fingerprint = found
            return
        here = getattr(model, "name_or_path", None)
        notice = compare_bases(config.base_fingerprint, found, config.base_model_name_or_path, here)
        if notice:
            warnings.warn(notice, stacklevel=2)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Check an adapter's weights before torch copies the first of them.

        Raises:
            AdapterError: a tensor is missing, unknown, of another shape or format, or not finite.
        """
        expected: dict[str, tuple[int, ...]] = {}
        for path, layer in self.named_modules():
            if isinstance(layer, RotMoleLayer):
                for name, experts in layer.rotmole_experts.items():
                    if not isinstance(experts, Experts):  # wrapped, such as by FSDP1
                        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
                        return
                    place = f"{prefix}{path}.rotmole_experts.{name}."
                    expected |= {place + n: tuple(p.shape) for n, p in experts.named_parameters()}
        tensors = [*self.named_parameters(remove_duplicate=False)]
        tensors += [*self.named_buffers(remove_duplicate=False)]
        check_state(expected, {prefix + name for name, _ in tensors}, state_dict)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base model with its hooks; peft 0.20 goes past them, and the mask is lost."""
        return self.model(*args, **kwargs)

    def _create_and_replace(
        self,
        peft_config: RotMoleConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        rank_key = get_pattern_key(peft_config.rank_pattern, current_key)
        alpha_key = get_pattern_key(peft_config.alpha_pattern, current_key)
        rank = peft_config.rank_pattern.get(rank_key, peft_config.r)
        alpha = peft_config.alpha_pattern.get(alpha_key, peft_config.lora_alpha)
        if isinstance(target, RotMoleLayer):
            target.update_layer(
                adapter_name,
                peft_config,
                rank=rank,
                alpha=alpha,
                inference_mode=peft_config.inference_mode,
            )
            return
        _check_supported(target, current_key, peft_config)
        layer = Linear(target, adapter_name, peft_config, rank=rank, alpha=alpha)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an additional adapter is not trainable by itself
        self._replace_module(parent, target_name, layer, target)

    def _set_balance(self, model: nn.Module, adapter_name: str) -> None:
        """Divide the losses' weights by the number of routed layers; watch masks if one is on."""
        config = self.peft_config[adapter_name]
        layers = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, RotMoleLayer) and adapter_name in module.rotmole_experts
        ]
        coefficients = (config.router_aux_loss_coef, config.router_z_loss_coef)
        if not layers or config.num_experts == 1 or not any(coefficients):
            return
        if not hasattr(self, "_watched"):
            self._watched = watch_masks(model)
        settings = BalanceSettings(
            balance=coefficients[0] / len(layers),
            z=coefficients[1] / len(layers),
            scope=config.router_aux_loss_scope,
        )
        seen: set[int] = set()
        for name, layer in layers:
            stack = max((s for s in self._watched if _is_inside(name, s)), key=len, default=None)
            if stack is not None:
                layer.rotmole_state = self._watched[stack][0]
            first = id(layer.rotmole_state) not in seen
            seen.add(id(layer.rotmole_state))
            layer.experts(adapter_name).balance = replace(settings, witness=first)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = super()._unload_and_optionally_merge(*args, **kwargs)
        for _, handle in getattr(self, "_watched", {}).values():
            handle.remove()
        return model

    def _check_merge_allowed(self) -> None:
        raise ModelError(
            "a mixture of experts cannot be merged into the base weights: which experts act, how "
            "strongly, and how far they are rotated differs from token to token; keep the adapter, "
            "or call unload() to get the base model back"
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.pop("adapter_names", None) is not None:
            raise ModelError(
                "adapter_names (a different adapter for each row of a batch) is not supported by "
                "rotmole; call set_adapter() and run the rows of each adapter as a batch"
            )
        yield


def _is_inside(name: str, stack: str) -> bool:
    return stack == "" or name.startswith(stack + ".")


def _check_supported(target: nn.Module, name: str, config: RotMoleConfig) -> None:
    """Refuse modules that are not linear maps, and widths that the rotation cannot do."""
    layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    weight = getattr(layer, "weight", None)
    linear = isinstance(layer, (nn.Linear, Conv1D))
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        raise ModelError(
            f"module {name!r} belongs to a torch.nn.MultiheadAttention, which reads its weight and "
            "never calls it, so an adapter there would do nothing. Leave it out of target_modules"
        )
    if not linear and not (isinstance(weight, Tensor) and type(weight) is nn.Parameter):
        # only a weight that is no plain parameter can belong to a quantised linear layer
        linear = _is_quantised_linear(layer)
    if not linear:
        raise ModelError(
            f"module {name!r} is a {type(layer).__name__}, which cannot be adapted; rotmole adapts "
            "torch.nn.Linear, transformers' Conv1D and quantised linear layers. "
            "Leave it out of target_modules"
        )
    _, outputs = layer_widths(layer)
    if config.rotation == "radar" and outputs % 2:
        raise ConfigError(
            f"rotation 'radar' pairs outputs and needs an even width; {name!r} has {outputs}"
        )


def _is_quantised_linear(layer: nn.Module) -> bool:
    from peft.utils.quantization_utils import resolve_quantization_backend

    sized = hasattr(layer, "in_features") and hasattr(layer, "out_features")
    return sized and resolve_quantization_backend(layer) is not None


def _nearest_modules(model: nn.Module, targets: Any) -> list[str]:
    """Return up to five names of linear modules that resemble the targets, last part only."""
    wanted = [targets] if isinstance(targets, str) else sorted(targets or ())
    known = {
        name.rpartition(".")[-1]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }
    found: list[str] = []
    for target in wanted:
        near = difflib.get_close_matches(target.rpartition(".")[-1], known, n=3, cutoff=0.3)
        found += [name for name in near if name not in found]
    return (found or sorted(known))[:5]
