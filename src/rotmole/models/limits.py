"""What a model can read: how many tokens in one text, and which tokens it embeds."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from rotmole.errors import DataError, ModelError


@dataclass(frozen=True)
class Window:
    """How many tokens of one text a model can read.

    Attributes:
        positions: the number of tokens.
        fixed: a table of positions ends there, so a longer text cannot be computed. Otherwise,
            as with rotary positions, it can, but the model was not trained on such texts.
    """

    positions: int
    fixed: bool


def window_of(model: Any) -> Window | None:
    """Return how many tokens a model can read, None if nothing says so (ALiBi, Mamba).

    A table of positions decides if there is one. Otherwise it is the configuration's
    max_position_embeddings, times the factor by which rotary positions are stretched.

    Args:
        model: a causal language model, or a PeftModel around one; it may be on the meta device.
    """
    config = model.config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    values = [getattr(config, name, None) for name in names]
    stated = next((value for value in values if isinstance(value, int) and value > 0), None)
    tables = list(_tables(model, stated))
    if tables:
        return Window(min(tables), fixed=True)
    if stated is None or getattr(config, "alibi", False):  # ALiBi knows distances only
        return None
    return Window(max([stated, *_stretched(config, stated)]), fixed=False)


def _tables(model: nn.Module, stated: int | None) -> Iterator[int]:
    """Yield the lengths of learned or sinusoidal tables of positions."""
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("pos" in name or name == "wpe"):
            # OPT and BART keep `offset` rows unused, RoBERTa those up to its padding index
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            yield module.num_embeddings - int(getattr(module, "offset", unused))
        for name in ("embed_positions", "pos_encoding"):  # of GPT-J and CodeGen, and of CTRL
            table = vars(module).get(name, module._buffers.get(name))
            if table is not None and len(table) == stated:
                yield len(table)
    if model.config.get_text_config().model_type == "mpt" and stated:
        yield stated  # its ALiBi is a table of that size


def _stretched(config: Any, stated: int) -> Iterator[int]:
    """Yield the lengths that scaled rotary positions reach, of each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(rope, dict):
        return
    for part in (rope, *rope.values()):
        factor = part.get("factor") if isinstance(part, dict) else None
        if isinstance(factor, int | float) and factor > 0:
            original = part.get("original_max_position_embeddings") or stated
            yield int(factor * original)


def check_readable(
    model: Any,
    tokenizer: Any,
    rows: Iterable[tuple[str, Sequence[int]]],
    *,
    new_tokens: int = 0,
    fix: str = "set training.max_length: {most}, with long_rows: cut to drop the start of prompts",
) -> None:
    """Compare texts with what the model can read.

    If a text is longer than the model's positions and the model could compute it, one warning says
    so; nothing is shortened.

    Args:
        model: for its configuration, its embeddings and its tables of positions.
        tokenizer: names a token in the message.
        rows: where each text comes from, such as "train.jsonl: row 7", and its token ids.
        new_tokens: tokens that will be generated after each text.
        fix: what to do about a text that is too long; {most} is the number of tokens that fit.

    Raises:
        DataError: a text is longer than the model's table of positions, or has a token that the
            model does not embed; names the first row, both numbers, and how many others there are.
    """
    window, embedded = window_of(model), model.get_input_embeddings().weight.shape[0]
    too_long: list[tuple[str, int]] = []
    unknown: list[tuple[str, int]] = []
    for where, tokens in rows:
        if window is not None and len(tokens) + new_tokens > window.positions:
            too_long.append((where, len(tokens)))
        if tokens and max(tokens) >= embedded:
            unknown.append((where, max(tokens)))
    if unknown:
        where, token = unknown[0]
        raise DataError(
            f"{where}: token {token} ({tokenizer.convert_ids_to_tokens(token)!r}) is none of the "
            f"{embedded} tokens that the model embeds (0 to {embedded - 1}); use the tokenizer of "
            f"this model, or a model whose embeddings were resized for it{_others(unknown)}"
        )
    if not too_long or window is None:
        return
    where, length = max(too_long, key=lambda row: row[1])
    count = f"{length} tokens and {new_tokens} new ones" if new_tokens else f"{length} tokens"
    if window.fixed:
        most = max(window.positions - new_tokens, 0)
        raise DataError(
            f"{where}: {count} are more than the {window.positions} positions of the model; "
            f"{fix.format(most=most)}{_others(too_long)}"
        )
    warnings.warn(
        f"{where}: {count} are more than the {window.positions} positions that the model was made "
        f"for (max_position_embeddings); it can read them, but not well{_others(too_long)}",
        stacklevel=2,
    )


def _others(rows: Sequence[Any]) -> str:
    return f" ({len(rows)} rows are affected)." if len(rows) > 1 else "."


def check_vocabulary(model: Any, tokenizer: Any, name: str) -> None:
    """Refuse a tokenizer that has tokens which the model does not embed.

    Special tokens without a function are left out, because loaders add some that the model's
    files do not have, such as <|endoftext|>; `check_readable` sees whether a text has them.

    Args:
        name: of the model, for the message.

    Raises:
        ModelError: says both numbers.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    used = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    unused = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special} - used
    largest = max(set(tokenizer.get_vocab().values()) - unused, default=-1)
    if largest >= rows:
        raise ModelError(
            f"model.name {name!r}: the tokenizer has token {largest}, but the model embeds only "
            f"{rows} tokens (0 to {rows - 1}); use the tokenizer of this model."
        )
