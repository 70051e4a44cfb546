"""Draw the initial parameters of adapters so that methods of a comparison start alike."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from rotmole.tuner.experts.initial import draw
from rotmole.tuner.layer import RotMoleLayer


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
