"""Tiny real tokenizers, trained here."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

TEXTS = [
    "Review: a good film with a heart.\nSentiment: positive",
    "Review: a bad film, dull and long.\nSentiment: negative",
    "Question: where is the bank? Answer: library yes no 5. März 2024",
    "Words in German: 1480 -> eintausendvierhundertachtzig",
]
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level(*, bos: bool = False, trim_offsets: bool = True) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<end_of_turn>", "<s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    core.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>" if bos else "<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Like SmolLM2's: byte-level, no beginning, pad == eos, ChatML."""
    made = byte_level()
    made.chat_template = CHAT
    return made


@pytest.fixture(scope="session")
def bos_tokenizer() -> PreTrainedTokenizerFast:
    """Like Llama's: adds a beginning by itself."""
    made = byte_level(bos=True)
    made.chat_template = "{{ '<s>' }}" + CHAT
    return made


@pytest.fixture(scope="session")
def slow_tokenizer() -> ByT5Tokenizer:
    """A tokenizer without offsets that adds its own EOS."""
    return ByT5Tokenizer()
