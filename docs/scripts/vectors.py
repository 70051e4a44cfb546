"""Parity vectors for authors of engines: one layer of each kind, its inputs, weights and outputs.

Writes docs/vectors/NAME.safetensors. Everything is computed in float64 by the slow loops of
`rotmole.ops.reference`. Tensors of one file:

    x [T, D], base_weight [O, D]
    the parameters of the layer, under the names they have in adapter_model.safetensors
    logits [T, E], weight [T, E]   scores of the router; weights of the experts, 0 if not selected
    added [T, O], output [T, O]    what the adapter adds; base_weight x + added

The metadata has `config`, the settings of RotMoleConfig as JSON, and `scale`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

import rotmole
from rotmole.files import atomic_write_bytes, make_folder
from rotmole.ops.reference.layer import layer, logits_of
from rotmole.ops.reference.method import route
from rotmole.ops.rotation.table import gate_shapes

FOLDER = Path(__file__).parents[1] / "vectors"
TOKENS, INPUTS, OUTPUTS = 8, 16, 12
SHARED = {"num_experts": 4, "top_k": 2, "r": 4, "lora_alpha": 8.0}
CASES: dict[str, dict[str, Any]] = {
    "moe_lora": {"rotation": "none"},
    "dense": {"rotation": "none", "selection": "dense"},
    "not_normalised": {"rotation": "none", "norm_topk_prob": False},
    "tangent": {"rotation": "tangent"},
    "plane": {"rotation": "plane"},
    "givens": {"rotation": "givens"},
    "shared_expert": {"rotation": "tangent", "shared_expert_r": 3, "shared_expert_gate": True},
}


def vectors(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of one case."""
    settings = SHARED | CASES[name]
    config = rotmole.RotMoleConfig(**settings)
    E, R, scale = config.num_experts, config.r, config.lora_alpha / config.r
    generator = torch.Generator().manual_seed(len(name))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5

    x = draw(TOKENS, INPUTS) * INPUTS**0.5
    base = draw(OUTPUTS, INPUTS)
    parameters = {
        "expert_A": draw(E, R, INPUTS),
        "expert_B": draw(E, R, OUTPUTS),
        "router_weight": draw(E, INPUTS),
    }
    shapes = gate_shapes(config.rotation, E=E, R=R, D=INPUTS, O=OUTPUTS)
    gates = {key: draw(*shape) for key, shape in shapes.items()}
    shared, shared_settings = None, None
    if config.shared_expert_r:
        rank = config.shared_expert_r
        shared = {"A": draw(1, rank, INPUTS), "B": draw(1, rank, OUTPUTS), "gate": draw(1, INPUTS)}
        shared_settings = {"rotation": "none", "scale": config.lora_alpha / config.r}
        parameters |= {f"shared_{key}": value for key, value in shared.items()}
    rule = {name: getattr(config, name) for name in ("top_k", "selection", "norm_topk_prob")}
    added, _ = layer(
        x, parameters["expert_A"], parameters["expert_B"], gates,
        rotation=config.rotation, scale=scale, router_ED=parameters["router_weight"],
        shared=shared, shared_settings=shared_settings, **rule,
    )  # fmt: skip
    logits = logits_of(x, parameters["router_weight"])
    computed = {
        "logits": logits,
        "weight": route(logits, **rule).weight_TE,
        "added": added,
        "output": x @ base.T + added,
    }
    tensors = {"x": x, "base_weight": base} | parameters | gates | computed
    return tensors, {"config": json.dumps(settings, sort_keys=True), "scale": str(scale)}


def content(name: str) -> bytes:
    """Return the file of one case."""
    tensors, metadata = vectors(name)
    return save({key: value.contiguous() for key, value in tensors.items()}, metadata=metadata)


if __name__ == "__main__":
    make_folder(FOLDER)
    for case in CASES:
        atomic_write_bytes(FOLDER / f"{case}.safetensors", content(case))
        sys.stdout.write(f"{case}\n")
