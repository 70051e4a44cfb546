"""A tiny mixture whose inspection has nothing to say, and truths planted into it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel, get_peft_model

import rotmole
import tiny
from rotmole.inspection.inspect import Request, inspect_adapter
from rotmole.inspection.inspection import Inspection
from rotmole.inspection.probe import Found, adapted_layers
from rotmole.inspection.sample import Sample

FIRST = "model.layers.0.self_attn.q_proj"
SECOND = "model.layers.1.self_attn.q_proj"
MIDDLE = tiny.VOCABULARY // 2
"""Tokens below it are those of languages "de", the others those of "fr"."""


class Words:
    """As much of a tokenizer as an inspection asks for: a token is its number."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def base() -> Any:
    """A model whose first layer reads 1 in feature 0, and 1 in feature 1 of the tokens of "fr".

    Embeddings have equal lengths, so that the norm before the layer changes nothing else.
    """
    model = tiny.llama()
    with torch.no_grad():
        embedded = model.get_input_embeddings().weight
        embedded.normal_(generator=torch.Generator().manual_seed(1))
        embedded[:, :2] = 0.0
        french = (torch.arange(len(embedded)) >= MIDDLE).float()
        width = embedded.shape[1]
        rest = (width - 1 - french).sqrt().unsqueeze(-1)
        embedded.mul_(rest / embedded.norm(dim=-1, keepdim=True))
        embedded[:, 0], embedded[:, 1] = 1.0, french
        # later layers read nearly the same
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.1)
            layer.mlp.down_proj.weight.mul_(0.1)
    return model


def mixture(**settings: object) -> PeftModel:
    """A mixture with weights as after training: experts differ, routers have moved."""
    chosen = {"num_experts": 4, "top_k": 2, "r": 4, "rotation": "tangent"} | settings
    config = rotmole.RotMoleConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], **chosen
    )
    model = get_peft_model(base(), config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for found in layers(model).values():
            for name, parameter in found.experts.named_parameters():
                size = 0.2 if name in ("expert_A", "expert_B") else 0.5
                parameter.normal_(0, size, generator=generator)
                if name != "expert_B" and parameter.shape[-1] == 32:
                    parameter[..., :2] = 0.0  # nothing depends on the language
    return model.eval()


def layers(model: PeftModel) -> dict[str, Found]:
    return adapted_layers(model, "default")


def rows(seed: int, count: int = 12, length: int = 16) -> dict[str, list[dict[str, list[int]]]]:
    """Rows of two tasks in two languages each."""
    generator = torch.Generator().manual_seed(seed)
    ranges = {"de": (3, MIDDLE), "fr": (MIDDLE, tiny.VOCABULARY)}
    return {
        f"{task}/{group}": [
            {"input_ids": torch.randint(*of, (length,), generator=generator).tolist()}
            for _ in range(count)
        ]
        for task in ("units", "dates")
        for group, of in ranges.items()
    }


def inspected(
    plant: Callable[[dict[str, Found]], None] | None = None, request: Request | None = None,
    **settings: object,
) -> Inspection:  # fmt: skip
    """Inspect a mixture after planting something into its layers."""
    model = mixture(**settings)
    if plant is not None:
        with torch.no_grad():
            plant(layers(model))
    return inspect_adapter(
        model, Words(), Sample(rows(1), rows(2), "rows"),
        request=request or Request(answers=False), target="planted",
    )  # fmt: skip


RIGHT_ANGLE = math.pi / 2
