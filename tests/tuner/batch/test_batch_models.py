"""Tokens that are easily mistaken: poolers, sides, towers, padding made inside, packed rows."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from test_batch import (
    LENGTHS,
    NO_DROPOUT,
    SIZES,
    adapted,
    alone,
    assert_same,
    balance,
    bert,
    counted,
    gradients,
    of_routers,
    one_by_one,
    packed,
    padded,
)
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BigBirdConfig,
    BigBirdModel,
    CLIPConfig,
    CLIPModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    LongformerConfig,
    LongformerModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import tiny
from rotmole import balance_states

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip
SIDES = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "dropout": 0.0,
    "vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 2,
}  # fmt: skip


def bart() -> torch.nn.Module:
    return BartForConditionalGeneration(
        BartConfig(**SIDES, max_position_embeddings=64, forced_eos_token_id=None)
    )


def whisper() -> torch.nn.Module:
    config = WhisperConfig(
        **SIDES, num_mel_bins=8, max_source_positions=10, max_target_positions=32,
        begin_suppress_tokens=None, suppress_tokens=None,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config)


def qwen2_vl() -> torch.nn.Module:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = SIZES | {"num_key_value_heads": 2, "rope_parameters": rope}
    vision = {
        "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    marks = {
        "image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92,
        "vision_end_token_id": 93,
    }  # fmt: skip
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=text, vision_config=vision, **marks)
    )


def test_the_one_row_of_a_sequence_weighs_as_its_tokens() -> None:
    """A pooler reads [N, D]; the output's loss goes through it."""
    model = adapted(bert(), ["pooler.dense", "query"])

    def run(batch: dict[str, Any], scale: float) -> None:
        for state in balance_states(model):
            state.loss_scale, state.managed = scale, True
        model(**batch).pooler_output.mul(0).sum().backward()

    whole = gradients(model, lambda: run(padded(), 1.0))
    assert any("pooler" in name and "router" in name for name in whole)

    def split() -> None:
        for batch, length in zip(alone(), LENGTHS, strict=True):
            run(batch, length / sum(LENGTHS))

    assert_same(of_routers(whole), of_routers(gradients(model, split)))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_both_sides_leave_their_padding_out(name: str) -> None:
    """Questions are twice as long as answers, so that a row's share is the same on both sides."""
    make, targets = {
        "t5": (tiny.t5, ["q", "k", "v", "wi"]),
        "bart": (bart, ["q_proj", "k_proj", "v_proj", "fc1"]),
    }[name]
    model = adapted(make(), targets)
    ids, labels, lengths = tiny.tokens(3, 6), tiny.tokens(3, 3, seed=1), [2, 4, 6]
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    batch = {"input_ids": ids * mask, "attention_mask": mask.long()}
    batch["labels"] = labels.masked_fill(~mask[:, ::2], -100)
    whole = gradients(model, lambda: balance(model, batch))

    def split() -> None:
        for row, length in enumerate(lengths):
            one = {"input_ids": ids[row : row + 1, :length]}
            one["labels"] = labels[row : row + 1, : length // 2]
            balance(model, one, length / sum(lengths))

    assert_same(of_routers(whole), of_routers(gradients(model, split)))


def test_the_frames_of_an_encoder_are_no_features_of_a_spectrum() -> None:
    """Whisper's encoder gets [N, mels, 2 frames], its layers read [N, frames, D]."""
    model = adapted(whisper(), ["q_proj", "fc1"])
    sound, ids = torch.randn(3, 8, 20, dtype=torch.float64), tiny.tokens(3, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        whole = gradients(
            model, lambda: balance(model, {"input_features": sound, "decoder_input_ids": ids})
        )

    def split() -> None:
        for row in range(3):
            part = slice(row, row + 1)
            one = {"input_features": sound[part], "decoder_input_ids": ids[part]}
            balance(model, one, 1 / 3)

    assert_same(of_routers(whole), of_routers(gradients(model, split)))


def longformer() -> torch.nn.Module:
    return LongformerModel(LongformerConfig(**SIZES, **NO_DROPOUT, attention_window=[4, 4]))


def bigbird() -> torch.nn.Module:
    sizes = SIZES | {"max_position_embeddings": 512}
    return BigBirdModel(BigBirdConfig(**sizes, **NO_DROPOUT, block_size=4, num_random_blocks=1))


def test_a_mask_of_two_axes_that_is_added_to_scores_is_not_read_the_wrong_way() -> None:
    """Longformer hands its encoder 0 for a token and a large negative number for padding."""
    model = adapted(longformer(), ["intermediate.dense"])
    ids = tiny.tokens(2, 8)
    mask = (torch.arange(8) < torch.tensor([[6], [8]])).long()
    assert counted(model, {"input_ids": ids, "attention_mask": mask}) == 2 * 14


@pytest.mark.parametrize("length", [80, 78])
def test_tokens_that_a_model_appends_are_no_silent_tokens(length: int) -> None:
    """BigBird fills rows up to whole blocks: the fill does not count, or a warning says so."""
    model = adapted(bigbird(), ["query", "intermediate.dense"])
    ids = tiny.tokens(2, length)
    mask = (torch.arange(length) < torch.tensor([[50], [length]])).long()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = counted(model, {"input_ids": ids, "attention_mask": mask})
    said = [str(one.message) for one in caught if "module '" in str(one.message)]
    assert count == 4 * (50 + length) or len(said) == 1


def test_positions_of_four_axes_number_packed_rows_too() -> None:
    """Qwen2-VL takes [4, N, S]; the first are the text's, by which it tells sequences apart."""
    model = adapted(qwen2_vl(), ["q_proj", "down_proj"])
    batch = packed() | {"use_cache": False}
    batch["position_ids"] = batch["position_ids"][None].expand(4, 1, -1)
    ours = of_routers(gradients(model, lambda: balance(model, batch)))
    wanted = of_routers(gradients(model, lambda: balance(model, padded())))
    assert_same(ours, wanted)


def test_a_projection_between_the_sides_does_not_read_the_decoders_tokens() -> None:
    """Both sides are 7 tokens long: the encoder's 15 count, or it is said."""
    torch.manual_seed(0)
    reader = BertConfig(**SIZES, **NO_DROPOUT)
    writer = BertConfig(**(SIZES | {"hidden_size": 48}), **NO_DROPOUT, is_decoder=True,
                        add_cross_attention=True)  # fmt: skip
    config = EncoderDecoderConfig.from_encoder_decoder_configs(reader, writer)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    model = adapted(EncoderDecoderModel(config), ["enc_to_dec_proj"])
    batch = padded() | {"decoder_input_ids": tiny.tokens(3, 7)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        balance(model, batch)
    count = sum(float(state.sums[3]) for state in balance_states(model))
    said = [str(one.message) for one in caught if "enc_to_dec_proj" in str(one.message)]
    assert count == sum(LENGTHS) or len(said) == 1


def test_an_image_does_not_weigh_as_the_tokens_of_a_text() -> None:
    """As many images as texts: the row of an image is no row of the text's tokens."""
    config = CLIPConfig(
        text_config=SIZES, vision_config=SMALL | {"image_size": 16, "patch_size": 8},
        projection_dim=32,
    )  # fmt: skip
    model = adapted(CLIPModel(config), ["visual_projection"])
    pixels = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(**padded(), pixel_values=pixels).image_embeds.mul(0).sum().backward()
    (state,) = balance_states(model)
    said = [str(one.message) for one in caught if "visual_projection" in str(one.message)]
    assert float(state.sums[3]) == 3 or len(said) == 1


# ---- packed rows, and scope micro_batch


def test_a_micro_batch_is_its_tokens_padded_or_packed() -> None:
    scope = {"router_aux_loss_scope": "micro_batch"}
    model = adapted(tiny.llama(), ["q_proj", "down_proj"], **scope)
    short = gradients(model, lambda: balance(model, packed() | {"use_cache": False}))
    assert_same(of_routers(gradients(model, lambda: balance(model, padded()))), of_routers(short))


def test_seq_idx_numbers_the_sequences_of_packed_rows() -> None:
    model = adapted(tiny.llama(), ["q_proj", "down_proj"])
    batch = packed()
    number = torch.arange(3).repeat_interleave(torch.tensor(LENGTHS))[None]
    batch |= {"seq_idx": number.to(torch.int32), "use_cache": False}
    ours = of_routers(gradients(model, lambda: balance(model, batch)))
    assert_same(ours, of_routers(gradients(model, lambda: one_by_one(model))))


def test_packed_rows_may_end_with_fill_that_is_no_sequence() -> None:
    """Cumulated lengths that end before the row does: the rest is padding."""
    model = adapted(tiny.llama(), ["q_proj", "down_proj"])
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    lengths = {f"cu_seq_lens_{side}": ends for side in "qk"}
    lengths |= {f"max_length_{side}": max(LENGTHS) for side in "qk"} | {"use_cache": False}
    batch = packed()
    fill = {"input_ids": torch.zeros(1, 3, dtype=torch.long), "position_ids": torch.arange(3)[None]}
    filled = {name: torch.cat([value, fill[name]], 1) for name, value in batch.items()}
    wanted = of_routers(gradients(model, lambda: balance(model, batch | lengths)))
    assert_same(of_routers(gradients(model, lambda: balance(model, filled | lengths))), wanted)


def test_a_row_of_padding_alone_changes_nothing() -> None:
    model = adapted(tiny.llama(), ["q_proj", "down_proj"])
    batch = {n: torch.cat([value, torch.zeros_like(value[:1])]) for n, value in padded().items()}
    wanted = of_routers(gradients(model, lambda: balance(model, padded())))
    assert_same(of_routers(gradients(model, lambda: balance(model, batch))), wanted)
