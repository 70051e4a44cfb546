"""What ends an answer: tokens and texts, known to whatever generates, and kept with an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from rotmole.errors import AdapterError


def end_tokens(model: Any, tokenizer: Any, ends: Sequence[str] = ()) -> list[int]:
    """Return the sorted ids of all tokens that end a text: model's, tokenizer's and of `ends`.

    Args:
        ends: texts that a chat template writes after an answer in place of the end of sequence;
            their special tokens are used, or the only token if there is one.
    """
    model_ends = getattr(model.generation_config, "eos_token_id", None)
    stops = {*(model_ends if isinstance(model_ends, list) else [model_ends])}
    stops.add(tokenizer.eos_token_id)
    for end in ends:
        stops |= _tokens_of(tokenizer, end)
    return sorted(int(token) for token in stops if token is not None)


def end_strings(model: Any, tokenizer: Any, ends: Sequence[str] = ()) -> list[str]:
    """Return the texts that end a text and are no single token: the model's, and those of `ends`.

    A chat template may end a turn by ordinary words, such as "###".
    """
    kept = getattr(model.generation_config, "stop_strings", None) or []
    kept = [kept] if isinstance(kept, str) else kept
    own = [end.strip() for end in ends if end.strip() and not _tokens_of(tokenizer, end)]
    return sorted({*kept, *own})


def _tokens_of(tokenizer: Any, end: str) -> set[int]:
    tokens = tokenizer(end, add_special_tokens=False)["input_ids"]
    return set(tokens) & set(tokenizer.all_special_ids) or set(tokens if len(tokens) == 1 else [])


def endings_of(model: Any, tokenizer: Any, ends: Sequence[str] = ()) -> GenerationConfig:
    """Return what ends an answer as a generation configuration, to be saved beside an adapter.

    Its other settings are transformers' defaults; take eos_token_id and stop_strings from it.
    """
    return GenerationConfig(
        eos_token_id=end_tokens(model, tokenizer, ends),
        stop_strings=end_strings(model, tokenizer, ends) or None,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )


def take_endings(model: Any, folder: Path) -> None:
    """Let a model end its answers as its adapter was trained to, if that is known.

    Args:
        model: with the adapter; eos_token_id and stop_strings of its generation configuration are
            set.
        folder: the adapter's.

    Raises:
        AdapterError: generation_config.json cannot be read.
    """
    if not (folder / GENERATION_CONFIG_NAME).is_file():
        return
    try:
        kept = GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise AdapterError(
            f"{folder / GENERATION_CONFIG_NAME} cannot be read ({' '.join(str(error).split())}); "
            "restore it or remove it."
        ) from error
    model.generation_config.eos_token_id = kept.eos_token_id
    model.generation_config.stop_strings = kept.stop_strings
