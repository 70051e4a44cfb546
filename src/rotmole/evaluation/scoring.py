"""Log-likelihoods: how probable a model finds given tokens.

The scored tokens are the trained tokens: the functions of `rotmole.data.encode` make both, so
prompt and answer are tokenised as one text and the boundary is found once. Choices are scored
without the end-of-sequence token, as the language model evaluation harness does; the loss of the
right answer includes it, so that log(perplexity) is the validation loss.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from rotmole.data.encode import IGNORED, encode_all, tokenize_pairs
from rotmole.data.examples import Example
from rotmole.errors import ModelError
from rotmole.processes import over_batches

Tick = Callable[[int], None]
_NO_LIMIT = 1 << 30


@dataclass(frozen=True)
class Scored:
    """Tokens of one text, and which of them count.

    Attributes:
        tokens: the whole text.
        positions: indices into tokens, ascending, each at least 1 (the first token has no
            context to be predicted from).
    """

    tokens: tuple[int, ...]
    positions: tuple[int, ...]


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Switch dropout and gradients off for the block; the model's mode comes back after it."""
    training = model.training
    model.eval()
    try:
        # Not inference_mode: what a model caches inside it could not be trained with later.
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def context_window(model: Any) -> int:
    """The longest text, in tokens, that the model has positions for.

    Returns:
        The configured number of positions; without one, no limit.
    """
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else None
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        limit = getattr(config or model.config, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return _NO_LIMIT


def scored_answers(
    examples: Sequence[Example], tokenizer: Any, *, window: int = _NO_LIMIT
) -> list[Scored]:
    """The tokens that training learns from: the right answers with their ends of sequence.

    Args:
        window: longest text in tokens; a longer one loses its beginning, never its answer's end.

    Returns:
        Per row the tokens and the positions that count.
    """
    result = []
    for row in encode_all(examples, tokenizer, max_length=_NO_LIMIT):
        counted = [index for index, label in enumerate(row["labels"]) if label != IGNORED]
        result.append(_last_tokens(row["input_ids"], counted, window))
    return result


def scored_choices(
    pairs: Sequence[tuple[str, str]], tokenizer: Any, *, window: int = _NO_LIMIT
) -> list[Scored]:
    """The tokens of choices after their prompts, without the end of sequence.

    Args:
        window: longest text in tokens; a longer one loses its beginning.

    Returns:
        Per pair the tokens and the positions that count.

    Source: our choice; agrees with the language model evaluation harness.
    """
    return [
        _last_tokens(tokens, range(start, len(tokens)), window)
        for tokens, start in tokenize_pairs(tokenizer, pairs)
    ]


def _last_tokens(tokens: Sequence[int], counted: Sequence[int], window: int) -> Scored:
    first = max(0, len(tokens) - window)
    return Scored(tuple(tokens[first:]), tuple(p - first for p in counted if p > first))


def log_likelihoods(
    model: Any,
    texts: Sequence[Scored],
    *,
    batch_size: int,
    tick: Tick | None = None,
    spread: bool = False,
) -> list[float]:
    """Natural log-likelihood of the counted tokens of each text: sum_t log p(token_t | before t).

    A text whose tokens begin another text is read off that one's logits, so choices of one token
    cost one pass together. Batches hold texts of similar length, padded on the right under an
    attention mask; a causal model gives the same figures for every batch size.

    Args:
        batch_size: sequences per forward pass.
        tick: called with the number of texts finished after each batch.
        spread: share the batches among the joined processes; each gets all figures.

    Returns:
        One figure per text, in nats, at least float32 in precision.

    Raises:
        ModelError: the model gave NaN.
    """
    rows = _shared_rows(texts)
    rows.sort(key=lambda members: -_input_length(texts[members[0]]))
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]

    def done(finished: Sequence[list[list[int]]]) -> None:
        if tick is not None:
            tick(sum(len(members) for batch in finished for members in batch))

    with evaluating(model):
        found = over_batches(
            batches, lambda batch: dict(_score_batch(model, texts, batch)), done, spread=spread
        )
    result = [found[index] for index in range(len(texts))]
    if any(math.isnan(value) for value in result):
        raise ModelError(
            "the model gives NaN as log-likelihood: its weights or its adapter hold NaN, or "
            "overflow in this dtype; load it in float32, or train it again."
        )
    return result


def _input_length(text: Scored) -> int:
    return len(text.tokens) - 1


def _shared_rows(texts: Sequence[Scored]) -> list[list[int]]:
    """Group texts so that every member's input is a prefix of its first member's input."""
    # In descending order all extensions of an input come right before it.
    order = sorted(range(len(texts)), key=lambda index: texts[index].tokens[:-1], reverse=True)
    rows: list[list[int]] = []
    longest: tuple[int, ...] = ()
    for index in order:
        tokens = texts[index].tokens[:-1]
        if rows and longest[: len(tokens)] == tokens:
            rows[-1].append(index)
        else:
            rows.append([index])
            longest = tokens
    return rows


def _score_batch(
    model: Any, texts: Sequence[Scored], rows: Sequence[Sequence[int]]
) -> Iterator[tuple[int, float]]:
    needed = sorted({p - 1 for members in rows for i in members for p in texts[i].positions})
    if not needed:  # nothing counts, as in an empty text
        yield from ((i, 0.0) for members in rows for i in members)
        return
    logits_BPV = _logits(model, [texts[members[0]].tokens[:-1] for members in rows], needed)
    total_BP = torch.logsumexp(logits_BPV, dim=-1)
    place = {position: column for column, position in enumerate(needed)}
    for row, members in enumerate(rows):
        for index in members:
            text = texts[index]
            columns = [place[position - 1] for position in text.positions]
            targets = [text.tokens[position] for position in text.positions]
            values = logits_BPV[row, columns, targets] - total_BP[row, columns]
            yield index, float(values.sum())


def _logits(model: Any, inputs: Sequence[Sequence[int]], positions: Sequence[int]) -> torch.Tensor:
    """Logits [B, P, V] at the given positions of right-padded inputs, at least float32."""
    device = next(model.parameters()).device
    length = max(1, len(inputs[0]), *map(len, inputs))
    ids_BT = torch.zeros(len(inputs), length, dtype=torch.long)
    mask_BT = torch.zeros(len(inputs), length, dtype=torch.long)
    for row, tokens in enumerate(inputs):
        ids_BT[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        mask_BT[row, : len(tokens)] = 1
    keep = torch.tensor(positions, dtype=torch.long, device=device)
    arguments: dict[str, Any] = {"input_ids": ids_BT.to(device), "use_cache": False}
    if not bool(mask_BT.all()):
        arguments["attention_mask"] = mask_BT.to(device)
    if keeps_logits(model):  # the vocabulary projection is only paid where it is read
        logits = model(**arguments, logits_to_keep=keep).logits
    else:
        logits = model(**arguments).logits[:, keep]
    return logits if logits.dtype == torch.float64 else logits.float()


def keeps_logits(model: Any) -> bool:
    """Say whether a model can be told at which positions to compute logits."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters
