"""Routers and selections in a model: start, training, saving, token ids, padding, invariances."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

import tiny
from rotmole import ConfigError, ModelError, RotMoleConfig, parameter_groups, update_router_bias
from rotmole.ops import ROUTERS, SELECTIONS
from rotmole.tuner.layer import RotMoleLayer

LEARNED = [name for name, row in ROUTERS.items() if row.weight == "learned"]
CAUSAL = [name for name, row in SELECTIONS.items() if not row.sequences]
ONE_OF_EACH: list[dict[str, Any]] = [
    *({"router": router} for router in ROUTERS),
    *({"selection": selection} for selection in CAUSAL[1:]),
    {"scoring": "sigmoid", "router_bias_rate": 0.1},
    {"router": "magnitude", "router_bias_rate": 0.1},
]
EVERY_PAIR = [
    *({"router": r, "selection": s} for r in LEARNED for s in CAUSAL if s != "top_p"),
    # where one expert alone has the mass its normalised weight is 1 and the router learns nothing
    *({"router": r, "selection": "top_p", "norm_topk_prob": False} for r in LEARNED),
    {"selection": "top_p", "top_p": 0.7},
    *ONE_OF_EACH[-2:],
    {"router": "hash"},
    {"scoring": "sigmoid", "selection": "dense"},
]
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def _named(settings: dict[str, Any]) -> str:
    return "-".join(str(value) for value in settings.values())


def _config(settings: dict[str, Any], **more: Any) -> RotMoleConfig:
    plain = {"rotation": "none", "r": 2, "router_dim": 4, "target_modules": ["q_proj", "down_proj"]}
    if not ROUTERS[settings.get("router", "linear")].hidden:
        del plain["router_dim"]
    return RotMoleConfig(**(plain | settings | more))


def _far(base: torch.nn.Module, settings: dict[str, Any], **more: Any) -> PeftModel:
    """Return a float64 model whose adapter is far from its start, biases included."""
    model = get_peft_model(base, _config(settings, init_weights=False, **more)).double().eval()
    for name, buffer in model.named_buffers():
        if name.endswith("router_bias"):
            buffer.copy_(torch.linspace(-1, 1, len(buffer)))
    return model


def _logits(model: torch.nn.Module, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


@pytest.mark.parametrize("settings", EVERY_PAIR, ids=_named)
def test_starts_at_the_base_then_everything_moves_and_the_loss_falls(
    settings: dict[str, Any],
) -> None:
    base, ids = tiny.llama(num_hidden_layers=1), tiny.tokens(4, 6)
    expected = _logits(base.eval(), ids)
    model = get_peft_model(base, _config(settings))
    assert torch.equal(_logits(model.eval(), ids), expected)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in trainable.items()}
    optimizer = torch.optim.AdamW(parameter_groups(model.train(), lr=0.02))
    losses = []
    for _ in range(20):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable.values())
        optimizer.step()
        update_router_bias(model)
        losses.append(float(loss.detach()))
    assert not [n for n, p in trainable.items() if torch.equal(p, before[n])]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("settings", ONE_OF_EACH, ids=_named)
def test_saved_and_loaded_bit_equal(settings: dict[str, Any], tmp_path: Path) -> None:
    base, ids = tiny.llama(), tiny.tokens(2, 7)
    model = _far(copy.deepcopy(base), settings).float()
    expected = _logits(model, ids)
    model.save_pretrained(tmp_path)
    for options in ({"low_cpu_mem_usage": True}, {}):
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, **options).eval()
        assert torch.equal(_logits(again, ids), expected)
    with again.disable_adapter():
        assert not torch.equal(_logits(again, ids), expected)


@pytest.mark.parametrize("settings", ONE_OF_EACH, ids=_named)
def test_batch_padding_later_tokens_and_cache_change_nothing(settings: dict[str, Any]) -> None:
    model, ids = _far(tiny.llama(), settings), tiny.tokens(2, 7)
    whole = _logits(model, ids)
    torch.testing.assert_close(_logits(model, ids[1:]), whole[1:], **EXACT)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(10) >= 3).long().expand(2, 10)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    found = _logits(model, padded, attention_mask=mask, position_ids=position)[:, 3:]
    torch.testing.assert_close(found, whole, **EXACT)
    changed = ids.clone()
    changed[:, 5] = (changed[:, 5] + 7) % 90 + 3
    torch.testing.assert_close(_logits(model, changed)[:, :5], whole[:, :5], **EXACT)
    prompt = {"input_ids": padded[:, :8], "attention_mask": mask[:, :8], "do_sample": False}
    cached, plain = (
        model.generate(**prompt, max_new_tokens=6, use_cache=use_cache, pad_token_id=0)
        for use_cache in (True, False)
    )
    assert torch.equal(cached, plain)


def _layer(model: PeftModel) -> RotMoleLayer:
    return model.base_model.model.model.layers[0].self_attn.q_proj


def test_every_parameter_of_the_scaling_gate_has_its_role_and_one_expert_has_none() -> None:
    for settings in ONE_OF_EACH:
        experts = _layer(get_peft_model(tiny.llama(), _config(settings))).experts("default")
        names = {n for n, _ in experts.named_parameters() if n.startswith("router_")}
        assert {n for n, _ in experts.named_parameters() if experts.role(n) == "scaling_gate"} == (
            names
        )
        reads_input = settings.get("router", "linear") in LEARNED
        assert bool(names) == reads_input
    with pytest.warns(UserWarning, match="no effect"):
        config = _config({"router": "attention"}, num_experts=1)
    experts = _layer(get_peft_model(tiny.llama(), config)).experts("default")
    assert {n for n, _ in experts.named_parameters()} == {"expert_A", "expert_B"}


def test_jitter_acts_in_training_and_is_off_in_evaluation() -> None:
    model, ids = _far(tiny.llama(), {"router_jitter": 0.5}), tiny.tokens(2, 7)
    plain = _far(tiny.llama(), {})
    plain.load_state_dict(model.state_dict())
    assert torch.equal(_logits(model, ids), _logits(plain, ids))
    model.train()
    assert not torch.equal(_logits(model, ids), _logits(model, ids))


@pytest.mark.parametrize("router", LEARNED)
def test_the_balance_loss_acts_on_every_parameter_of_every_learned_router(router: str) -> None:
    ids, gradients = tiny.tokens(2, 7), []
    for coefficient in (0.0, 5.0):
        torch.manual_seed(0)
        settings = {"router": router, "router_aux_loss_coef": coefficient}
        model = get_peft_model(tiny.llama(), _config(settings, init_weights=False))
        model(input_ids=ids, labels=ids).loss.backward()
        experts = _layer(model).experts("default")
        gradients.append({name: getattr(experts, name).grad for name in experts.router_names})
    assert not [n for n, g in gradients[0].items() if torch.allclose(g, gradients[1][n])]


@pytest.mark.parametrize("router", ["linear", "magnitude"])
def test_a_large_bias_decides_who_is_selected(router: str) -> None:
    model = _far(tiny.llama(), {"router": router, "router_bias_rate": 0.1})
    experts = _layer(model).experts("default")
    experts.router_bias.copy_(torch.tensor([0.0, 1e3, 0.0, 1e3]))
    x_TD = torch.randn(5, 32, dtype=torch.float64)
    routing = tiny.routing(experts, x_TD)
    assert torch.equal(routing.selected_TE, torch.tensor([False, True, False, True]).expand(5, 4))


def test_two_adapters_with_different_routers() -> None:
    model, ids = _far(tiny.llama(), {"router": "hash"}), tiny.tokens(2, 7)
    first = _logits(model, ids)
    model.add_adapter("other", _config({"selection": "threshold"}, init_weights=False))
    assert torch.equal(_logits(model, ids), first)
    model.set_adapter("other")
    assert not torch.equal(_logits(model.double(), ids), first)
    assert model.unload()(input_ids=ids).logits.shape == first.shape


# Router "hash": how token ids reach it.


def test_hash_looks_at_the_token_id_and_nothing_else() -> None:
    model = _far(tiny.llama(num_hidden_layers=1), {"router": "hash"})
    ids = torch.tensor([[5, 9, 5, 31]])
    chosen = []
    experts = _layer(model).experts("default")
    experts.register_forward_hook(lambda *call: chosen.append(call[-1][1][1].selected_TE))
    _logits(model, ids)
    model.base_model.model(ids)  # by position
    assert torch.equal(*chosen)
    assert torch.equal(chosen[0][0], chosen[0][2])
    assert (chosen[0].sum(1) == 2).all()
    assert not torch.equal(chosen[0][1], chosen[0][3])


def test_hash_where_the_body_is_called_by_itself() -> None:
    model = _far(tiny.llama(), {"router": "hash"})
    first, second = tiny.tokens(2, 7, 0), tiny.tokens(2, 7, 1)
    body = model.get_base_model().model
    with torch.no_grad():
        wanted = body(input_ids=second).last_hidden_state
        _logits(model, first)
        assert torch.equal(body(input_ids=second).last_hidden_state, wanted)
        assert torch.equal(body(second).last_hidden_state, wanted)


def test_hash_without_token_ids_is_refused_in_one_sentence() -> None:
    model, ids = _far(tiny.llama(), {"router": "hash"}), tiny.tokens(2, 7)
    embedded = model.get_input_embeddings()(ids)
    with pytest.raises(ModelError, match="called without input_ids"):
        model(inputs_embeds=embedded)
    _logits(model, ids)
    with pytest.raises(ModelError, match="called without input_ids"):
        model(inputs_embeds=embedded)
    pooled = _far(tiny.bert(), {"router": "hash"}, target_modules=["pooler.dense"])
    with pytest.raises(ModelError, match=r"shape \(2, 7\) and a layer input of shape \(2, 32\)"):
        _logits(pooled, ids)


@pytest.mark.parametrize("reentrant", [True, False])
def test_hash_under_gradient_checkpointing(reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = _far(tiny.llama(), {"router": "hash"}).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(input_ids=tiny.tokens(2, 7), labels=tiny.tokens(2, 7)).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


def test_hash_in_trainer(tmp_path: Path) -> None:
    model = get_peft_model(tiny.llama(), _config({"router": "hash"}))
    rows = tiny.tokens(8, 6).tolist()
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, logging_steps=1,
        report_to="none", save_strategy="no", learning_rate=0.05, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


# Selection "expert_choice": encoders, sequence by sequence.

CHOICE = {"selection": "expert_choice"}
BERT = {"target_modules": ["query", "value", "dense"]}


def _padded(rows: int, length: int, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = tiny.tokens(rows, length), torch.ones(rows, length, dtype=torch.long)
    zeros = torch.zeros(rows, pad, dtype=torch.long)
    return torch.cat([ids, zeros], dim=1), torch.cat([mask, zeros], dim=1)


@pytest.mark.parametrize("router", LEARNED)
def test_expert_choice_depends_on_neither_batch_nor_padding(router: str) -> None:
    model = _far(tiny.bert(), CHOICE | {"router": router}, **BERT)
    ids, mask = _padded(3, 7, 4)
    together = _logits(model, ids, attention_mask=mask)
    torch.testing.assert_close(_logits(model, ids[:, :7]), together, **EXACT)
    alone = _logits(model, ids[1:2, :7], attention_mask=mask[1:2, :7])
    torch.testing.assert_close(alone, together[1:2], **EXACT)


def test_expert_choice_in_an_encoder_learns() -> None:
    base = tiny.bert()
    (ids, mask), labels = _padded(4, 6, 2), torch.tensor([0, 1, 2, 0])
    expected = _logits(base.eval(), ids, attention_mask=mask)
    model = get_peft_model(base, _config(CHOICE, **BERT))
    assert torch.equal(_logits(model.eval(), ids, attention_mask=mask), expected)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in trainable.items()}
    optimizer, losses = torch.optim.AdamW(parameter_groups(model.train(), lr=0.02)), []
    for _ in range(20):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert not [n for n, p in trainable.items() if torch.equal(p, before[n])]
    assert losses[-1] < losses[0] - 0.1


def test_expert_choice_is_refused_where_tokens_are_written_one_by_one() -> None:
    with pytest.raises(ModelError, match=r"LlamaForCausalLM, which writes token by token"):
        get_peft_model(tiny.llama(), _config(CHOICE))


@pytest.mark.parametrize("settings", [CHOICE, {"router": "hash"}], ids=_named)
def test_in_an_encoder_decoder_only_the_encoder_can_look_beside(settings: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="works in the encoder"):
        get_peft_model(tiny.t5(), _config(settings, target_modules=["q"]))
    model = _far(tiny.t5(), settings, target_modules="encoder.*[.]q")
    ids, mask = _padded(2, 6, 3)
    target = {"decoder_input_ids": tiny.tokens(2, 4)}
    padded = _logits(model, ids, attention_mask=mask, **target)
    # transformers before 5.16 computes T5's softmax in float32
    alone = _logits(model, ids[:, :6], **target)
    torch.testing.assert_close(alone, padded, rtol=0, atol=1e-6)


def test_a_second_adapter_is_checked_as_the_first() -> None:
    model = _far(tiny.llama(), {})
    with pytest.raises(ModelError, match="writes token by token"):
        model.add_adapter("b", RotMoleConfig(target_modules=["q_proj"], **CHOICE))
    odd = torch.nn.Sequential(torch.nn.Linear(4, 5))
    model = get_peft_model(odd, RotMoleConfig(r=2, target_modules=["0"]))
    with pytest.raises(ConfigError, match="needs an even width"):
        model.add_adapter("b", RotMoleConfig(r=2, target_modules=["0"], rotation="radar"))


def test_expert_choice_refuses_inputs_whose_padding_it_cannot_tell() -> None:
    model = _far(tiny.bert(), CHOICE, **BERT)
    _logits(model, tiny.tokens(2, 7), attention_mask=torch.ones(2, 7))
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    with pytest.raises(ModelError, match="cannot tell its sequences and padding"):
        layer(torch.zeros(14, 32, dtype=torch.float64))
