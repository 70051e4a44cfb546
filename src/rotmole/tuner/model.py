"""RotMoleModel: puts adapted layers into a model, as PEFT's other methods do."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from rotmole.errors import ConfigError, ModelError
from rotmole.tuner.batch.losses import BalanceSettings, watch_masks
from rotmole.tuner.batch.tasks import watch_tasks
from rotmole.tuner.config import RotMoleConfig
from rotmole.tuner.experts.blocks import block_part, check_blocks, plain_outside
from rotmole.tuner.experts.experts import Experts
from rotmole.tuner.experts.scaling import check_stack, reads_ids, reads_sequences
from rotmole.tuner.layer import Linear, RotMoleLayer
from rotmole.tuner.settings.by_module import module_config
from rotmole.tuner.settings.expert_rules import is_routed
from rotmole.tuner.storage.fingerprint import base_fingerprint, compare_bases
from rotmole.tuner.storage.names import check_adapter_name
from rotmole.tuner.storage.weights import check_state
from rotmole.tuner.targets import keep_trainable, layer_widths

try:
    from peft.utils.error import NoMatchingPeftModuleError
except ImportError:  # peft 0.20 raises a plain ValueError
    NoMatchingPeftModuleError = ValueError


class NoTargetError(ModelError, NoMatchingPeftModuleError):  # type: ignore[misc] # untyped peft
    """target_modules match no module; also PEFT's own error for that."""


class RotMoleModel(BaseTuner):  # type: ignore[misc] # peft ships no types
    """A model whose target layers carry mixtures of rotated low-rank experts.

    Made by `peft.get_peft_model(model, RotMoleConfig(...))`. Nothing outside the adapted layers is
    changed, but for forward hooks: one keeps the attention mask and token ids where a balance loss
    is on, or a router or selection reads them, one takes `task_id` out of a batch where the
    localised loss is on; and for a switch of bitsandbytes (`keep_trainable`).

    Args:
        model: the base model.
        config: a RotMoleConfig, or {adapter name: RotMoleConfig}.
        adapter_name: the adapter's name.
    """

    prefix: str = "rotmole_"
    tuner_layer_cls = RotMoleLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    @classmethod
    def from_adapters(cls, base: nn.Module, paths: Sequence[str | Path], **options: Any) -> Any:
        """Make a mixture whose experts are trained PEFT LoRA adapters; see tuner/from_adapters.py.

        RotMoleModel.from_adapters(base, ["math", "code"], trainable="gates", top_k=2)
        """
        from rotmole.tuner.from_adapters import from_adapters  # it makes models, so it comes after

        return from_adapters(base, paths, **options)

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
        keep_trainable(model)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except ValueError as error:
            near = _nearest_modules(model, self.peft_config[adapter_name].target_modules)
            if "not found in the base model" not in str(error) or not near:
                raise
            raise NoTargetError(
                f"{error} The nearest module names are {', '.join(near)}."
            ) from error
        self._watch(model, adapter_name)

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
                    stored = [*experts.named_parameters(), *experts.named_buffers()]
                    expected |= {place + n: tuple(t.shape) for n, t in stored}
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
        config = module_config(peft_config, self.model, current_key)
        part = None
        if peft_config.router_scope == "block":
            part = block_part(parent, target_name, adapter_name)
            if part is None:
                plain_outside(peft_config, config, current_key)
            elif config.num_experts == 1:
                part = None  # one expert is added in the layer itself
        _check_supported(target, current_key, config)
        check_stack(self.model, current_key, config)
        if isinstance(target, RotMoleLayer):
            target.update_layer(
                adapter_name, config, inference_mode=config.inference_mode, part=part
            )
            return
        layer = Linear(target, adapter_name, config, part)
        siblings = [child for child in parent.children() if isinstance(child, RotMoleLayer)]
        if siblings:
            layer.rotmole_reads = siblings[0].rotmole_reads
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an additional adapter is not trainable by itself
        self._replace_module(parent, target_name, layer, target)

    def _watch(self, model: nn.Module, adapter_name: str) -> None:
        """Watch masks and token ids if something wants them; share out the losses' weights."""
        config = self.peft_config[adapter_name]
        if config.router_scope == "block" and is_routed(config):
            check_blocks(model, adapter_name)
        layers = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, RotMoleLayer)
            and adapter_name in module.rotmole_experts
            and module.experts(adapter_name).routes
        ]
        if not layers or not _watches(config):
            return
        if not hasattr(self, "_watched"):
            self._watched = watch_masks(model)
        states = [state for state, _ in self._watched.values()]
        if config.router_task_loss_coef and not any(state.wants_tasks for state in states):
            self._watched_tasks = watch_tasks(model, states)
        settings = BalanceSettings(
            balance=config.router_aux_loss_coef / len(layers),
            z=config.router_z_loss_coef / len(layers),
            scope=config.router_aux_loss_scope,
            task=config.router_task_loss_coef / len(layers),
            task_offset=config.router_task_offset,
            task_groups=config.router_task_groups,
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
        for _, handles in getattr(self, "_watched", {}).values():
            for handle in handles:
                handle.remove()
        if hasattr(self, "_watched_tasks"):
            self._watched_tasks.remove()
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


def _watches(config: RotMoleConfig) -> bool:
    """Tell whether anything of an adapter wants to know more of a batch than the layers' inputs."""
    losses = config.router_aux_loss_coef, config.router_z_loss_coef, config.router_task_loss_coef
    counts = config.router_bias_rate > 0  # padding does not count
    return any(losses) or counts or reads_ids(config) or reads_sequences(config)


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
