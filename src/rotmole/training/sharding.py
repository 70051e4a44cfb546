"""A model whose weights are spread over processes (FSDP2): sharding it, saving it whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def whole(value: Tensor, device: torch.device) -> Tensor:
    """Return a tensor that is no shard: FSDP2's are put together, all others come back as they are.

    Args:
        value: any tensor, or a shard of one (DTensor).
        device: where the processes exchange tensors; shards may lie elsewhere, with CPU offload.

    Returns:
        The whole tensor; a sharded one lands on the CPU.

    >>> whole(torch.zeros(2, 3), torch.device("cpu")).shape
    torch.Size([2, 3])
    """
    if not hasattr(value, "full_tensor"):
        return value
    return value.detach().to(device).full_tensor().cpu()


def adapter_state(model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Put together all that belongs to the adapter; every process must call it at the same point.

    The base model's weights are left out: with FSDP2 they may not fit into one process.

    Args:
        model: the PeftModel, sharded or not.
        device: where the processes exchange tensors.

    Returns:
        State-dict key -> whole tensor, the keys that PEFT's save_pretrained looks for.
    """
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    prefix: str = model.base_model.prefix  # type: ignore[union-attr, assignment] # PEFT's tuner
    state: dict[str, Any] = model.state_dict()
    return {k: whole(v, device) for k, v in state.items() if k in trained or prefix in k}


def allow_sharding_on_cpus() -> None:
    """Let accelerate shard on CPUs too, which it would go on without, and without a word.

    accelerate 1.15 looks for FSDP settings only if processes are on GPUs. On CPUs (tests, mostly)
    their kind is renamed before it looks; the process group stays gloo.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    state = PartialState()
    if state.distributed_type is DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


def unpin(plugin: Any) -> None:
    """Let offloaded shards rest in ordinary memory, if training runs on CPUs.

    FSDP2's CPU offload (torch 2.13) asks for pinned memory, which torch gives only if there is a
    GPU.

    Args:
        plugin: accelerate's FSDP plugin; None, or one without offload, is left alone.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy

    if isinstance(getattr(plugin, "cpu_offload", None), CPUOffloadPolicy):
        plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)
