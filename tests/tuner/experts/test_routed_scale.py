"""routed_scaling_factor: part of s in every way, and what it does to the first update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import tiny
from rotmole import RotMoleConfig
from rotmole.optim import parameter_groups
from rotmole.tuner.experts.experts import Experts
from rotmole.tuner.layer import RotMoleLayer

IDS = tiny.tokens(3, 7)
CASES: dict[str, dict[str, Any]] = {
    "fused": {"rotation": "tangent"},
    "grouped": {"dispatch": "grouped", "rotation": "plane"},
    "dense": {"rotation": "radar_pairs", "selection": "dense"},
    "sqrt gate": {"router_sqrt_gate": True, "rotation": "none"},
    "shared": {"shared_expert_r": 3, "shared_expert_alpha": 5, "shared_expert_gate": True},
    "one of the layers": {"num_experts_pattern": {"v_proj": 1}, "alpha_pattern": {"v_proj": 6}},
    "block": {
        "router_scope": "block", "rotation": "none", "alpha_pattern": {"q_proj": 6},
        "target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"],
    },
}  # fmt: skip


def adapted(**settings: Any) -> PeftModel:
    torch.manual_seed(0)
    fields = {"r": 4, "num_experts": 4, "target_modules": ["q_proj", "v_proj"]}
    fields |= {"lora_alpha": 6, "init_weights": False, "task_type": "CAUSAL_LM"}
    return get_peft_model(tiny.llama().double(), RotMoleConfig(**(fields | settings))).double()


def experts(model: PeftModel) -> list[Experts]:
    return [m.experts("default") for m in model.modules() if isinstance(m, RotMoleLayer)]


def computed(model: PeftModel) -> dict[str, Tensor]:
    """Return logits, those of cached decoding, and every gradient."""
    with torch.no_grad():
        cache = model.eval()(input_ids=IDS[:, :-1], use_cache=True).past_key_values
        last = model(input_ids=IDS[:, -1:], past_key_values=cache).logits
    output = model(input_ids=IDS, labels=IDS)
    output.loss.backward()
    found = {"logits": output.logits.detach(), "decoded": last}
    return found | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CASES)
def test_it_multiplies_what_is_routed_and_nothing_else(name: str) -> None:
    """Twice the lora_alpha does the same, where neither the shared expert nor E = 1 takes it."""
    settings = CASES[name]
    doubled = computed(adapted(**settings, routed_scaling_factor=2.0))
    wanted = computed(adapted(**settings, lora_alpha=12))
    assert doubled.keys() == wanted.keys()
    for key, value in doubled.items():
        assert torch.equal(value, wanted[key]), key
    assert not torch.allclose(doubled["logits"], computed(adapted(**settings))["logits"])


def test_the_shared_expert_keeps_the_scale_without_it() -> None:
    one = experts(adapted(shared_expert_r=3, routed_scaling_factor=2.5))[0]
    assert one.spec.shared is not None
    assert (one.spec.scale, one.spec.shared.scale) == (2.5 * 6 / 4, 6 / 4)


def test_it_is_saved_and_an_adapter_without_it_has_one(tmp_path: Path) -> None:
    model = adapted(routed_scaling_factor=2.5)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.llama().double(), tmp_path).double()
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)
    config = tmp_path / "adapter_config.json"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace('"routed_scaling_factor": 2.5,', ""), encoding="utf-8")
    assert RotMoleConfig.from_pretrained(tmp_path).routed_scaling_factor == 1.0


def test_goat_starts_at_the_same_function_with_it() -> None:
    """Segments are divided by s and the residual is multiplied by it."""
    options = {"init_weights": "svd", "r": 2, "num_experts": 2, "rotation": "none", "goat_eta": 1.0}
    plain, model = adapted(**options), adapted(**options, routed_scaling_factor=2.0)
    for ours, theirs in zip(experts(model), experts(plain), strict=True):
        assert ours.spec.scale == 2 * theirs.spec.scale
        torch.testing.assert_close(ours.expert_A, theirs.expert_A / 2**0.5)
        ours.router_weight.data.copy_(theirs.router_weight)
    with torch.no_grad():
        found, wanted = (m.eval()(input_ids=IDS).logits for m in (model, plain))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-7)  # the SVD is in float32


# The first update

D, O, LR = 64, 48, 1e-3  # noqa: E741  the legend's letter for out_features


def first_update(x_D: Tensor, seed: int = 1, **settings: Any) -> tuple[Tensor, Experts]:
    """Return by how much one step of Adam on one token moves that token's output, and where from.

    The output is pushed in a random direction, as by a loss.
    """
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(D, O, bias=False)).double()
    fields = {"rotation": "none", "target_modules": ["0"]} | settings
    model = get_peft_model(base, RotMoleConfig(**fields)).double()
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=LR), eps=1e-30)
    generator = torch.Generator().manual_seed(2)
    push_O = torch.randn(O, generator=generator, dtype=torch.float64)
    before_O = model(x_D)
    (before_O @ push_O).backward()
    optimizer.step()
    with torch.no_grad():
        return model(x_D) - before_O, experts(model)[0]


def _weights(layer: Experts, x_D: Tensor) -> list[float]:
    if not layer.has_router:
        return [1.0]
    return tiny.routing(layer, x_D[None]).weight_TE[0].tolist()  # type: ignore[no-any-return] # untyped


def test_weights_that_sum_to_one_divide_the_first_step_by_K_and_the_factor_undoes_it() -> None:
    """At equal s; |dy| of MoE-LoRA of E=4, K=2, R=4 over that of LoRA of its active rank, 8."""
    mixture = {"r": 4, "num_experts": 4, "top_k": 2, "lora_alpha": 8}
    one = {"r": 8, "num_experts": 1, "lora_alpha": 16}  # s = 2 as well
    x_TD = torch.randn(64, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    sizes: dict[str, list[float]] = {"lora": [], "moe": [], "moe, K": []}
    for seed, x_D in enumerate(x_TD):
        for name, settings in (
            ("lora", one), ("moe", mixture), ("moe, K", mixture | {"routed_scaling_factor": 2.0}),
        ):  # fmt: skip
            dy_O, layer = first_update(x_D, seed, **settings)
            sizes[name].append(float(dy_O.norm()))
            # dy = lr s sum_e g_e |A_e x|_1 sign, because Adam's first step is lr times the sign
            weight_E = _weights(layer, x_D)
            lengths = [float((A_RD @ x_D).abs().sum()) for A_RD in layer.expert_A.detach()]
            total = sum(g * z for g, z in zip(weight_E, lengths, strict=True))
            expected = LR * layer.spec.scale * total
            # A moves too, from a gradient of 0 at B = 0: by nothing
            assert dy_O.abs().tolist() == pytest.approx([expected] * O, rel=1e-6)
    mean = {name: sum(values) / len(values) for name, values in sizes.items()}
    assert mean["moe"] / mean["lora"] == pytest.approx(1 / 2, rel=0.05)
    assert mean["moe, K"] / mean["lora"] == pytest.approx(1.0, rel=0.05)


def test_at_equal_lora_alpha_the_smaller_rank_has_undone_it_already() -> None:
    """s = lora_alpha / r is K times as large at R as at K R."""
    x_D = torch.randn(D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    moe = first_update(x_D, r=4, num_experts=4, top_k=2, lora_alpha=16)[0].norm()
    lora = first_update(x_D, r=8, num_experts=1, lora_alpha=16)[0].norm()
    assert float(moe / lora) == pytest.approx(1.0, rel=0.3)
