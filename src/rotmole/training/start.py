"""Give two adapters the same start, so that a comparison of their gates compares nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from rotmole.errors import AdapterError
from rotmole.files import atomic_write_bytes
from rotmole.tuner.experts.experts import ROTATION_GATE
from rotmole.tuner.experts.initial import draw
from rotmole.tuner.layer import RotMoleLayer


def shared_parameters(model: nn.Module, adapter: str = "default") -> Iterator[tuple[str, Tensor]]:
    """Yield what a RotMoLE adapter and its scalar-gated twin have in common: A, B and router.

    Args:
        model: a model with the adapter.
        adapter: its name.

    Yields:
        (path in the model, parameter), in module order; rotation gates are left out.
    """
    for path, module in model.named_modules():
        if isinstance(module, RotMoleLayer) and adapter in module.rotmole_experts:
            experts = module.experts(adapter)
            for name, parameter in experts.named_parameters(recurse=False):
                if experts.role(name) != ROTATION_GATE:
                    yield f"{path}.{name}", parameter


def save_start(model: nn.Module, path: Path) -> None:
    """Write the common parameters as they are now.

    Args:
        model: a model with an adapter named "default".
        path: a safetensors file; it appears complete or not at all.

    Raises:
        StorageError: the disk refused.
    """
    tensors = {name: value.detach().contiguous() for name, value in shared_parameters(model)}
    atomic_write_bytes(path, save(tensors))


@torch.no_grad()
def load_start(model: nn.Module, path: Path) -> None:
    """Copy the common parameters of another adapter into this one, by name.

    Args:
        model: a model whose adapter "default" has the same experts, rank and modules.
        path: what `save_start` wrote.

    Raises:
        AdapterError: names or shapes differ.
    """
    saved = load_file(path)
    parameters = dict(shared_parameters(model))
    shapes = [
        {name: tuple(value.shape) for name, value in side.items()} for side in (saved, parameters)
    ]
    if shapes[0] != shapes[1]:
        name = min(n for n in {*saved, *parameters} if shapes[0].get(n) != shapes[1].get(n))
        raise AdapterError(
            f"the two adapters do not share a start: {name} is {shapes[1].get(name)} here and "
            f"{shapes[0].get(name)} there; they need the same experts, rank and modules."
        )
    for name, parameter in parameters.items():
        parameter.copy_(saved[name])


def draw_by_layer(model: nn.Module, seed: int, adapter: str = "default") -> None:
    """Draw the initial parameters anew, each layer from the seed and its own path.

    Methods with A or a router of one shape then have the same one, whatever gates they have
    besides; drawn in one go, the first gate would shift all that follow. Adapters that start from
    the base weight (init_weights "svd") and those of PEFT's other methods stay as they are.

    Args:
        model: a model with the adapter, before training.
        seed: of the run.
        adapter: its name.
    """
    for path, module in model.named_modules():
        if not isinstance(module, RotMoleLayer) or adapter not in module.rotmole_experts:
            continue
        config = model.peft_config[adapter]
        if config.init_weights != "svd":
            text = f"{seed}|{path}".encode()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:7], "big"))
                draw(module.experts(adapter), config.init_weights, config.A_density)


def start_digest(model: nn.Module) -> str:
    """Return the sha256 of the common parameters: equal for adapters with one start.

    Args:
        model: a model with an adapter named "default".

    Returns:
        Hexadecimal digest over names and float32 values.
    """
    digest = hashlib.sha256()
    for name, parameter in shared_parameters(model):
        digest.update(name.encode())
        digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
