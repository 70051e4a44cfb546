"""A tiny Llama, a tiny byte-pair tokenizer, and rows for both."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rotmole.data.examples import Example

SENTENCES = [
    "Question: which animal lives in the sea?\nAnswer: a fish",
    "Question: which animal can fly?\nAnswer: a bird or a bat",
    "the film was good and the music was bad",
    "Straße über Köln, 1,5 Kilometer; 12 января 2024",
    "a score of" + " 0 1 2 3 4 5" * 9,  # so that every score word is one token
]


def make_tokenizer(*, pad: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE of some 300 tokens; without `pad` it pads with its end of sequence."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|end|>", "<|turn|>"] + (["<|pad|>"] if pad else [])
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>" if pad else "<|end|>",
        additional_special_tokens=["<|turn|>"],
    )


def make_model(tokenizer: PreTrainedTokenizerFast, *, seed: int = 0) -> LlamaForCausalLM:
    """Two layers, 32 wide, float64, with large enough weights that answers differ."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).double().eval()


def choice_rows(count: int = 6) -> list[Example]:
    """Multiple choice with choices of several tokens and two groups."""
    choices = (" a fish", " a bird or a bat", " the sea", " Köln")
    return [
        Example(
            task="animals",
            group="even" if index % 2 == 0 else "odd",
            id=str(index),
            prompt=f"Question: which animal {'can fly' * (index % 3)}{index}?\nAnswer:",
            completion=choices[index % 4],
            choices=choices,
            answer=index % 4,
        )
        for index in range(count)
    ]


def text_rows(count: int = 5) -> list[Example]:
    """Free answers."""
    return [
        Example("film", "", str(index), f"the film {index} was" + " bad" * index, " good")
        for index in range(count)
    ]


def score_rows(count: int = 6) -> list[Example]:
    """Regression on 0..5."""
    words = tuple(f" {word}" for word in range(6))
    return [
        Example(
            "similar", "", str(i), f"the film and the music {i}:", words[i % 6], "completion",
            words, i % 6, float(i % 6),
        )
        for i in range(count)
    ]  # fmt: skip
