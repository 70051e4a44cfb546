"""The laws of a batch, architecture by architecture, each stated without a look at the code.

A batch of padded rows gives the routers the gradient of its rows alone, each weighed by its tokens;
packed rows are the sequences that they hold; threads share nothing; no call knows of another.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftModel
from test_batch import (
    NO_DROPOUT,
    ROUTERS,
    SIZES,
    TEXT,
    adapted,
    assert_same,
    balance,
    gradients,
    in_four_threads,
    of_routers,
    one_by_one,
    packed,
    padded,
)

import tiny
from rotmole import ModelError, RotMoleConfig

Make = Callable[[], torch.nn.Module]
GROUPED = SIZES | {"num_key_value_heads": 2}
EAGER = {"experts_implementation": "eager"}
STATES = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}  # fmt: skip


def sized(name: str, **fields: Any) -> Make:
    """Return what makes the class NAME of transformers from its configuration."""
    for end in ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "Model"):
        if name.endswith(end):
            config = getattr(hf, name.removesuffix(end) + "Config")
            break
    return lambda: getattr(hf, name)(config(**fields))


LAYERS = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
N = {"n_layer": 2, "n_head": 4}
CAUSAL: dict[str, tuple[Make, list[str]]] = {
    **{name: TEXT[name] for name in ("llama", "qwen2-moe", "qwen3-moe", "deepseek-v3")},
    **{name: TEXT[name] for name in ("opt", "falcon")},
    "gpt2": (tiny.gpt2, ["c_attn", "mlp.c_proj"]),
    "gpt-neox": (
        sized("GPTNeoXForCausalLM", **SIZES), ["query_key_value", "dense", "dense_4h_to_h"],
    ),
    "gpt-j": (
        sized(
            "GPTJForCausalLM", **LAYERS, **N, n_embd=32, rotary_dim=4, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0,
        ),
        ["q_proj", "fc_out"],
    ),
    "phi": (sized("PhiForCausalLM", **GROUPED), ["q_proj", "dense", "fc2"]),
    "gemma2": (
        sized("Gemma2ForCausalLM", **GROUPED, head_dim=8, sliding_window=8),
        ["q_proj", "down_proj"],
    ),
    "mistral": (
        sized("MistralForCausalLM", **GROUPED, head_dim=8, sliding_window=3),
        ["v_proj", "up_proj"],
    ),
    "mixtral": (
        sized("MixtralForCausalLM", **GROUPED, num_local_experts=4, **EAGER), ["q_proj", "o_proj"],
    ),
    "olmo2": (sized("Olmo2ForCausalLM", **GROUPED), ["k_proj", "down_proj"]),
    "bloom": (
        sized("BloomForCausalLM", **LAYERS, **N, hidden_size=32),
        ["query_key_value", "dense_4h_to_h"],
    ),
    "mpt": (
        sized("MptForCausalLM", vocab_size=96, d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
        ["Wqkv", "up_proj", "down_proj"],
    ),
    "mamba2": (
        sized(
            "Mamba2ForCausalLM", hidden_size=32, num_heads=4, head_dim=16, expand=2, state_size=8,
            n_groups=1, num_hidden_layers=2, vocab_size=96, chunk_size=8,
        ),
        ["in_proj"],
    ),
    "falcon-h1": (
        sized("FalconH1ForCausalLM", **GROUPED, **STATES, mamba_d_ssm=64, head_dim=8),
        ["in_proj", "q_proj", "down_proj"],
    ),
    "bamba": (
        sized("BambaForCausalLM", **GROUPED, **STATES, attn_layer_indices=[1]),
        ["in_proj", "q_proj", "down_proj"],
    ),
}  # fmt: skip
READING: dict[str, tuple[Make, list[str]]] = {
    **{name: TEXT[name] for name in ("bert", "albert", "modernbert")},
    "roberta": (sized("RobertaModel", **SIZES, **NO_DROPOUT), ["query", "dense"]),
    "deberta-v2": (
        sized("DebertaV2Model", **SIZES, **NO_DROPOUT, relative_attention=True),
        ["query_proj", "dense"],
    ),
    "electra": (sized("ElectraModel", **SIZES, **NO_DROPOUT), ["value", "dense"]),
    "distilbert": (
        sized(
            "DistilBertModel", vocab_size=96, dim=32, hidden_dim=48, n_layers=2, n_heads=4,
            dropout=0.0, attention_dropout=0.0,
        ),
        ["q_lin", "lin2"],
    ),
}  # fmt: skip
ALL = CAUSAL | READING
FLOAT32 = {"mpt", "mamba2", "falcon-h1", "bamba"}
"""Models that compute a part in float32 whatever their dtype: MPT its softmax, others a scan."""
every = pytest.mark.parametrize("name", ALL)


def model_of(name: str, **settings: Any) -> PeftModel:
    make, targets = ALL[name]
    torch.manual_seed(0)
    return adapted(make(), settings.pop("target_modules", targets), **settings)


def by_ids(name: str) -> PeftModel:
    """A model whose router reads token ids, which the inputs of poolers have not."""
    return model_of(name, **ROUTERS["hash"], target_modules=ALL[name][1][:1])


@pytest.mark.parametrize("name", [name for name in ALL if name not in TEXT])
def test_a_batch_is_its_rows_weighed_by_their_tokens(name: str) -> None:
    model = model_of(name)
    whole = of_routers(gradients(model, lambda: balance(model, padded())))
    apart = of_routers(gradients(model, lambda: one_by_one(model)))
    assert_same(whole, apart, rtol=1e-5 if name in FLOAT32 else 1e-9)


@pytest.mark.parametrize("name", CAUSAL)
def test_packed_rows_are_sequences(name: str) -> None:
    """The first layer's input is the same whether or not the attention knows of packing."""
    model = model_of(name, target_modules=ALL[name][1][:1], layers_to_transform=[0])
    given = packed() | {"use_cache": False}
    ours = of_routers(gradients(model, lambda: balance(model, given)))
    wanted = of_routers(gradients(model, lambda: balance(model, padded())))
    assert_same(ours, wanted)


@every
def test_threads_share_nothing(name: str) -> None:
    model = by_ids(name).eval()
    inputs = [{"input_ids": tiny.tokens(2, 4 + number) + number} for number in range(4)]
    with torch.no_grad():
        wanted = [model(**given)[0] for given in inputs]
    wrong: list[int] = []

    def work(number: int) -> None:
        with torch.no_grad():
            for _ in range(3):
                if not torch.equal(model(**inputs[number])[0], wanted[number]):
                    wrong.append(number)

    in_four_threads(work)
    assert not wrong


@every
def test_a_call_with_embeddings_knows_no_ids_of_another(name: str) -> None:
    model = by_ids(name)
    model(**padded())
    embedded = model.get_input_embeddings()(padded()["input_ids"])
    with pytest.raises(ModelError, match="without input_ids"):
        model(inputs_embeds=embedded)


@every
def test_a_deleted_adapter_is_freed(name: str) -> None:
    model = model_of(name)
    model.add_adapter("b", model.peft_config["default"])
    model.set_adapter("b")
    balance(model, padded())
    model.set_adapter("default")
    watched = [weakref.ref(p) for n, p in model.named_parameters() if ".b." in n]
    model.delete_adapter("b")
    model.zero_grad()
    gc.collect()
    assert watched
    assert not [ref for ref in watched if ref() is not None]


# ---- sound, and pictures beside text


def test_sound_is_its_rows_weighed_by_their_frames() -> None:
    """The mask is of samples; what counts is the frames that are left of them."""
    off = ("hidden", "attention", "feat_proj", "activation")
    config = hf.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, layerdrop=0.0,
        mask_time_prob=0.0, feat_extract_norm="layer", do_stable_layer_norm=True,
        **{f"{name}_dropout": 0.0 for name in off},
    )  # fmt: skip
    torch.manual_seed(0)
    model = adapted(hf.Wav2Vec2Model(config), ["q_proj", "intermediate_dense"])
    sound, mask = torch.randn(2, 200, dtype=torch.float64), torch.ones(2, 200, dtype=torch.long)
    mask[0, 120:] = 0
    given = {"input_values": sound * mask, "attention_mask": mask}
    whole = gradients(model, lambda: balance(model, given))
    frames = model.get_base_model()._get_feat_extract_output_lengths(mask.sum(1)).tolist()

    def apart() -> None:
        for row, length in enumerate(frames):
            one = {name: value[row : row + 1] for name, value in given.items()}
            balance(model, one, length / sum(frames))

    assert_same(of_routers(whole), of_routers(gradients(model, apart)))


def test_text_beside_pictures_is_weighed_by_its_tokens() -> None:
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = hf.CLIPVisionConfig(
        **tower, intermediate_size=48, image_size=16, patch_size=8, projection_dim=32
    )
    text = hf.LlamaConfig(**(GROUPED | {"vocab_size": 100}))
    config = hf.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=99, vision_feature_layer=-1
    )
    torch.manual_seed(0)
    targets = r".*language_model.*(q_proj|down_proj)"
    model = adapted(hf.LlavaForConditionalGeneration(config), targets)
    ids = torch.tensor([[5, 99, 99, 99, 99, 7, 8, 9], [5, 99, 99, 99, 99, 7, 0, 0]])
    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    given = {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels}
    whole = gradients(model, lambda: balance(model, given))

    def apart() -> None:
        for row, length in enumerate((8, 6)):
            one = {"input_ids": ids[row : row + 1, :length], "pixel_values": pixels[row : row + 1]}
            balance(model, one, length / 14)

    assert_same(of_routers(whole), of_routers(gradients(model, apart)))


# ---- layers that read tokens before rows

SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "dropout": 0.0,
    "attention_dropout": 0.0,
}  # fmt: skip
TURNED: dict[str, tuple[Make, list[str]]] = {
    "xlnet": (
        sized("XLNetModel", vocab_size=96, d_model=32, n_layer=1, n_head=4, d_inner=48),
        ["layer_1", "layer_2"],
    ),
    "fsmt": (
        sized(
            "FSMTModel", **SEQ2SEQ, langs=["en", "de"], src_vocab_size=96, tgt_vocab_size=96,
            max_position_embeddings=32, bos_token_id=0, pad_token_id=1, eos_token_id=2,
            decoder_start_token_id=2,
        ),
        ["encoder.layers.0.fc1"],
    ),
    "longformer": (
        sized("LongformerModel", **SIZES, **NO_DROPOUT, attention_window=4), ["query"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("rows", [4, 3])
@pytest.mark.parametrize("name", TURNED)
def test_tokens_before_rows_are_said(name: str, rows: int) -> None:
    """With as many rows as tokens the two axes look alike; nothing is guessed."""
    make, targets = TURNED[name]
    torch.manual_seed(0)
    model = adapted(make(), targets).float()
    lengths = torch.tensor([4, 2, 3, 1])[:rows, None]
    mask = (torch.arange(4) < lengths).long()
    given = {"input_ids": tiny.tokens(rows, 4) + 3, "attention_mask": mask}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        balance(model, given)
    said = [str(one.message) for one in caught if "cannot be matched" in str(one.message)]
    assert len(said) == 1


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_an_adapter_that_transformers_deletes_is_freed_while_a_chat_keeps_its_cache() -> None:
    torch.manual_seed(0)
    base = tiny.llama()
    for name in ("a", "b"):
        base.add_adapter(RotMoleConfig(r=4, num_experts=4, target_modules=["q_proj"]), name)
    base.set_adapter("b")
    base.eval()
    ids = tiny.tokens(1, 4)
    told = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    answer = base.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **told)
    base.set_adapter("a")
    watched = [weakref.ref(p) for n, p in base.named_parameters() if ".b." in n]
    base.delete_adapter("b")
    gc.collect()
    assert answer.past_key_values is not None
    assert watched
    assert not [ref for ref in watched if ref() is not None]
