"""One Batch for each call of a stack: padding, packed rows, threads, two passes, what is unknown.

The output's loss is multiplied by 0, so that the balance losses alone reach the routers.
"""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mamba2Config,
    Mamba2ForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    ViTConfig,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

import tiny
from rotmole import ModelError, RotMoleConfig, balance_states, update_router_bias
from rotmole.tuner.layer import RotMoleLayer

LENGTHS = [5, 3, 7]
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MOE = {
    "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "experts_implementation": "eager",
}  # fmt: skip


def llama() -> torch.nn.Module:
    return tiny.llama()


def qwen2_moe() -> torch.nn.Module:
    """Its shared expert reads [N S, D]."""
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, **MOE, shared_expert_intermediate_size=16))


def qwen3_moe() -> torch.nn.Module:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **MOE, head_dim=8))


def deepseek() -> torch.nn.Module:
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **SIZES, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=2,
            moe_intermediate_size=16, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8,
            qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, topk_group=1,
            n_shared_experts=1, experts_implementation="eager",
        )
    )  # fmt: skip


def opt() -> torch.nn.Module:
    sizes = {k: v for k, v in SIZES.items() if k != "intermediate_size"}
    return OPTForCausalLM(OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0))


def falcon() -> torch.nn.Module:
    sizes = {k: v for k, v in SIZES.items() if k != "intermediate_size"}
    return FalconForCausalLM(FalconConfig(**sizes, hidden_dropout=0.0, attention_dropout=0.0))


def bert() -> torch.nn.Module:
    """Its pooler reads [N, D]."""
    return BertModel(BertConfig(**SIZES, **NO_DROPOUT))


def albert() -> torch.nn.Module:
    return AlbertModel(AlbertConfig(**SIZES, **NO_DROPOUT, embedding_size=16))


def modernbert() -> torch.nn.Module:
    more = {"global_attn_every_n_layers": 2, "local_attention": 16}
    ends = {"cls_token_id": 1, "sep_token_id": 2}
    return ModernBertForMaskedLM(ModernBertConfig(**SIZES, **more, **ends))


TEXT: dict[str, tuple[Callable[[], torch.nn.Module], list[str]]] = {
    "llama": (llama, ["q_proj", "v_proj", "down_proj"]),
    "qwen2-moe": (qwen2_moe, ["q_proj", "gate_proj", "up_proj", "down_proj"]),
    "qwen3-moe": (qwen3_moe, ["q_proj", "o_proj"]),
    "deepseek-v3": (deepseek, ["q_a_proj", "o_proj", "gate_proj", "down_proj"]),
    "opt": (opt, ["q_proj", "fc1", "fc2"]),
    "falcon": (falcon, ["query_key_value", "dense_h_to_4h"]),
    "bert": (bert, ["query", "dense"]),
    "albert": (albert, ["query", "ffn", "pooler"]),
    "modernbert": (modernbert, ["Wqkv", "Wi"]),
}


def adapted(base: torch.nn.Module, targets: list[str], **settings: Any) -> PeftModel:
    fields = {
        "r": 4, "num_experts": 4, "target_modules": targets, "init_weights": False,
        "router_aux_loss_coef": 0.7, "router_z_loss_coef": 0.3,
    }  # fmt: skip
    torch.manual_seed(0)
    return get_peft_model(base, RotMoleConfig(**(fields | settings))).double().train()


def padded(left: bool = False) -> dict[str, torch.Tensor]:
    ids = tiny.tokens(len(LENGTHS), max(LENGTHS))
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = 1
    batch = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    if not left:
        return batch
    for name, value in batch.items():
        rolled = [row.roll(max(LENGTHS) - n) for row, n in zip(value, LENGTHS, strict=True)]
        batch[name] = torch.stack(rolled)
    return batch | {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def alone() -> list[dict[str, torch.Tensor]]:
    ids = tiny.tokens(len(LENGTHS), max(LENGTHS))
    return [{"input_ids": ids[row : row + 1, :n]} for row, n in enumerate(LENGTHS)]


def balance(model: PeftModel, batch: dict[str, Any], scale: float = 1.0) -> None:
    """Send the gradient of the balance losses alone to the routers."""
    for state in balance_states(model):
        state.loss_scale, state.managed = scale, True
    output = model(**batch)
    (output.logits if "logits" in output else output[0]).mul(0).sum().backward()


def gradients(model: PeftModel, run: Callable[[], Any]) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    run()
    named = model.named_parameters()
    return {n: p.grad.clone() for n, p in named if p.requires_grad and p.grad is not None}


def of_routers(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in found.items() if ".router_" in name}


def assert_same(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], rtol: float = 1e-9
) -> None:
    assert ours.keys() == theirs.keys()
    assert theirs
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=rtol, atol=rtol * 1e-4, msg=name)


def one_by_one(model: PeftModel) -> None:
    for batch, length in zip(alone(), LENGTHS, strict=True):
        balance(model, batch, length / sum(LENGTHS))


def in_four_threads(work: Callable[[int], None]) -> None:
    """Run work(0) to work(3), each in a thread of its own."""
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("name", TEXT)
def test_padding_never_counts_and_a_batch_may_be_split(name: str) -> None:
    make, targets = TEXT[name]
    model = adapted(make(), targets)
    whole = gradients(model, lambda: balance(model, padded()))
    assert_same(of_routers(whole), of_routers(gradients(model, lambda: one_by_one(model))))


@pytest.mark.parametrize("name", ["llama", "qwen2-moe", "qwen3-moe", "deepseek-v3"])
def test_padding_on_the_left_never_counts(name: str) -> None:
    make, targets = TEXT[name]
    model = adapted(make(), targets)
    whole = gradients(model, lambda: balance(model, padded(left=True)))
    assert_same(of_routers(whole), of_routers(gradients(model, lambda: one_by_one(model))))


@pytest.mark.parametrize("name", ["llama", "qwen2-moe", "bert"])
def test_loads_count_tokens_without_padding(name: str) -> None:
    make, targets = TEXT[name]
    off = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
    model = adapted(make(), targets, router_bias_rate=0.1, **off)
    output = model(**padded())
    names = [n for n in ("logits", "last_hidden_state", "pooler_output") if n in output]
    sum(output[name].sum() for name in names).backward()
    layers = [m for m in model.modules() if isinstance(m, RotMoleLayer)]
    for layer in layers:
        rows = len(LENGTHS) if "pooler" in layer.rotmole_path else sum(LENGTHS)
        assert layer.experts("default").loads.loads_E.sum() == 2 * rows, layer.rotmole_path
    assert update_router_bias(model) > 0


def test_labels_are_the_padding_of_a_decoder_without_a_mask() -> None:
    model = adapted(tiny.t5(), ["q", "k", "v", "wi"])
    batch = padded()
    labels = tiny.tokens(3, 6).masked_fill(torch.arange(6) >= torch.tensor([[6], [2], [4]]), -100)
    given = batch | {"labels": labels}
    implicit = gradients(model, lambda: balance(model, given))
    mask = (labels != -100).long()
    explicit = gradients(model, lambda: balance(model, given | {"decoder_attention_mask": mask}))
    assert_same(implicit, explicit)


def test_the_encoder_does_not_take_the_decoders_padding_for_its_own() -> None:
    model = adapted(tiny.t5(), ["SelfAttention.q"])
    labels = tiny.tokens(2, 6).clone()
    labels[0, 3:] = -100
    balance(model, {"input_ids": tiny.tokens(2, 6), "labels": labels})  # as long, without a mask
    assert [int(state.sums[3]) for state in balance_states(model)] == [2 * 12, 2 * 9]


def packed() -> dict[str, torch.Tensor]:
    rows = [batch["input_ids"][0] for batch in alone()]
    positions = [torch.arange(len(row)) for row in rows]
    return {"input_ids": torch.cat(rows)[None], "position_ids": torch.cat(positions)[None]}


@pytest.mark.parametrize("router", ["linear", "mlp"])  # the gradient by hand, and by autograd
@pytest.mark.parametrize("told_by", ["position_ids", "cu_seq_lens"])
def test_packed_rows_are_the_sequences_that_they_hold(router: str, told_by: str) -> None:
    model = adapted(tiny.llama(), ["q_proj", "down_proj"], router=router)
    batch: dict[str, Any] = packed() | {"use_cache": False}
    if told_by == "cu_seq_lens":
        ends = torch.tensor([0, *LENGTHS]).cumsum(0)
        batch |= {f"cu_seq_lens_{side}": ends for side in "qk"}
        batch |= {f"max_length_{side}": max(LENGTHS) for side in "qk"}
    found = gradients(model, lambda: balance(model, batch))
    assert_same(of_routers(found), of_routers(gradients(model, lambda: balance(model, padded()))))


OTHER = {
    "input_ids": tiny.tokens(2, 4) + 3,
    "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]),
}
FULL = {"input_ids": padded()["input_ids"], "attention_mask": torch.ones(3, 7, dtype=torch.long)}
ROUTERS = {
    "balance": {},
    "hash": {"router": "hash", "router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0},
}


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("settings", ROUTERS)
@pytest.mark.parametrize("second", ["another shape", "another mask"])
def test_two_forward_passes_before_their_backward_passes(
    settings: str, checkpointing: bool | None, second: str
) -> None:
    """The second run of a checkpointed block sees the batch of its own forward pass."""
    model = adapted(tiny.llama(), ["q_proj", "down_proj"], **ROUTERS[settings])
    if checkpointing is not None:
        tiny.enable_checkpointing(model, checkpointing)
        model.enable_input_require_grads()
    for state in balance_states(model):
        state.managed = True
    batches = [padded(), OTHER if second == "another shape" else FULL]

    def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(**batch).logits.square().mean()

    apart = [gradients(model, lambda batch=batch: loss(batch).backward()) for batch in batches]
    wanted = {name: apart[0][name] + apart[1][name] for name in apart[0]}
    assert_same(gradients(model, lambda: (loss(batches[0]) + loss(batches[1])).backward()), wanted)

    def in_their_order() -> None:
        first, other = loss(batches[0]), loss(batches[1])
        first.backward()
        other.backward()

    assert_same(gradients(model, in_their_order), wanted)


def test_a_second_run_whose_batch_is_unknown_is_refused() -> None:
    """A checkpoint around a layer alone: nothing says which forward pass it belongs to."""
    model = adapted(tiny.llama(), ["q_proj"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 3, 32, dtype=torch.float64, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    with pytest.raises(ModelError, match="computed again in a backward pass"):
        y.sum().backward()


KINDS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "default": ({}, ["q_proj", "k_proj", "v_proj"]),
    "hash": ({"router": "hash"}, ["q_proj", "v_proj"]),
    "block": (
        {"router_scope": "block", "rotation": "none"}, ["gate_proj", "up_proj", "down_proj"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("generates", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_threads_do_not_see_one_anothers_batches(kind: str, generates: bool) -> None:
    settings, targets = KINDS[kind]
    off = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
    model = adapted(tiny.llama(), targets, **off, **settings).eval()

    def call(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            if not generates:
                return model(input_ids=ids).logits
            mask = torch.ones_like(ids)
            return model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False
            )

    inputs = [tiny.tokens(2, 5 + number) + number for number in range(4)]
    wanted = [call(ids) for ids in inputs]
    wrong: list[Any] = []

    def work(number: int) -> None:
        for _ in range(3 if generates else 15):
            found = call(inputs[number])
            if not torch.equal(found, wanted[number]):
                wrong.append(number)

    in_four_threads(work)
    assert not wrong


def test_a_call_with_embeddings_does_not_see_the_ids_of_the_call_before() -> None:
    model = adapted(tiny.llama(), ["q_proj"], **ROUTERS["hash"])
    model(**padded())
    embedded = torch.randn(3, 7, 32, dtype=torch.float64)
    for part in (model, model.base_model.model.model):
        with pytest.raises(ModelError, match="without input_ids"):
            part(inputs_embeds=embedded)


def test_nothing_of_a_batch_outlives_its_call_and_its_graph() -> None:
    model = adapted(tiny.llama(), ["q_proj", "v_proj"])
    batch = {"input_ids": tiny.tokens(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    watched = [weakref.ref(value) for value in batch.values()]
    with torch.no_grad():
        model(**batch)
    model(**batch).logits.sum().backward()

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("broken")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.base_model.model.model.layers[1].mlp, "forward", fail)
        with pytest.raises(ValueError, match="broken"):
            model(**batch)
    del batch
    gc.collect()
    assert [ref() for ref in watched] == [None, None]


def test_a_deleted_adapter_is_freed_at_once() -> None:
    off = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
    model = adapted(tiny.llama(), ["q_proj", "v_proj"], **off)
    model.add_adapter("b", model.peft_config["default"])
    model.base_model.set_adapter(["default", "b"])
    model.eval()
    ids = tiny.tokens(1, 4)
    mask = torch.ones_like(ids)
    model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    watched = [weakref.ref(p) for n, p in model.named_parameters() if ".b." in n]
    assert watched
    model.delete_adapter("b")
    gc.collect()
    assert not [ref for ref in watched if ref() is not None]


def counted(model: PeftModel, batch: dict[str, Any]) -> float:
    """Tokens that the balance losses counted, over all layers."""
    balance(model, batch)
    return sum(float(state.sums[3]) for state in balance_states(model))


def test_a_vision_model_has_no_padding_and_one_sequence_an_image() -> None:
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        image_size=16, patch_size=8, hidden_dropout_prob=0.0,
    )  # fmt: skip
    vit = ViTModel(config)
    query = "q_proj" if any(n.endswith("q_proj") for n, _ in vit.named_modules()) else "query"
    model = adapted(vit, [query, "fc1", "pooler.dense"])
    pixels = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    whole = gradients(model, lambda: balance(model, {"pixel_values": pixels}))

    def split() -> None:
        for image in pixels.split(1):
            balance(model, {"pixel_values": image}, 1 / 3)

    assert_same(of_routers(whole), of_routers(gradients(model, split)))


def test_sound_is_padded_by_frames_not_by_samples() -> None:
    off = ("hidden", "attention", "feat_proj", "activation")
    config = Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, layerdrop=0.0,
        mask_time_prob=0.0, feat_extract_norm="layer", do_stable_layer_norm=True,
        **{f"{name}_dropout": 0.0 for name in off},
    )  # fmt: skip
    model = adapted(Wav2Vec2Model(config), ["q_proj", "intermediate_dense"])
    sound, mask = torch.randn(2, 200, dtype=torch.float64), torch.ones(2, 200, dtype=torch.long)
    mask[0, 120:] = 0
    frames = model.get_base_model()._get_feat_extract_output_lengths(mask.sum(1)).sum()
    assert counted(model, {"input_values": sound * mask, "attention_mask": mask}) == 4 * frames


def test_a_state_space_model_counts_no_padding() -> None:
    config = Mamba2Config(
        hidden_size=32, num_heads=4, head_dim=16, expand=2, state_size=8, n_groups=1,
        num_hidden_layers=2, vocab_size=96, chunk_size=8,
    )  # fmt: skip
    model = adapted(Mamba2ForCausalLM(config), ["in_proj"])
    batch = padded()
    assert counted(model, batch) == 2 * sum(LENGTHS)


def test_text_and_pictures_of_one_model_are_told_apart() -> None:
    """The projector reads neither the text's tokens nor the tower's: that is said once."""
    vision = CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        image_size=16, patch_size=8, projection_dim=32,
    )  # fmt: skip
    text = LlamaConfig(**(SIZES | {"vocab_size": 100, "num_key_value_heads": 2}))
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=99, vision_feature_layer=-1
    )
    ids = torch.tensor([[5, 99, 99, 99, 99, 7, 8, 9], [5, 99, 99, 99, 99, 7, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    batch["pixel_values"] = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    model = adapted(LlavaForConditionalGeneration(config), ["q_proj", "v_proj"])
    assert counted(model, batch) == 4 * (14 + 2 * 5)  # layers x (text and patches)
    model = adapted(LlavaForConditionalGeneration(config), ["linear_1"])
    with pytest.warns(UserWarning, match=r"linear_1' got an input of shape .*cannot be matched"):
        balance(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        balance(model, batch)


class Picker(torch.nn.Module):
    """A layer that reads some rows of a batch, in an order of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(96, 32)
        self.inner = torch.nn.Linear(32, 32)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor]:
        rows = self.embed(input_ids).flatten(0, 1)
        return (self.inner(rows[torch.tensor([3, 1, 8, 2])]),)


def test_rows_that_cannot_be_told_are_said_once_and_only_if_they_matter() -> None:
    batch = padded()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        quiet = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
        adapted(Picker(), ["inner"], **quiet)(**batch)
    model = adapted(Picker(), ["inner"])
    with pytest.warns(UserWarning, match="'inner' got an input of shape"):
        model(**batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(**batch)
    with pytest.raises(ModelError, match="cannot tell its sequences and padding"):
        adapted(Picker(), ["inner"], selection="expert_choice", **quiet)(**batch)
