"""MixLoRA (arXiv 2404.15159; github.com/TUDB-Labs/MixLoRA): a feed-forward block of experts.

Loaded in isolation: mixlora/model.py with its config, lora_linear and utils, an empty package in
place of __init__. The repository computes no balance loss (its training code is another one).
"""

from __future__ import annotations

from functools import partial

import torch
from common import R, checkout, compare, finish, gradients, isolated, load
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from rotmole import RotMoleConfig

NAMES = ("gate_proj", "up_proj", "down_proj")
K, E = 2, 4

path = checkout(__doc__)
isolated("original", path / "mixlora")
original, config = load("original.model"), load("original.config")

base = LlamaForCausalLM(
    LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, vocab_size=32,
                num_attention_heads=2, num_key_value_heads=2)
).double()  # fmt: skip
settings = RotMoleConfig(
    r=R, lora_alpha=6, num_experts=E, top_k=K, rotation="none", router_scope="block",
    target_modules=list(NAMES), init_weights=False,
)  # fmt: skip
mlp = get_peft_model(base, settings).double().base_model.model.model.layers[0].mlp
layers = {name: getattr(mlp, name) for name in NAMES}
own = {name: layer.experts("default") for name, layer in layers.items()}
router = own["gate_proj"].router_weight


class Block(torch.nn.Module):
    """The base layers as the original expects them: a plain feed-forward module."""

    def __init__(self) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer.base_layer)


plain = Block()
options = config.MixLoraConfig(
    dtype_=torch.float64, model_type_="llama", lora_init_="original", lora_r_=R, lora_alpha_=6,
    lora_dropout_=0.05, num_experts_=E, top_k_=K, jitter_noise_=0.0, act_fn_=mlp.act_fn,
)  # fmt: skip
theirs = original.MixLoraSparseMoe(plain, options)
theirs.gate_ = router.detach().clone().requires_grad_()
make = partial(original.LoraLinear, config=options)
leaves = {"router": theirs.gate_}
for name, experts in own.items():
    for e in range(E):
        weight = (experts.expert_A[e].detach(), experts.expert_B[e].detach().T)
        expert = make(getattr(plain, name), weight=weight).eval()  # eval: no dropout
        theirs.experts_[f"experts.{e}.{name}"] = expert
        leaves |= {f"{name} A{e}": expert.lora_A.weight, f"{name} B{e}": expert.lora_B.weight}

x = torch.randn(2, 12, 16, dtype=torch.float64, requires_grad=True)
mine = {"x": x, "router": router}
for name, experts in own.items():
    mine |= {f"{name} A": experts.expert_A, f"{name} B": experts.expert_B}
found = gradients(mlp(x), mine)
wanted = gradients(theirs(x), {"x": x} | leaves)
for name in NAMES:
    for factor in "AB":
        parts = [wanted.pop(f"gradient of {name} {factor}{e}") for e in range(E)]
        wanted[f"gradient of {name} {factor}"] = torch.stack(
            [part if factor == "A" else part.T for part in parts]
        )
finish(compare(found, wanted))
