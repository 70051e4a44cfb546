"""Data: sources, formats and mixtures of named tasks, and the offline locale tasks."""

from rotmole.data.chat import chat_prompt, turn_end
from rotmole.data.encode import (
    Collator,
    encode,
    encode_all,
    learnt_messages,
    tokenize_pair,
    tokenize_pairs,
)
from rotmole.data.examples import Example
from rotmole.data.load import data_problems, load_examples, load_splits
from rotmole.data.mixture import data_fingerprint, fingerprint, mix, repeated
from rotmole.data.packing import PackedCollator, PackedRows, model_inputs, pack, row_sums

__all__ = [
    "Collator",
    "PackedCollator",
    "PackedRows",
    "chat_prompt",
    "Example",
    "data_fingerprint",
    "data_problems",
    "encode",
    "encode_all",
    "fingerprint",
    "learnt_messages",
    "load_examples",
    "load_splits",
    "mix",
    "model_inputs",
    "pack",
    "repeated",
    "row_sums",
    "tokenize_pair",
    "tokenize_pairs",
    "turn_end",
]
