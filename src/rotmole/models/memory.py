"""An estimate of the memory that a training run needs, from a model without weights."""

from __future__ import annotations

import os
import re
import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from rotmole.errors import ModelError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment] # the module, or None

FRAGMENTATION = 1.5
"""Batches differ in length, so the C allocator cannot reuse all freed memory; measured."""

FIRST_UPDATE = 55_000_000
"""Bytes of code and buffers that libraries load with the first update; measured."""

_STATUS = Path("/proc/self/status")
_QUANTISED_BYTES = {"bnb-8bit": 1.0, "torchao-int8": 1.0, "bnb-4bit-nf4": 0.5625}


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


_CPU_ATTENTION: dict[Any, Any] = {  # torch's registry has the forms of GPUs only
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class UnknownCostError(ModelError):
    """What an update does depends on values, so it cannot be counted without weights."""


HEAD_TILE = 4096 * 4
"""Bytes per word of the vocabulary: TRL's fused head projects 4096 tokens at a time."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a training process holds at its peak.

    Attributes:
        process: interpreter, libraries, tokenizer and rows.
        weights: parameters of the base model.
        adapter: trainable parameters.
        optimizer: state of the optimizer.
        step: activations, gradients and temporary tensors of one update.
    """

    process: int
    weights: int
    adapter: int
    optimizer: int
    step: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.process + self.weights + self.adapter + self.optimizer + self.step


def estimate_memory(
    model: nn.Module,
    *,
    batch: int,
    length: int,
    settings: Mapping[str, Any],
    process: int,
    quantization: str = "none",
) -> MemoryEstimate:
    """Estimate the peak memory of training.

        total     = process + weights + adapter + optimizer + step
        process   = process now + 55 MB that libraries load with the first update
        weights   = sum over frozen parameters of size * bytes of their type; with quantisation a
                    weight of a linear layer, except the head, takes 1 byte (8 bits) or 0.5625
                    bytes (4 bits)
        adapter   = the same sum over trainable parameters
        optimizer = states per parameter * adapter (AdamW: 2 states)
        step      = 1.5 * (peak of one traced forward and backward + head), plus one set of
                    gradients with gradient accumulation
        head      = min(T, 4096) * V * 4 bytes, T = batch * length, V the vocabulary; with label
                    smoothing, which needs all logits, 3 * T * V * 4 bytes

    Args:
        model: the adapted model on the meta device; its parameters are replaced by fake ones.
        batch: rows of a micro-batch.
        length: tokens of the longest row.
        settings: arguments of SFTConfig (optim, gradient_accumulation_steps, ...).
        process: bytes that the process holds before a model is loaded.
        quantization: model.quantization of the run file.

    The two measured constants come from three tiny runs and one of SmolLM2-135M on a CPU, for
    which the estimate is within 12 % of the peak.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    adapter = _bytes(trainable)
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    head = min(batch * length * 4, HEAD_TILE) * vocabulary
    if settings.get("label_smoothing_factor"):
        head = 3 * batch * length * 4 * vocabulary
    names = ("activation_checkpointing", "gradient_checkpointing")
    checkpointing = any(settings.get(name) for name in names)
    traced = traced_update(model, batch=batch, length=length, checkpointing=checkpointing).peak
    accumulated = adapter if settings.get("gradient_accumulation_steps", 1) > 1 else 0
    return MemoryEstimate(
        process=process + FIRST_UPDATE,
        weights=_base_bytes(model, _QUANTISED_BYTES.get(quantization)),
        adapter=adapter,
        optimizer=_optimizer_states(str(settings.get("optim", "adamw"))) * adapter,
        step=int(FRAGMENTATION * (traced + head)) + accumulated,
    )


@dataclass(frozen=True)
class Traced:
    """What one forward and backward of a batch does, without the head.

    Attributes:
        peak: the most bytes of live tensors, with gradients and without parameters.
        products: floating-point operations of matrix products and attention.
        written: bytes of all tensors that are made.
        calls: operations that make a tensor.
    """

    peak: int
    products: int
    written: int
    calls: int


def traced_update(model: nn.Module, *, batch: int, length: int, checkpointing: bool) -> Traced:
    """Run one forward and backward on tensors without data.

    Args:
        model: the adapted model on the meta device; its parameters are replaced by fake ones.
        checkpointing: recompute activations in the backward pass.

    Raises:
        UnknownCostError: some methods of PEFT read values of their tensors on the way.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    base: Any = model.get_base_model()  # type: ignore[operator]
    backbone = getattr(base, base.base_model_prefix, base)
    if checkpointing:
        base.enable_input_require_grads()
        base.gradient_checkpointing_enable()
    model.train()
    with FakeTensorMode():
        _replace_by_fake(backbone)
        counter = _LiveBytes(backbone)
        ids = torch.zeros(batch, length, dtype=torch.long)
        try:
            with counter:
                output = backbone(
                    input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
                )
                loss = output[0].float().sum()
                del output
                loss.backward()
        except Exception as error:  # the code of any PEFT method runs here
            kind = getattr(next(iter(model.peft_config.values())), "peft_type", "the method")  # type: ignore[union-attr,operator] # a PeftModel
            raise UnknownCostError(
                f"the operations of {getattr(kind, 'value', kind)} depend on values, so its time "
                "and memory are not known before training."
            ) from error
    return Traced(counter.peak, counter.products, counter.written, counter.calls)


def resident_bytes() -> int:
    """Return the bytes this process holds now, or its peak on systems other than Linux.

    Source: /proc/self/statm on Linux, getrusage elsewhere.
    """
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_rss_bytes()


def peak_rss_bytes() -> int:
    """Return the most bytes this process has held; 0 on Windows, where Python cannot tell.

    Source: VmHWM of /proc/self/status on Linux, where getrusage starts at the peak of the process
    that started this one; getrusage elsewhere.
    """
    if _STATUS.is_file() and (peak := re.search(r"VmHWM:\s+(\d+)", _STATUS.read_text())):
        return 1024 * int(peak[1])
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _LiveBytes(TorchDispatchMode):
    """Counts operations, and the bytes of live storages except parameters and buffers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.live = self.peak = self.written = self.calls = self.products = 0
        tensors = [*model.parameters(), *model.buffers()]
        self.sizes = {id(tensor.untyped_storage()): 0 for tensor in tensors}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        # not FlopCounterMode: its tracker of modules keeps tensors alive
        packet = getattr(function, "_overloadpacket", None)
        count = _CPU_ATTENTION.get(packet) or flop_registry.get(packet)
        if count is not None:
            self.products += count(*args, **(kwargs or {}), out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key = id(storage)
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.live += self.sizes[key]
            self.written += self.sizes[key]
            self.calls += 1
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


def _replace_by_fake(model: nn.Module) -> None:
    """Replace the meta tensors by fake ones, which have no data but report to be on the CPU."""
    fakes: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in fakes:
            fakes[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        return fakes[id(tensor)]

    for module in list(model.modules()):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(fake(parameter), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)


def _bytes(parameters: Any) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _base_bytes(model: nn.Module, quantised: float | None) -> int:
    """Return the bytes of the frozen parameters.

    Args:
        quantised: bytes per weight of linear layers other than the head; None if not quantised.
    """
    total = float(_bytes(p for p in model.parameters() if not p.requires_grad))
    if quantised is None:
        return int(total)
    head = model.get_base_model().get_output_embeddings()  # type: ignore[operator]
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            weight = module.weight
            total -= 0 if weight.requires_grad else weight.numel() * weight.element_size()
            total += 0 if weight.requires_grad else weight.numel() * quantised
    return int(total)


def _optimizer_states(optim: str) -> float:
    """Return the size of an optimizer's state, in copies of the trainable parameters."""
    if "8bit" in optim:
        return 0.5
    if optim.startswith(("sgd", "adafactor", "galore", "apollo", "lomo")):
        return 0.1
    return 1.0 if optim.startswith(("lion", "rmsprop", "adagrad")) else 2.0
