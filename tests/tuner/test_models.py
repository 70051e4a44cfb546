"""Kinds of models: forward, training with padding and balance loss, generate, save and load."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

import tiny
from rotmole import ModelError, RotMoleConfig, balance_states

ROWS, LENGTH, KEPT = 4, 9, 6  # sequence 0 is padded from KEPT on
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": tiny.VOCABULARY, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ENCODER = SIZES | {"num_labels": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _made(model: type[PreTrainedModel], config: object) -> Callable[[], PreTrainedModel]:
    def make() -> PreTrainedModel:
        torch.manual_seed(0)
        return model(copy.deepcopy(config))

    return make


@dataclass(frozen=True)
class Kind:
    """A kind of model: how it is made, what is adapted (None: PEFT's default), what it is for."""

    make: Callable[[], PreTrainedModel]
    targets: tuple[str, ...] | None = None
    task: str = "CAUSAL_LM"


KINDS = {
    "llama": Kind(tiny.llama),
    "qwen2": Kind(_made(Qwen2ForCausalLM, Qwen2Config(**SIZES))),
    "qwen3": Kind(_made(Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=8))),
    "gemma3": Kind(
        _made(Gemma3ForCausalLM, Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=4)),
        ("q_proj", "v_proj"),
    ),
    "gpt2": Kind(tiny.gpt2),
    "mixtral": Kind(
        _made(MixtralForCausalLM, MixtralConfig(**SIZES, num_local_experts=3)),
        ("q_proj", "v_proj"),
    ),
    "bert": Kind(tiny.bert, task="SEQ_CLS"),
    "roberta": Kind(
        _made(RobertaForSequenceClassification, RobertaConfig(**ENCODER)), task="SEQ_CLS"
    ),
    "t5": Kind(tiny.t5, task="SEQ_2_SEQ_LM"),
    "vit": Kind(
        _made(ViTForImageClassification, ViTConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            image_size=16, patch_size=8, num_labels=3, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0)),
        task="IMAGE",
    ),
}  # fmt: skip
GENERATING = [name for name, kind in KINDS.items() if kind.task.endswith("_LM")]
PADDED = [name for name, kind in KINDS.items() if kind.task != "IMAGE"]


def _adapted(name: str, **settings: object) -> PeftModel:
    kind = KINDS[name]
    targets = list(kind.targets) if kind.targets else None
    if kind.task == "IMAGE":  # PEFT has no default for these: name the layers
        targets = [
            n.rpartition(".")[-1] for n, m in kind.make().named_modules()
            if isinstance(m, torch.nn.Linear) and "classifier" not in n
        ]  # fmt: skip
    torch.manual_seed(1)
    config = RotMoleConfig(
        task_type=None if kind.task == "IMAGE" else kind.task,
        target_modules=targets,
        **({"r": 4, "router_aux_loss_coef": 0.5} | settings),
    )
    return get_peft_model(kind.make(), config)


def _batch(name: str, filler: int = 0) -> dict[str, torch.Tensor]:
    """A batch with labels; `filler` stands where sequence 0 is padded."""
    task = KINDS[name].task
    classes = torch.arange(ROWS) % 3
    if task == "IMAGE":
        torch.manual_seed(2)
        return {"pixel_values": torch.randn(ROWS, 3, 16, 16), "labels": classes}
    ids = tiny.tokens(ROWS, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, KEPT:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    ids = ids.masked_fill(mask == 0, filler)
    batch = {"input_ids": ids, "attention_mask": mask}
    if task == "SEQ_CLS":
        return batch | {"labels": classes}
    if task == "SEQ_2_SEQ_LM":
        decoder = {"decoder_input_ids": ids, "decoder_attention_mask": mask}
        return batch | decoder | {"labels": labels}
    return batch | {"labels": labels}


def _logits(model: torch.nn.Module, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**_batch(name)).logits


@pytest.mark.parametrize("name", KINDS)
def test_training_starts_at_the_base_model_moves_every_weight_and_reloads(
    name: str, tmp_path: Path
) -> None:
    model, base = _adapted(name), KINDS[name].make()
    assert torch.equal(_logits(model, name), _logits(base, name))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses, balance = [], []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model.train()(**_batch(name)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        balance.append([state.pop()["router_aux_loss"] for state in balance_states(model)])
    assert losses[-1] < 0.97 * losses[0]
    assert all(0.5 < value < 3 for row in balance for value in row)
    still = [n for n, p in model.named_parameters() if n in before and torch.equal(p, before[n])]
    assert not still

    expected = _logits(model, name)
    assert not torch.equal(expected, _logits(base, name))
    model.save_pretrained(tmp_path)
    torch.manual_seed(9)
    assert torch.equal(_logits(PeftModel.from_pretrained(base, tmp_path), name), expected)


@pytest.mark.parametrize("name", PADDED)
def test_what_stands_in_the_padding_changes_no_gradient(name: str) -> None:
    """Neither the loss nor the balance loss of any stack counts a padded token."""
    found = []
    for filler in (0, 7):
        model = _adapted(name, init_weights=False)
        model.train()(**_batch(name, filler)).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for parameter, gradient in found[0].items():
        torch.testing.assert_close(found[1][parameter], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", GENERATING)
def test_generate_with_cache_equals_without(name: str) -> None:
    model = _adapted(name, init_weights=False).eval()
    ids = tiny.tokens(2, 6)
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    cached = model.generate(input_ids=ids, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(input_ids=ids, use_cache=False, **settings))
    with model.disable_adapter():
        plain = _logits(model, name)
    assert not torch.equal(_logits(model, name), plain)


def test_fused_experts_of_the_base_are_refused() -> None:
    """Mixtral keeps its experts as 3-d parameters of one module, not as linear layers."""
    base = KINDS["mixtral"].make()
    assert not isinstance(base, LlamaForCausalLM)
    with pytest.raises(ModelError, match=r"experts' is a MixtralExperts, which cannot be adapted"):
        get_peft_model(base, RotMoleConfig(target_modules=["experts"]))
    with pytest.raises(TypeError, match="target_parameters"):
        RotMoleConfig(target_parameters=["mlp.experts.gate_up_proj"])
