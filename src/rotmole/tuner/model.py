"""RotMoleModel: puts adapted layers into a model, as PEFT's other methods do."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from rotmole.errors import ConfigError, ModelError
from rotmole.tuner.batch.losses import BalanceState, LossWeights
from rotmole.tuner.batch.stack import Watch
from rotmole.tuner.batch.tokens import reads_ids, reads_sequences
from rotmole.tuner.config import RotMoleConfig
from rotmole.tuner.experts.blocks import block_part, check_blocks, plain_outside
from rotmole.tuner.experts.experts import Experts
from rotmole.tuner.from_adapters import from_adapters
from rotmole.tuner.layer import Linear, RotMoleLayer
from rotmole.tuner.settings.by_module import module_settings
from rotmole.tuner.storage.fingerprint import base_fingerprint, compare_bases
from rotmole.tuner.storage.names import check_adapter_name
from rotmole.tuner.storage.weights import check_state
from rotmole.tuner.targets import (
    keep_trainable,
    linear_widths,
    read_as_weights,
    target_notices,
)

if TYPE_CHECKING:
    from rotmole.tuner.settings.settings import Settings

try:
    from peft.utils.error import NoMatchingPeftModuleError
except ImportError:  # peft 0.20 raises a plain ValueError
    NoMatchingPeftModuleError = ValueError


class NoTargetError(ModelError, NoMatchingPeftModuleError):  # type: ignore[misc] # untyped peft
    """target_modules match no module; also PEFT's own error for that."""


class RotMoleModel(BaseTuner):  # type: ignore[misc] # peft ships no types
    """A model whose target layers carry mixtures of rotated low-rank experts.

    Made by `peft.get_peft_model(model, RotMoleConfig(...))`. Nothing outside the adapted layers is
    changed, but for forward hooks on the parts of the model that walk a set of tokens, which tell
    the layers of the batch at hand (tuner/batch/batch.py) and take `task_id` out of it if the
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
        targets = self.peft_config[adapter_name].target_modules  # as given: PEFT fills it in
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
        if not self.peft_config[adapter_name].is_saved:
            for notice in target_notices(model, targets, self.targeted_module_names):
                warnings.warn(notice, stacklevel=2)

    def _check_base(self, model: nn.Module, config: RotMoleConfig) -> None:
        """Compare the model with the one a saved adapter was made for; note it in a new one."""
        fingerprint = base_fingerprint(model)
        if not config.is_saved or config.base_fingerprint is None:
            config.base_fingerprint = fingerprint
            return
        here = getattr(model, "name_or_path", None)
        notice = compare_bases(
            config.base_fingerprint, fingerprint, config.base_model_name_or_path, here
        )
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
        names = read_as_weights(self.model, current_key)
        if target_name in names:  # PEFT refuses them for LoRA
            raise ModelError(
                f"the model reads the weight of {current_key!r} and never calls the layer, or not "
                "with every kernel, so an adapter there would not be trained; add "
                f"exclude_modules: [{', '.join(sorted(names))}]"
            )
        settings = module_settings(peft_config, self.model, current_key)
        part = None
        if peft_config.router_scope == "block":
            part = block_part(parent, target_name)
            if part is None:
                settings = plain_outside(peft_config, settings, current_key)
            elif settings.num_experts == 1:
                part = None  # one expert is added in the layer itself
        _check_supported(target, current_key, settings)
        check_stack(self.model, current_key, settings)
        inference_mode = peft_config.inference_mode
        if isinstance(target, RotMoleLayer):
            target.update_layer(adapter_name, settings, inference_mode=inference_mode, part=part)
            return
        # torchao's backend of PEFT wants the function that quantises, though it is used to merge
        requantise = get_quantization_kwargs(self.model).get("get_apply_tensor_subclass")
        layer = Linear(
            target,
            adapter_name,
            settings,
            part,
            inference_mode=inference_mode,
            requantise=requantise,
        )
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an additional adapter is not trainable by itself
        self._replace_module(parent, target_name, layer, target)

    def _watch(self, model: nn.Module, adapter_name: str) -> None:
        """Hook the stacks of the model, and share out the weights of the losses."""
        config = self.peft_config[adapter_name]
        if config.router_scope == "block" and config.is_routed:
            check_blocks(model, adapter_name)
        modules = model.named_modules()
        layers = {name: module for name, module in modules if isinstance(module, RotMoleLayer)}
        if not hasattr(self, "_rotmole_watch"):
            self._rotmole_watch = Watch()
        watch = self._rotmole_watch
        watch.cover(model, list(layers))
        routed = {
            name: layer
            for name, layer in layers.items()
            if adapter_name in layer.rotmole_experts and layer.experts(adapter_name).has_router
        }
        if _asks_the_batch(config):
            watch.cover_blocks(model, list(routed))
        states = _states(model)
        for name, layer in layers.items():
            layer.rotmole_stack, layer.rotmole_path = watch.of(name), name
            layer.rotmole_block = watch.block_of(name)
            part = max((path for path in states if is_inside(name, path)), key=len)
            layer.rotmole_state = watch.states.setdefault(part, states[part])
        self._weigh_losses(config, list(routed.values()), adapter_name)

    def _weigh_losses(
        self, config: RotMoleConfig, layers: list[RotMoleLayer], adapter_name: str
    ) -> None:
        if not layers:
            return
        if config.router_task_loss_coef:
            for stack in self._rotmole_watch.stacks.values():
                stack.takes_tasks = stack.outer is None
        weights = LossWeights(
            balance=config.router_aux_loss_coef / len(layers),
            z=config.router_z_loss_coef / len(layers),
            scope=config.router_aux_loss_scope,
            task=config.router_task_loss_coef / len(layers),
            task_offset=config.router_task_offset,
            task_groups=config.router_task_groups,
        )
        seen: set[int] = set()
        for layer in layers:
            state = layer.rotmole_state
            state.wants_tasks = state.wants_tasks or bool(weights.task)
            first = id(state) not in seen
            seen.add(id(state))
            layer.experts(adapter_name).loss_weights = replace(weights, watches_accumulation=first)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = super()._unload_and_optionally_merge(*args, **kwargs)
        if hasattr(self, "_rotmole_watch"):
            self._rotmole_watch.remove()
        return model

    def _add_modules_to_save_to_tie(self, *args: Any, **kwargs: Any) -> None:
        """Do what PEFT's LoRA does for ensure_weight_tying."""
        LoraModel._add_modules_to_save_to_tie(self, *args, **kwargs)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to add adapters up: the experts of two mixtures have two routers.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            "mixtures cannot be added up by weights, because each has a router of its own; to make "
            "one mixture of trained LoRA adapters use RotMoleModel.from_adapters(base, [...])"
        )

    def unmerge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: nothing was merged.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            "a mixture of experts is never merged into the base weights, so there is nothing to "
            "unmerge; use disable_adapter() for the base model, or unload() to remove the adapter"
        )

    def subtract_mutated_init(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: a mixture has no difference of two low-rank products to be saved as.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            "a mixture cannot be saved as the difference from its start, because its gates change "
            "while it is trained; save_pretrained() saves it whole"
        )

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


def _asks_the_batch(config: RotMoleConfig) -> bool:
    """Tell whether an adapter, in training, has to know more of a batch than the layers' inputs."""
    losses = config.router_aux_loss_coef, config.router_z_loss_coef, config.router_task_loss_coef
    counts = config.router_bias_rate > 0  # padding does not count
    reads = reads_ids(config.router) or reads_sequences(config.selection)
    return any(losses) or counts or reads


def _states(model: nn.Module) -> dict[str, BalanceState]:
    """Return a fresh balance state for each part: encoder and decoder, or the whole model."""
    parts = [""]
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) and hasattr(model, "get_decoder"):
        sides = [getattr(model, f"get_{side}")() for side in ("encoder", "decoder")]
        modules = model.named_modules()
        parts += [name for name, part in modules if any(part is side for side in sides)]
    return {part: BalanceState() for part in parts}


def is_inside(name: str, part: str) -> bool:
    """Tell whether a module lies in a part of the model, by their paths; "" is the whole."""
    return part == "" or name.startswith(f"{part}.")


def check_stack(model: Any, name: str, settings: Settings) -> None:
    """Refuse modules in which a router or selection that looks beside its input cannot work.

    Args:
        model: the base model.
        name: path of the module in it.
        settings: of the module.

    Raises:
        ModelError: expert choice in a model that writes token by token, or either of them outside
            the encoder of an encoder-decoder.
    """
    ids, sequences = reads_ids(settings.router), reads_sequences(settings.selection)
    if settings.num_experts == 1 or not (ids or sequences):
        return
    setting = f"router {settings.router!r}" if ids else "selection 'expert_choice'"
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        encoder = model.get_encoder() if hasattr(model, "get_encoder") else None
        path = next((path for path, part in model.named_modules() if part is encoder), None)
        if path is None or not name.startswith(path + "."):
            raise ModelError(
                f"{setting} works in the encoder of an encoder-decoder model, and {name!r} lies "
                "outside it, where cross-attention reads other tokens than its neighbours; "
                "restrict target_modules to the encoder"
            )
    elif sequences and hasattr(model, "can_generate") and model.can_generate():
        raise ModelError(
            f"{setting} cannot be used in {type(model).__name__}, which writes token by token: "
            "experts would choose among tokens that are not written yet, so training and "
            "generation would differ; use selection top_k"
        )


def _check_supported(target: nn.Module, name: str, settings: Settings) -> None:
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
    widths = linear_widths(layer)
    assert widths is not None  # checked above
    rotations = {settings.rotation}
    if settings.shared_expert_r > 0:
        rotations.add(settings.shared_expert_rotation)
    if "radar" in rotations and widths[1] % 2:
        raise ConfigError(
            f"rotation 'radar' pairs outputs and needs an even width; {name!r} has {widths[1]}"
        )


def _is_quantised_linear(layer: nn.Module) -> bool:
    from peft.utils.quantization_utils import resolve_quantization_backend

    sized = hasattr(layer, "in_features") and hasattr(layer, "out_features")
    return sized and resolve_quantization_backend(layer) is not None


def _nearest_modules(model: nn.Module, targets: Any) -> list[str]:
    """Return up to five names of linear modules that resemble the targets, last part only."""
    wanted = [targets] if isinstance(targets, str) else sorted(targets or ())
    linear = {
        name.rpartition(".")[-1]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }
    nearest: list[str] = []
    for target in wanted:
        near = difflib.get_close_matches(target.rpartition(".")[-1], linear, n=3, cutoff=0.3)
        nearest += [name for name in near if name not in nearest]
    return (nearest or sorted(linear))[:5]
