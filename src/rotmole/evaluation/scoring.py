"""Log-likelihoods of given tokens under a model.

The scored tokens are those of training, because `rotmole.data.encode` makes both: prompt and answer
are tokenised as one text, with the same boundary. Choices are scored without the end-of-sequence
token, as the language model evaluation harness does; the loss of the correct answer includes it, so
log(perplexity) is the validation loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from rotmole.data.encode import IGNORED, encode_all, tokenize_pairs
from rotmole.data.examples import Example
from rotmole.errors import ModelError
from rotmole.models.logits import accepts_logits_to_keep
from rotmole.processes import over_batches

Tick = Callable[[int], None]
_NO_LIMIT = 1 << 30


@dataclass(frozen=True)
class Scored:
    """The tokens of one text and the positions of those that are scored.

    Attributes:
        tokens: of the whole text.
        positions: indices into tokens, ascending, each at least 1, because nothing predicts the
            first token.
        cut: the prompt lost its beginning.
    """

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    cut: bool = False


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Turn dropout and gradients off for the block; the model's mode is restored after it."""
    training = model.training
    model.eval()
    try:
        # Not inference_mode: tensors that a model caches in it could not be used in training.
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def scored_answers(
    examples: Sequence[Example], tokenizer: Any, *, longest: int = _NO_LIMIT
) -> list[Scored]:
    """Return the tokens of each row; those with labels in training are scored.

    Args:
        longest: the maximum number of tokens of a row; a longer one is refused or cut, as in
            training.

    Raises:
        DataError: a row is too long.
    """
    return [
        Scored(
            tuple(row["input_ids"]),
            tuple(p for p, label in enumerate(row["labels"]) if p and label != IGNORED),
            row["cut"],
        )
        for row in encode_all(examples, tokenizer, max_length=longest)
    ]


def scored_choices(
    examples: Sequence[Example], tokenizer: Any, *, longest: int = _NO_LIMIT
) -> list[Scored]:
    """Return the tokens of each prompt with each of its choices; those of the choice are scored.

    Args:
        longest: the maximum number of tokens of a row, with its end of sequence. If a prompt with
            one of its choices is longer, the prompt loses its first tokens before all of them, so
            that the choices are compared after the same prompt.

    Returns:
        The choices of the first row, then those of the second, and so on.

    Source: agrees with the language model evaluation harness.
    """
    pairs = [(row.prompt, choice) for row in examples for choice in row.choices]
    tokenized = iter(tokenize_pairs(tokenizer, pairs))
    texts = []
    for row in examples:
        choices = [next(tokenized) for _ in row.choices]
        extra = max(len(ids) + 1 - longest for ids, _ in choices)
        for whole, begin in choices:
            # at least one token of the prompt stays, because nothing predicts the first token
            ids, start = without_beginning(tokenizer, whole, begin, min(extra, begin - 1))
            texts.append(Scored(tuple(ids), tuple(range(max(start, 1), len(ids))), extra > 0))
    return texts


def without_beginning(
    tokenizer: Any, ids: list[int], start: int, extra: int
) -> tuple[list[int], int]:
    """Remove the first tokens of a text, but no beginning-of-sequence token; `start` moves along.

    Args:
        start: an index into ids.
        extra: how many tokens to remove; nothing is removed if it is not positive.
    """
    if extra <= 0:
        return ids, start
    first = int(ids[0] == tokenizer.bos_token_id)
    extra = min(extra, len(ids) - first)
    return ids[:first] + ids[first + extra :], start - extra


def log_likelihoods(
    model: Any,
    texts: Sequence[Scored],
    *,
    batch_size: int,
    tick: Tick | None = None,
    spread: bool = False,
) -> list[float]:
    """Return the log-likelihood of each text's scored tokens: sum_t log p(token_t | before t).

    If the tokens of a text are the beginning of another text, one sequence serves both, so the
    choices of one token after a prompt cost one sequence. Batches hold texts of similar length,
    padded on the right under an attention mask; a causal model gives the same figures for every
    batch size.

    Args:
        batch_size: sequences per forward pass.
        tick: called after each batch with the number of texts it finished.
        spread: share the batches among the joined processes; each gets all figures.

    Returns:
        One figure per text, in nats, computed in float32 or float64.

    Raises:
        ModelError: a figure is NaN.
    """
    rows = _shared_rows(texts)
    rows.sort(key=lambda members: -len(texts[members[0]].tokens))
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]

    def done(finished: Sequence[list[list[int]]]) -> None:
        if tick is not None:
            tick(sum(len(members) for batch in finished for members in batch))

    with evaluating(model):
        by_index = over_batches(
            batches, lambda batch: dict(_score_batch(model, texts, batch)), done, spread=spread
        )
    values = [by_index[index] for index in range(len(texts))]
    if any(math.isnan(value) for value in values):
        raise ModelError(
            "the model gives NaN as log-likelihood, because its weights or its adapter contain "
            "NaN or overflow in this dtype; load it in float32, or train it again."
        )
    return values


def _shared_rows(texts: Sequence[Scored]) -> list[list[int]]:
    """Group texts by sequence; every member's input is a prefix of the first member's input."""
    # In descending order an input comes right after all inputs of which it is a prefix.
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
    if not needed:  # no token is scored, as in an empty text
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
    """Return logits [B, P, V] at the given positions of right-padded inputs, float32 or float64."""
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
    if accepts_logits_to_keep(model):  # saves the projection of all other positions
        logits = model(**arguments, logits_to_keep=keep).logits
    else:
        logits = model(**arguments).logits[:, keep]
    return logits if logits.dtype == torch.float64 else logits.float()
