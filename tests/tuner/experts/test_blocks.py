"""Block routing: whole feed-forward blocks as experts, found by structure, equal to slow loops."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Phi3Config, Phi3ForCausalLM, T5Config, T5ForConditionalGeneration

import tiny
from rotmole import ConfigError, ModelError, RotMoleConfig, balance_states
from rotmole.ops import select
from rotmole.ops.reference import block as reference_gate
from rotmole.ops.reference.method import rotated
from rotmole.tuner.experts.blocks import find_block
from rotmole.tuner.layer import Linear

MLP = ["gate_proj", "up_proj", "down_proj"]


def _config(**extra: object) -> RotMoleConfig:
    return RotMoleConfig(
        **({"r": 3, "num_experts": 4, "top_k": 2, "rotation": "none", "router_scope": "block",
            "target_modules": [*MLP, "q_proj"], "init_weights": False} | extra)
    )  # fmt: skip


def _adapted(base: nn.Module | None = None, **extra: object) -> PeftModel:
    torch.manual_seed(4)
    return get_peft_model(tiny.llama() if base is None else base, _config(**extra)).double()


def _slow(mlp: nn.Module, x_TD: torch.Tensor, config: RotMoleConfig) -> torch.Tensor:
    """The block by loops: every selected expert a feed-forward block of its own."""
    layers = [getattr(mlp, name) for name in MLP]

    def addition(layer: Linear, e: int, v_TD: torch.Tensor) -> torch.Tensor:
        own = layer.experts("default")
        gates = {name: getattr(own, name)[e : e + 1] for name in own.gate_names}
        A = own.expert_A[e : e + 1] if len(own.expert_A) > 1 else own.expert_A
        B = own.expert_B[e : e + 1]
        _, turned = rotated(v_TD, v_TD, A, B, gates, rotation=own.spec.rotation)
        return own.spec.scale * turned[:, 0] @ B[0]

    router = layers[0].experts("default").router_weight
    routing = select(x_TD @ router.T, top_k=config.top_k, selection=config.selection)
    return reference_gate.block(
        x_TD, routing.weight_TE, routing.selected_TE,
        [layer.base_layer for layer in layers[:2]], layers[2].base_layer,
        [[partial(addition, layer, e) for e in range(4)] for layer in layers],
        lambda gate, up: mlp.act_fn(gate) * up,
    )  # fmt: skip


@pytest.mark.parametrize(
    "extra",
    [{}, {"selection": "dense"}, {"rotation": "tangent"}, {"rotation": "givens", "r": 4},
     {"top_k": 3, "share_A": True}],
    ids=str,
)  # fmt: skip
def test_it_equals_loops_over_experts_outputs_and_every_gradient(extra: dict[str, object]) -> None:
    model = _adapted(**extra)
    mlp = model.base_model.model.model.layers[0].mlp
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x.requires_grad_()
    names, parameters = zip(
        *[(n, p) for n, p in mlp.named_parameters() if p.requires_grad], strict=True
    )
    probe = torch.randn(6, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sides = []
    for y in (mlp(x).flatten(0, 1), _slow(mlp, x.flatten(0, 1), _config(**extra))):
        sides.append([y, *torch.autograd.grad((y * probe).sum(), [x, *parameters])])
    for name, ours, theirs in zip(["y", "x", *names], *sides, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11, msg=name)
    assert sum(n.endswith("router_weight") for n in names) == 1


def test_it_starts_at_the_base_model_bit_for_bit_and_attention_has_plain_lora() -> None:
    ids = tiny.tokens(2, 7)
    for dtype in (torch.float32, torch.bfloat16):
        base = tiny.llama().to(dtype)
        with torch.no_grad():
            wanted = base(ids).logits
            model = get_peft_model(base, _config(init_weights=True, rotation="tangent"))
            assert torch.equal(model(ids).logits, wanted)
    attention = model.base_model.model.model.layers[0].self_attn.q_proj.experts("default")
    assert attention.spec.num_experts == 1
    assert not attention.router_names
    mixed = _adapted(num_experts_pattern={"q_proj": 3})
    assert mixed.base_model.model.model.layers[0].self_attn.q_proj.experts("default").has_router


def test_batch_padding_cache_and_later_tokens_change_nothing() -> None:
    model, ids = _adapted().eval(), tiny.tokens(3, 8)
    with torch.no_grad():
        whole = model(ids).logits
        alone = torch.cat([model(row[None]).logits for row in ids])
        torch.testing.assert_close(alone, whole, rtol=0, atol=1e-12)
        padded = torch.cat([torch.zeros(3, 2, dtype=torch.long), ids], 1)
        mask = torch.ones_like(padded)
        mask[:, :2] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        left = model(padded, attention_mask=mask, position_ids=positions).logits[:, 2:]
        torch.testing.assert_close(left, whole, rtol=0, atol=1e-12)
        torch.testing.assert_close(model(ids[:, :5]).logits, whole[:, :5], rtol=0, atol=1e-12)
        first = model(ids[:, :5], use_cache=True)
        rest = model(ids[:, 5:], past_key_values=first.past_key_values).logits
        torch.testing.assert_close(rest, whole[:, 5:], rtol=0, atol=1e-12)


def test_checkpointing_of_both_kinds_gives_the_same_gradients_and_counts_a_block_once() -> None:
    ids = tiny.tokens(2, 6)
    found = []
    for reentrant in (None, False, True):
        model = _adapted(router_aux_loss_coef=0.5, router_bias_rate=0.1)
        if reentrant is not None:
            model.enable_input_require_grads()
            tiny.enable_checkpointing(model, reentrant)
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        assert max(state.count for state in balance_states(model)) == 2  # a router a block
        routers = [m for m in model.modules() if getattr(m, "has_router", False)]
        assert sum(m.loss_weights.balance for m in routers) == pytest.approx(0.5)
        counts = [m.loads.loads_E for m in routers]
        found.append(
            {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
            | {str(i): load for i, load in enumerate(counts)}
        )
        assert all(load.sum() == 2 * ids.numel() for load in counts)
    for other in found[1:]:
        assert all(torch.equal(found[0][n], other[n]) for n in found[0])


def test_several_adapters_take_turns_and_can_be_switched_off(tmp_path: Path) -> None:
    base, ids = tiny.llama().double(), tiny.tokens(2, 5)
    with torch.no_grad():
        plain = base(ids).logits
        model = _adapted(base).eval()
        first = model(ids).logits
        model.add_adapter("other", _config(num_experts=2))
        model.add_adapter("single", _config(router_scope="layer"))
        model = model.double()
        model.set_adapter("other")
        second = model(ids).logits
        assert (second - first).abs().max() > 1e-3
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, plain)
        model.set_adapter("default")
        assert torch.equal(model(ids).logits, first)
        model.base_model.set_adapter(["default", "single"])
        with pytest.raises(ModelError, match="activate it alone"):
            model(ids)
        model.set_adapter("default")
        model.save_pretrained(tmp_path, selected_adapters=["default"])
        again = PeftModel.from_pretrained(tiny.llama().double(), tmp_path)
        assert torch.equal(again.double()(ids).logits, first)
        model.set_adapter("other")
        model.delete_adapter("default")
        assert torch.equal(model(ids).logits, second)


def test_it_compiles_whole() -> None:
    model, ids = _adapted().eval(), tiny.tokens(2, 5)
    mlp = model.base_model.model.model.layers[0].mlp
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    with torch.no_grad():
        wanted = mlp(x)
        found = torch.compile(mlp, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, wanted)
    torch._dynamo.reset()
    model(ids)


def _phi3() -> Phi3ForCausalLM:
    torch.manual_seed(0)
    return Phi3ForCausalLM(
        Phi3Config(hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=96,
                   num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    )  # fmt: skip


def _gated_t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(vocab_size=96, d_model=32, d_ff=48, d_kv=8, num_layers=1, num_heads=4,
                 feed_forward_proj="gated-gelu", dropout_rate=0.0, decoder_start_token_id=0)
    )  # fmt: skip


FOUND = {
    "llama": (tiny.llama, 2, (["gate_proj", "up_proj"], "down_proj")),
    "gpt2": (tiny.gpt2, 2, (["c_fc"], "c_proj")),
    "phi3": (_phi3, 1, (["gate_up_proj"], "down_proj")),
    "t5": (tiny.t5, 4, (["wi"], "wo")),
    "gated t5": (_gated_t5, 2, (["wi_0", "wi_1"], "wo")),
    "bert": (tiny.bert, 0, None),  # its two layers are in two modules, with a norm between
}


@pytest.mark.parametrize("name", list(FOUND))
def test_blocks_are_found_by_structure(name: str) -> None:
    make, count, wanted = FOUND[name]
    found = [block for module in make().modules() if (block := find_block(module)) is not None]
    assert found == [wanted] * count


@pytest.mark.parametrize("name", ["gpt2", "phi3", "gated t5"])
def test_other_kinds_of_blocks_train(name: str) -> None:
    """With one common expert weight for all experts, a block is plain LoRA on its layers."""
    make, _, (inner, outer) = FOUND[name]
    base, ids = make(), tiny.tokens(2, 6)
    torch.manual_seed(3)
    config = _config(target_modules=[*inner, outer], selection="dense")
    model = get_peft_model(base, config).double().eval()
    lora = get_peft_model(
        make(), RotMoleConfig(r=3, num_experts=1, rotation="none", init_weights=False,
                              target_modules=[*inner, outer])
    ).double().eval()  # fmt: skip
    pairs = [(m, lora.get_submodule(n)) for n, m in model.named_modules()
             if hasattr(m, "rotmole_experts") and m.rotmole_experts]  # fmt: skip
    with torch.no_grad():
        for ours, theirs in pairs:
            for factor in ("expert_A", "expert_B"):
                one = getattr(theirs.experts("default"), factor)
                own = getattr(ours.experts("default"), factor)
                own.copy_(one.expand(len(own), -1, -1))
    inputs = {"input_ids": ids, "labels": ids}
    found, wanted = model(**inputs), lora(**inputs)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=0, atol=1e-11)
    found.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_what_cannot_be_block_routed_says_why() -> None:
    with pytest.raises(ConfigError, match="sum to one"):
        _config(norm_topk_prob=False)
    with pytest.raises(ConfigError, match="of one layer rotate each other"):
        _config(rotation="radar")
    with pytest.raises(ConfigError, match=r"down_proj of .*mlp.* has no experts"):
        _adapted(target_modules=["gate_proj", "up_proj"])
    with pytest.raises(ConfigError, match="no feed-forward block"):
        _adapted(target_modules=["q_proj"])
    with pytest.raises(ConfigError, match=r"\[3, 4\] experts"):
        _adapted(num_experts_pattern={"up_proj": 3})
    mlp = _adapted().base_model.model.model.layers[0].mlp
    mlp(torch.randn(1, 2, 32, dtype=torch.float64))  # which leaves nothing behind
    with pytest.raises(ModelError, match="before the block's first"):
        mlp.up_proj(torch.randn(1, 2, 32, dtype=torch.float64))
    mlp.gate_proj(torch.randn(1, 2, 32, dtype=torch.float64))
    with pytest.raises(ModelError, match="wiring asks for"):
        mlp.up_proj(torch.randn(1, 3, 32, dtype=torch.float64))
