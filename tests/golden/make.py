"""Write the golden folder of a release: `python tests/golden/make.py 0.1.0`, once, before it ships.

Every later version must load these adapters and compute the same logits (test_golden.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from rotmole import RotMoleConfig
from rotmole.ops import ROTATIONS

IDS = torch.arange(12).reshape(2, 6)


def base_model() -> LlamaForCausalLM:
    """Return the tiny base model; its weights are stored, seeds may mean something else one day."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=16, max_position_embeddings=16,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def settings(rotation: str) -> dict[str, object]:
    """Return the settings of a mode's adapter; the rarer options are spread over the modes."""
    extra: dict[str, dict[str, object]] = {
        "none": {"selection": "dense"},
        "tangent": {"rotation_metric": "output", "rank_pattern": {"v_proj": 6}},
        "givens": {"top_k": 1, "norm_topk_prob": False, "rotation_planes": 1},
        "bias": {"rotation_input": "z", "use_rslora": True},
        "radar_pairs": {"radar_rank": 2},
    }
    chosen = {"rotation": rotation, "r": 4, "target_modules": ["q_proj", "v_proj"]}
    return chosen | extra.get(rotation, {})


def main(version: str) -> None:
    """Write tests/golden/<version>/: base/, one folder a mode, logits.safetensors."""
    root = Path(__file__).with_name(version)
    root.mkdir()
    base_model().save_pretrained(root / "base")
    logits = {}
    for number, rotation in enumerate(ROTATIONS):
        base = base_model()
        torch.manual_seed(number + 1)
        model = get_peft_model(base, RotMoleConfig(**settings(rotation), init_weights=False)).eval()
        model.peft_config["default"].init_weights = True
        model.save_pretrained(root / rotation)
        (root / rotation / "README.md").unlink()
        with torch.no_grad():
            logits[rotation] = model(input_ids=IDS).logits
    save_file(logits, root / "logits.safetensors")


if __name__ == "__main__":
    main(sys.argv[1])
