"""A tiny Llama, a tiny byte-pair tokenizer, and rows for both."""

from __future__ import annotations

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import tiny_folders
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
    specials = ["<|turn|>"] + (["<|pad|>"] if pad else [])
    return tiny_folders.tokenizer(
        SENTENCES * 3, 320, specials, pad_token="<|pad|>" if pad else tiny_folders.END,
        additional_special_tokens=["<|turn|>"],
    )  # fmt: skip


def make_model(tokenizer: PreTrainedTokenizerFast, *, seed: int = 0) -> LlamaForCausalLM:
    """Two layers, 32 wide, float64, with large enough weights that answers differ."""
    model = tiny_folders.llama(
        tokenizer, seed, intermediate_size=48, max_position_embeddings=256, initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return model.double().eval()


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
