"""From text to token ids and labels, and from rows to batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rotmole.data.examples import Example
from rotmole.errors import DataError, ModelError

IGNORED = -100  # the label that torch's cross entropy ignores
BATCH = 1000  # texts in one tokenizer call
Span = tuple[int, int]
Row = Mapping[str, Sequence[int]]


def tokenize_pair(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], int]:
    """Tokenise prompt and completion as ONE text and find where the completion begins.

    A token across the boundary belongs to the completion, because the prompt alone would end in
    other tokens. The tokenizer adds its special tokens, with two exceptions: no second beginning
    of sequence if the text (from a chat template) starts with one, and no end of sequence.

    Args:
        completion: the answer, with its leading space if it has one.

    Returns:
        The ids, and the index of the completion's first id.
    """
    return tokenize_pairs(tokenizer, [(prompt, completion)])[0]


def tokenize_pairs(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """Do what tokenize_pair does for many pairs, several times faster."""
    texts = [prompt + completion for prompt, completion in pairs]
    ranges = [[(len(prompt), len(prompt + completion))] for prompt, completion in pairs]
    tokenized = tokenize_ranges(tokenizer, texts, ranges)
    return [(ids, spans[0][0]) for ids, spans in tokenized]


def tokenize_ranges(
    tokenizer: Any, texts: Sequence[str], ranges: Sequence[Sequence[Span]]
) -> list[tuple[list[int], list[Span]]]:
    """Tokenise whole texts and find the tokens of ranges of their characters.

    Args:
        ranges: of each text, ascending. A token that lies across an end of a range belongs to it
            (without offsets, across its beginning only).

    Returns:
        For each text its ids, and for each range the indices of its first token and after its
        last one.
    """
    bos = tokenizer.bos_token
    # add_special_tokens holds for a whole call, so texts with and without BOS need two calls
    begun = [i for i, text in enumerate(texts) if bos and text.startswith(bos)]
    others = sorted(set(range(len(texts))) - set(begun))
    results: dict[int, tuple[list[int], list[Span]]] = {}
    for indices, special in ((begun, False), (others, True)):
        for start in range(0, len(indices), BATCH):
            part = indices[start : start + BATCH]
            tokenized = _tokenize(
                tokenizer, [texts[i] for i in part], [ranges[i] for i in part], special
            )
            results.update(zip(part, tokenized, strict=True))
    return [results[index] for index in range(len(texts))]


def _tokenize(
    tokenizer: Any, texts: list[str], ranges: list[Sequence[Span]], special: bool
) -> list[tuple[list[int], list[Span]]]:
    offsets = getattr(tokenizer, "is_fast", False)
    options = {"return_offsets_mapping": True} if offsets else {}
    encoded = tokenizer(texts, add_special_tokens=special, **options)
    results = []
    for row, (text, wanted) in enumerate(zip(texts, ranges, strict=True)):
        ids = encoded["input_ids"][row]
        if offsets:
            spans = [_covering(encoded["offset_mapping"][row], each) for each in wanted]
        else:
            edges = [text[:edge] for each in wanted for edge in each]
            before = tokenizer(edges, add_special_tokens=special)["input_ids"]
            places = iter([common_prefix(ids, each) for each in before])
            spans = list(zip(places, places, strict=True))
        # some tokenizers add an EOS; `encode` adds the end of the answer itself
        tokens = list(ids[:-1]) if ids and ids[-1] == tokenizer.eos_token_id else list(ids)
        results.append((tokens, [(min(a, len(tokens)), min(b, len(tokens))) for a, b in spans]))
    return results


def _covering(offsets: Sequence[Span], wanted: Span) -> Span:
    """Return the tokens that hold a character of a range, by their offsets."""
    start, stop = wanted
    first = next((i for i, (_, end) in enumerate(offsets) if end > start), len(offsets))
    after = next((i for i in range(len(offsets) - 1, first - 1, -1) if _begins(offsets[i], stop)),
                 first - 1)  # fmt: skip
    return first, after + 1


def _begins(offset: Span, stop: int) -> bool:
    return offset[0] < stop and offset[1] > offset[0]


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two texts have in common at their beginning."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))


def encode(example: Example, tokenizer: Any, *, max_length: int) -> dict[str, Any]:
    """Return the ids and labels of one example.

        ids    = tokens(prompt + completion) + EOS
        labels = the ids where `example.learnt` says so, by default the completion's, and EOS;
                 -100 elsewhere                                 (all ids if loss_on is "all")

    EOS is `example.end` if the chat template has an end of its own, else the tokenizer's EOS. A
    row longer than `max_length` is an error unless its `long_rows` is "cut": then the prompt
    loses its first tokens (a text without prompt loses its last), and an earlier answer of a chat
    that loses its beginning is not learnt; a last answer that does not fit is always an error.

    Args:
        max_length: the maximum number of tokens, EOS included.

    Returns:
        input_ids, labels (lists of equal length), task, group, and whether the row was cut.

    Raises:
        DataError: the row is too long, or all its labels are masked; names the row.
        ModelError: the tokenizer has no end-of-sequence token.
    """
    return encode_all([example], tokenizer, max_length=max_length)[0]


def encode_all(
    examples: Sequence[Example], tokenizer: Any, *, max_length: int
) -> list[dict[str, Any]]:
    """Do what encode does for many examples, in order, several times faster."""
    tokenized = tokenize_ranges(
        tokenizer, [e.prompt + e.completion for e in examples], [_ranges(e) for e in examples]
    )
    return [
        _encoded(example, tokenizer, ids, spans, max_length=max_length)
        for example, (ids, spans) in zip(examples, tokenized, strict=True)
    ]


def learnt_messages(example: Example) -> int:
    """Return how many answers of a row are learnt: several in a chat of several turns."""
    return max(1, len(example.learnt))


def _ranges(example: Example) -> Sequence[Span]:
    start = len(example.prompt)
    return example.learnt or [(start, start + len(example.completion))]


def _encoded(
    example: Example, tokenizer: Any, ids: list[int], spans: list[Span], *, max_length: int
) -> dict[str, Any]:
    ids = ids + _ending(tokenizer, example.end)
    whole = len(ids)
    start = spans[-1][0]
    spans = [*spans[:-1], (start, len(ids))]
    if len(ids) > max_length:
        ids, moved = _shorten(example, tokenizer, ids, start, max_length)
        first = int(ids[0] == tokenizer.bos_token_id) if moved < start else 0
        shift = start - moved
        spans = [(a - shift, b - shift) for a, b in spans if a - shift >= first]
    if example.loss_on == "all":
        spans = [(0, len(ids))]
    labels = [IGNORED] * len(ids)
    for begin, end in spans:
        labels[begin:end] = ids[begin:end]
    if all(label == IGNORED for label in labels[1:]):  # nothing predicts the first token
        raise DataError(
            f"{example.place}: all labels are masked, so nothing can be learned from this row; "
            "give it an answer"
        )
    return {
        "input_ids": ids,
        "labels": labels,
        "task": example.task,
        "group": example.group,
        "cut": len(ids) < whole,
    }


def _ending(tokenizer: Any, end: str) -> list[int]:
    if end:
        return list(tokenizer(end, add_special_tokens=False)["input_ids"])
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the model's tokenizer has no end-of-sequence token, so no answer could end; set "
            "eos_token in its tokenizer_config.json"
        )
    return [tokenizer.eos_token_id]


def _shorten(
    example: Example, tokenizer: Any, ids: list[int], start: int, max_length: int
) -> tuple[list[int], int]:
    extra = len(ids) - max_length
    first = int(ids[0] == tokenizer.bos_token_id)  # BOS stays in front of what is left
    if example.long_rows == "cut":
        if not example.prompt:
            return ids[:max_length], start
        if start - first >= extra:
            return ids[:first] + ids[first + extra :], start - extra
    answer = len(ids) - start
    advice = (
        f"the answer alone has {answer}; raise training.max_length or shorten the row"
        if example.long_rows == "cut"
        else f"the prompt has {start} and the answer {answer}; raise training.max_length, "
        f"shorten the row, or set long_rows: cut for task '{example.task}'"
    )
    raise DataError(
        f"{example.place}: {len(ids)} tokens are more than training.max_length {max_length}: "
        f"{advice}"
    )


def equal_length_batches(
    rows: Sequence[Row], size: int
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield batches of rows of one length, so that none holds padding.

    Args:
        rows: with input_ids, and labels of the same length; without labels every token counts.
        size: of the largest batch.

    Yields:
        The model's arguments, and [B, T] whether the token is one that counts.
    """
    by_length: dict[int, list[Row]] = {}
    for row in rows:
        by_length.setdefault(len(row["input_ids"]), []).append(row)
    for _, equal in sorted(by_length.items()):
        for start in range(0, len(equal), size):
            batch = equal[start : start + size]
            ids_BT = torch.tensor([list(row["input_ids"]) for row in batch])
            labels_BT = torch.tensor([list(row.get("labels", row["input_ids"])) for row in batch])
            arguments = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
            yield arguments, labels_BT != IGNORED


class Collator:
    """Pads encoded rows on the right to one batch of tensors.

    The attention mask comes from the rows' lengths and not from the padding id, because models
    such as SmolLM2 pad with their EOS, which is also a label. The text columns task and group
    are left out of the batch; an integer `task_id` is included.

    Args:
        tokenizer: gives the padding id; its EOS, else 0, if it has none.
        pad_to_multiple_of: the length is rounded up to a multiple of it.
    """

    def __init__(self, tokenizer: Any, pad_to_multiple_of: int | None = None) -> None:
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_id = next(i for i in ids if i is not None)
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return input_ids, attention_mask and labels, each [B, longest row]."""
        longest = max(len(row["input_ids"]) for row in rows)
        if self.pad_to_multiple_of:
            longest += -longest % self.pad_to_multiple_of
        ids = [row["input_ids"] for row in rows]
        batch = {
            "input_ids": self._padded(ids, self.pad_id, longest),
            "attention_mask": self._padded([[1] * len(row) for row in ids], 0, longest),
        }
        if "labels" in rows[0]:
            batch["labels"] = self._padded([row["labels"] for row in rows], IGNORED, longest)
        if "task_id" in rows[0]:
            batch["task_id"] = torch.tensor([int(row["task_id"]) for row in rows])
        return batch

    @staticmethod
    def _padded(rows: Sequence[Sequence[int]], fill: int, length: int) -> torch.Tensor:
        padded = [list(row) + [fill] * (length - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.long)
