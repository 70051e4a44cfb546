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
from typing import Any, NamedTuple

import torch

from rotmole.data.encode import IGNORED, encode_all, tokenize_pairs
from rotmole.data.examples import Example
from rotmole.errors import ModelError
from rotmole.evaluation.prefixes import forests, keeps_apart, tree_of
from rotmole.models.logits import accepts_logits_to_keep
from rotmole.models.room import pass_bytes, tokens_that_fit
from rotmole.processes import over_batches, smallest

Tick = Callable[[int], None]
_NO_LIMIT = 1 << 30

TREE_TOKENS = 512
TREE_TOKENS_ON_GPU = 4096
"""The most tokens of one row of texts that begin alike: attention grows with their square."""

_WORTH = 0.8
"""Texts are laid in trees if that leaves at most this share of their tokens."""


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


class Likelihood(NamedTuple):
    """What a model says of one text's scored tokens, each after the true tokens before it.

    Attributes:
        log: sum_t log p(token_t | before t), in nats.
        greedy: every token is the likeliest one, so greedy decoding would write them all.
    """

    log: float
    greedy: bool


Batch = Sequence[Sequence[int]]
"""Rows of a forward pass; each row is the numbers of the texts in it."""

Work = Callable[[Any, Sequence[Scored], Batch], Iterator[tuple[int, Likelihood]]]


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
    apart: bool = False,
) -> list[float]:
    """Return the log-likelihood of each text's scored tokens, in nats; see `likelihoods`."""
    found = likelihoods(model, texts, batch_size=batch_size, tick=tick, spread=spread, apart=apart)
    return [each.log for each in found]


def likelihoods(
    model: Any,
    texts: Sequence[Scored],
    *,
    batch_size: int,
    tick: Tick | None = None,
    spread: bool = False,
    apart: bool = False,
) -> list[Likelihood]:
    """Return the likelihood of each text's scored tokens under the model.

    Texts with common beginnings, such as a prompt with its choices, are computed together, each
    beginning once, if that saves a fifth of the tokens and the model can do it (see
    `prefixes.keeps_apart`). Otherwise batches hold texts of similar length, padded on the right.

    Both ways and every batch size give the same figures up to the rounding of the model's type:
    to 1e-12 of their value in float64 and to 1e-5 in float32.

    Args:
        batch_size: the most texts of a batch. A forward pass reads at most as many tokens as so
            many of the longest text have, and no more than fit into half of the free memory; but
            at least one text.
        tick: called after each batch with the number of texts it finished.
        spread: share the batches among the joined processes; each gets all figures.
        apart: every text is a row of its own, unless it is the beginning of another one.

    Returns:
        One entry per text, computed in float32 or float64.

    Raises:
        ModelError: a figure is NaN.
    """
    batches, work = _planned(model, texts, batch_size=batch_size, spread=spread, apart=apart)

    def done(finished: Sequence[Batch]) -> None:
        if tick is not None:
            tick(sum(len(members) for batch in finished for members in batch))

    with evaluating(model):
        by_index = over_batches(
            batches, lambda batch: dict(work(model, texts, batch)), done, spread=spread
        )
    values = [by_index[index] for index in range(len(texts))]
    if any(math.isnan(value.log) for value in values):
        raise ModelError(
            "the model gives NaN as log-likelihood, because its weights or its adapter contain "
            "NaN or overflow in this dtype; load it in float32, or train it again."
        )
    return values


def _planned(
    model: Any, texts: Sequence[Scored], *, batch_size: int, spread: bool, apart: bool
) -> tuple[Sequence[Batch], Work]:
    """Choose between trees and padded batches, and share out the texts."""
    inputs = [text.tokens[:-1] for text in texts]
    ascending = sorted(range(len(texts)), key=inputs.__getitem__)
    rows = _shared_rows(inputs, ascending)
    longest = max(map(len, inputs), default=0)
    fit = smallest(tokens_that_fit(model, pass_bytes(model, logits=True)), spread=spread)
    fit = min(fit, batch_size * longest)
    if not apart and keeps_apart(model, longest):
        on_gpu = model.device.type == "cuda"
        most = min(fit, TREE_TOKENS_ON_GPU if on_gpu else TREE_TOKENS)
        passes, total = forests(inputs, ascending, most)
        if total <= _WORTH * sum(len(inputs[members[0]]) for members in rows):
            return [[each] for each in passes], _score_tree
    rows.sort(key=lambda members: -len(inputs[members[0]]))
    batches: list[list[list[int]]] = []
    for members in rows:
        full = not batches or len(batches[-1]) >= batch_size
        if full or (len(batches[-1]) + 1) * len(inputs[batches[-1][0][0]]) > fit:
            batches.append([])
        batches[-1].append(members)
    return batches, _score_batch


def _shared_rows(inputs: Sequence[tuple[int, ...]], ascending: Sequence[int]) -> list[list[int]]:
    """Group texts by sequence; every member's input is a prefix of the first member's input."""
    rows: list[list[int]] = []
    longest: tuple[int, ...] = ()
    # In descending order an input comes right after all inputs of which it is a prefix.
    for index in reversed(ascending):
        tokens = inputs[index]
        if rows and longest[: len(tokens)] == tokens:
            rows[-1].append(index)
        else:
            rows.append([index])
            longest = tokens
    return rows


def _score_tree(
    model: Any, texts: Sequence[Scored], batch: Batch
) -> Iterator[tuple[int, Likelihood]]:
    (members,) = batch
    tree = tree_of([texts[index].tokens[:-1] for index in members])
    paths = dict(zip(members, tree.paths, strict=True))
    needed = sorted({paths[i][p - 1] for i in members for p in texts[i].positions})
    if not needed:  # no token is scored, as in an empty text
        yield from ((index, Likelihood(0.0, True)) for index in members)
        return
    keep = torch.tensor(needed, device=model.device)
    logits_PV = model(**tree.arguments(model), logits_to_keep=keep).logits[0]
    logits_PV = _at_least_float(logits_PV)
    total_P, likeliest_P = torch.logsumexp(logits_PV, dim=-1), logits_PV.argmax(-1).tolist()
    place = {position: row for row, position in enumerate(needed)}
    for index in members:
        text, path = texts[index], paths[index]
        rows = [place[path[position - 1]] for position in text.positions]
        targets = [text.tokens[position] for position in text.positions]
        log = float((logits_PV[rows, targets] - total_P[rows]).sum())
        yield index, Likelihood(log, [likeliest_P[row] for row in rows] == targets)


def _score_batch(
    model: Any, texts: Sequence[Scored], rows: Batch
) -> Iterator[tuple[int, Likelihood]]:
    needed = sorted({p - 1 for members in rows for i in members for p in texts[i].positions})
    if not needed:  # no token is scored, as in an empty text
        yield from ((i, Likelihood(0.0, True)) for members in rows for i in members)
        return
    logits_BPV = _logits(model, [texts[members[0]].tokens[:-1] for members in rows], needed)
    total_BP, likeliest_BP = torch.logsumexp(logits_BPV, dim=-1), logits_BPV.argmax(-1).tolist()
    place = {position: column for column, position in enumerate(needed)}
    for row, members in enumerate(rows):
        for index in members:
            text = texts[index]
            columns = [place[position - 1] for position in text.positions]
            targets = [text.tokens[position] for position in text.positions]
            values = logits_BPV[row, columns, targets] - total_BP[row, columns]
            greedy = [likeliest_BP[row][column] for column in columns] == targets
            yield index, Likelihood(float(values.sum()), greedy)


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
    return _at_least_float(logits)


def _at_least_float(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
