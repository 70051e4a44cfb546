"""Every preset: starts at the base model, keeps the laws, comes back bit-equal, and trains."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import tiny
from rotmole import ConfigError, RotMoleConfig
from rotmole.tuner.experts.experts import Experts
from rotmole.tuner.layer import RotMoleLayer
from rotmole.tuner.settings.presets import PRESETS

every_preset = pytest.mark.parametrize("name", list(PRESETS))
IDS = tiny.tokens(3, 9)


def settings(name: str) -> dict[str, Any]:
    """Small ranks, so that GOAT's experts find singular directions enough in a tiny model."""
    fields = PRESETS[name].fields
    small = {} if "r" in fields else {"r": 2}
    return small | ({} if "target_modules" in fields else {"target_modules": ["q_proj", "v_proj"]})


@cache
def base() -> torch.nn.Module:
    return tiny.llama().eval()


def adapted(name: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> PeftModel:
    torch.manual_seed(0)
    config = RotMoleConfig.preset(name, **settings(name) | {"task_type": "CAUSAL_LM"} | overrides)
    return get_peft_model(copy.deepcopy(base()).to(dtype), config).eval()


def all_experts(model: PeftModel) -> list[Experts]:
    adapted = [m for m in model.modules() if isinstance(m, RotMoleLayer)]
    return [layer.experts("default") for layer in adapted]


@torch.no_grad()
def stir(model: PeftModel) -> PeftModel:
    """Move every parameter and buffer that is trained, as training would, so that all act."""
    generator = torch.Generator().manual_seed(7)
    for experts in all_experts(model):
        for parameter in experts.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.2 * noise.to(parameter.dtype))
        for buffer in experts.buffers():
            buffer.add_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model


def logits(model: torch.nn.Module, ids: torch.Tensor = IDS, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


@every_preset
def test_it_starts_at_the_base_model(name: str) -> None:
    """Bit for bit; GOAT's experts start at parts of the weight and are close to it per token.

    4 x 8 tokens: a block's activation runs over K slots, and torch rounds the last elements of a
    tensor otherwise if they do not fill its vector registers.
    """
    ids = tiny.tokens(4, 8)
    outputs, plain = logits(adapted(name), ids), logits(base(), ids)
    if name == "goat":
        distance = (outputs - plain).norm(dim=-1) / plain.norm(dim=-1)
        assert 0 < distance.max() < 0.05
    else:
        assert torch.equal(outputs, plain)


@every_preset
def test_it_comes_back_bit_equal_without_a_setting(name: str, tmp_path: Path) -> None:
    model = stir(adapted(name))
    expected = logits(model)
    assert (expected - logits(base())).abs().max() > 1e-4
    model.save_pretrained(tmp_path)
    torch.manual_seed(9)
    again = PeftModel.from_pretrained(copy.deepcopy(base()), tmp_path).eval()
    assert torch.equal(logits(again), expected)
    mapped = PeftModel.from_pretrained(copy.deepcopy(base()), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(mapped.eval()), expected)


@every_preset
def test_batch_padding_cache_and_later_tokens_change_nothing(name: str) -> None:
    model = stir(adapted(name, torch.float64))
    expected = logits(model)

    def close(outputs: torch.Tensor, wanted: torch.Tensor) -> None:
        torch.testing.assert_close(outputs, wanted, rtol=1e-9, atol=1e-9)

    close(logits(model, IDS[:1]), expected[:1])
    padded = torch.cat([torch.zeros_like(IDS[:, :2]), IDS], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 2).long().expand_as(padded)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    close(logits(model, padded, attention_mask=mask, position_ids=positions)[:, 2:], expected)
    later = IDS.clone()
    later[:, 6:] = (later[:, 6:] + 1) % tiny.VOCABULARY
    close(logits(model, later)[:, :6], expected[:, :6])
    with torch.no_grad():
        first = model(input_ids=IDS[:, :5], use_cache=True)
        last = model(input_ids=IDS[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    close(torch.cat([first.logits, last.logits], dim=1), expected)


@every_preset
def test_the_order_of_experts_means_nothing(name: str) -> None:
    model = stir(adapted(name, torch.float64))
    expected = logits(model)
    for experts in all_experts(model):  # the layers of a MixLoRA block share one order
        generator = torch.Generator().manual_seed(experts.spec.num_experts)
        order = torch.randperm(experts.spec.num_experts, generator=generator)
        for tensor in [*experts.parameters(), *experts.buffers()]:
            if tensor.dim() and tensor.shape[0] == experts.spec.num_experts > 1:
                tensor.data = tensor.data[order]
    torch.testing.assert_close(logits(model), expected, rtol=1e-9, atol=1e-9)


@every_preset
def test_every_trainable_parameter_has_a_gradient_tensor(name: str) -> None:
    model = stir(adapted(name)).train()
    tasks = {"task_id": torch.tensor([0, 1, 0])} if name == "loramoe" else {}
    model(input_ids=IDS, labels=IDS, **tasks).loss.backward()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert not [n for n, p in named.items() if p.grad is None]
    assert all(torch.isfinite(p.grad).all() for p in named.values())


def test_preset_lora_counts_exactly_pefts_lora() -> None:
    shared = {"r": 3, "target_modules": "all-linear"}
    lora = get_peft_model(tiny.llama(), LoraConfig(**shared, task_type="CAUSAL_LM"))
    config = RotMoleConfig.preset("lora", **shared, task_type="CAUSAL_LM")
    ours = get_peft_model(tiny.llama(), config)
    assert ours.get_nb_trainable_parameters() == lora.get_nb_trainable_parameters()


def test_overrides_win_and_a_preset_is_never_changed_by_them() -> None:
    config = RotMoleConfig.preset("mola", num_experts_pattern=[1, 3], r=5)
    assert (config.num_experts_pattern, config.r, config.rotation) == ([1, 3], 5, "none")
    config = RotMoleConfig.preset("mola")
    config.num_experts_pattern.append(99)
    assert RotMoleConfig.preset("mola").num_experts_pattern == [2, 4, 6, 8]
    with pytest.raises(ConfigError, match="did you mean 'goat'"):
        RotMoleConfig.preset("goatt")


SAYS: dict[str, Callable[[Experts], bool]] = {
    "lora": lambda e: e.spec.num_experts == 1 and not e.gate_names,
    "hydralora": lambda e: len(e.expert_A) == 1 and len(e.expert_B) == 4,
    "mola": lambda e: e.spec.num_experts in (2, 6),
    "switch": lambda e: e.spec.top_k == 1,
    "goat": lambda e: e.spec.scale == pytest.approx((3 * 32 / 2) ** 0.5),
    "flylora": lambda e: not e.expert_A.requires_grad and e.expert_A.shape == (32, 1, 32),
    "mixlora": lambda e: e.spec.num_experts in (1, 8),
    "radargate": lambda e: "radar_up" in e.gate_names,
    "deepseekmoe": lambda e: e.shared_A.shape[:2] == (1, 16) and not e.spec.norm_topk_prob,
    "deepseek_v3": lambda e: e.router_bias is not None and e.spec.scale == 2.5 * 16 / 2,
    "rotmole": lambda e: "rotation_vector" in e.gate_names,
}


@pytest.mark.parametrize("name", list(SAYS))
def test_it_is_what_it_says(name: str) -> None:
    assert all(SAYS[name](experts) for experts in all_experts(adapted(name)))
