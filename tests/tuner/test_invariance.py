"""Tokens do not see each other through the adapter: batch, padding, cache, causality, passes."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model

import tiny
from rotmole import RotMoleConfig
from rotmole.ops import ROTATIONS

MODES = list(ROTATIONS)
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def _adapted(rotation: str, **settings: object) -> PeftModel:
    """Return a float64 model whose adapter is far from its zero start."""
    config = RotMoleConfig(
        rotation=rotation, r=4, target_modules="all-linear", init_weights=False, **settings
    )
    return get_peft_model(tiny.llama(), config).double().eval()


def _logits(model: PeftModel, ids: torch.Tensor, **inputs: object) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


@pytest.mark.parametrize("rotation", MODES)
def test_adapter_changes_the_output_and_two_passes_are_bit_equal(rotation: str) -> None:
    model, ids = _adapted(rotation, lora_dropout=0.5), tiny.tokens(2, 9)
    first = _logits(model, ids)
    assert torch.equal(first, _logits(model, ids))
    with model.disable_adapter():
        assert (first - _logits(model, ids)).abs().max() > 1e-3


@pytest.mark.parametrize("rotation", MODES)
def test_batching_changes_nothing(rotation: str) -> None:
    model, ids = _adapted(rotation), tiny.tokens(4, 9)
    together = _logits(model, ids)
    for row in range(4):
        alone = _logits(model, ids[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, **EXACT)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rotation", MODES)
def test_padding_changes_nothing(rotation: str, side: str) -> None:
    model, ids = _adapted(rotation), tiny.tokens(2, 9)
    plain = _logits(model, ids)
    pad = torch.zeros(2, 5, dtype=torch.long)
    parts = [pad, ids] if side == "left" else [ids, pad]
    padded = torch.cat(parts, dim=1)
    mask = torch.cat([torch.zeros_like(p) if p is pad else torch.ones_like(p) for p in parts], 1)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    logits = _logits(model, padded, attention_mask=mask, position_ids=position)
    kept = logits[:, 5:] if side == "left" else logits[:, :9]
    torch.testing.assert_close(kept, plain, **EXACT)


@pytest.mark.parametrize("rotation", MODES)
def test_a_later_token_changes_nothing_before_it(rotation: str) -> None:
    model, ids = _adapted(rotation), tiny.tokens(2, 9)
    changed = ids.clone()
    changed[:, 6] = (changed[:, 6] + 7) % 90 + 3
    before, after = _logits(model, ids), _logits(model, changed)
    torch.testing.assert_close(before[:, :6], after[:, :6], **EXACT)
    assert (before[:, 6:] - after[:, 6:]).abs().max() > 1e-3


@pytest.mark.parametrize("rotation", MODES)
def test_cached_decoding_equals_one_pass(rotation: str) -> None:
    model, ids = _adapted(rotation), tiny.tokens(2, 9)
    whole = _logits(model, ids)
    cache, steps = None, []
    with torch.no_grad():
        for position in range(9):
            out = model(
                input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True
            )
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, **EXACT)


@pytest.mark.parametrize("rotation", ["none", "tangent", "radar"])
def test_generate_with_cache_equals_without(rotation: str) -> None:
    model, ids = _adapted(rotation), tiny.tokens(2, 6)
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    cached = model.generate(input_ids=ids, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(input_ids=ids, use_cache=False, **settings))


@pytest.mark.parametrize("rotation", MODES)
def test_the_start_is_the_base_model_bit_for_bit(rotation: str) -> None:
    base, ids = tiny.llama().eval(), tiny.tokens(2, 9)
    with torch.no_grad():
        expected = base(input_ids=ids).logits
    config = RotMoleConfig(rotation=rotation, r=4, target_modules="all-linear")
    model = get_peft_model(base, config).eval()
    assert torch.equal(_logits(model, ids), expected)


@pytest.mark.parametrize("rotation", MODES)
def test_every_parameter_has_a_gradient_even_where_no_token_chose_its_expert(
    rotation: str,
) -> None:
    config = RotMoleConfig(
        rotation=rotation, r=4, num_experts=8, target_modules=["q_proj"], init_weights=False
    )
    model = get_peft_model(tiny.llama(), config)
    ids = tiny.tokens(1, 1)
    model(input_ids=ids).logits.sum().backward()
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert trainable
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trainable)


def test_an_empty_batch_passes_through() -> None:
    model = _adapted("tangent")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer(torch.zeros(0, 5, 32, dtype=torch.float64)).shape == (0, 5, 32)
    assert layer(torch.zeros(32, dtype=torch.float64)).shape == (32,)
