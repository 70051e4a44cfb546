"""Read from the arguments of a stack what they say of its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rotmole.tuner.batch.batch import Batch

TASKS = "task_id"
CACHES = ("past_key_values", "cache_params")
PACKED = ("cu_seq_lens_q", "cu_seqlens_q", "cu_seqlens")
STATES = ("inputs_embeds", "hidden_states")
FEATURES = ("pixel_values", "input_features", "input_values")  # of images and sound
ROWS = ("input_ids", "inputs_embeds", *FEATURES)
SPEAKING = {"input_ids", "inputs_embeds", "hidden_states", "attention_mask", *ROWS}


def read_batch(
    given: Mapping[str, Any], args: Sequence[Any], outer: Batch | None, *, encoder_decoder: bool
) -> Batch:
    """Read what the arguments of a stack say of its tokens.

    Args:
        given: the arguments by name.
        args: those given by position, of which the first may be the hidden states.
        outer: the batch of the stack around it; if that walks the same N x S tokens, what this
            call does not say is taken from there.
        encoder_decoder: whether the stack holds an encoder and a decoder; then its own layers see
            the decoder's tokens, and labels of -100 are padding unless a mask says otherwise.
    """
    side = "decoder_" if encoder_decoder else ""
    ids, mask = given.get(f"{side}input_ids"), given.get(f"{side}attention_mask")
    states = next((given[n] for n in _prefixed(STATES, side) if _axes(given.get(n)) == 3), None)
    labels = given.get("labels") if encoder_decoder else None
    if states is None and outer is not None and next(iter(given), "") not in FEATURES:
        states = next((value for value in args[:1] if _axes(value) == 3), None)
    sized = next((t for t in (ids, states, labels) if _axes(t) >= 2), None)
    batch = Batch(
        is_decoders=encoder_decoder,
        shape=None if sized is None else (sized.shape[0], sized.shape[1]),
    )
    batch.rows = next((given[n].shape[0] for n in ROWS if _axes(given.get(n)) >= 2), None)
    batch.ids = ids if _axes(ids) == 2 else None
    batch.has_features = any(given.get(name) is not None for name in FEATURES)
    # the tokens of an encoder-decoder are the decoder's, not those of its encoder
    decodes = encoder_decoder or given.get("encoder_hidden_states") is not None
    same = outer is not None and batch.shape is not None and outer.shape == batch.shape
    same = same and (decodes or not (outer is not None and outer.is_decoders))
    if same:
        assert outer is not None
        batch.ids = outer.ids if batch.ids is None else batch.ids
        batch.mask, batch.unclear, batch.sequence = outer.mask, outer.unclear, outer.sequence
    for_scores = outer is not None and isinstance(mask, Tensor) and mask.is_floating_point()
    if mask is not None and not (same and (_axes(mask) != 2 or for_scores)):
        batch.mask, batch.unclear = _padding(mask, batch.shape, for_scores=for_scores)
    elif batch.mask is None and labels is not None and tuple(labels.shape) == batch.shape:
        batch.mask = labels != -100
    if batch.mask is None and batch.shape is not None:
        packed, fill_mask = _packed_sequences(given, batch.shape)
        batch.sequence = packed or batch.sequence
        batch.mask = fill_mask
        if not same and outer is not None and _are_others(batch, outer, decodes=decodes):
            batch.unclear = "its tokens are other than the model's"
    _read_surroundings(batch, given, outer)
    return batch


def _are_others(batch: Batch, outer: Batch, *, decodes: bool) -> bool:
    """Whether the rows around came here longer or shorter, and nothing says what is padding."""
    if decodes or outer.is_decoders or outer.mask is None or batch.mask is not None:
        return False
    assert batch.shape is not None
    return outer.shape is not None and outer.shape[0] == batch.shape[0]


def _prefixed(names: Sequence[str], side: str) -> list[str]:
    return [side + name for name in names]


def _axes(value: Any) -> int:
    return value.dim() if isinstance(value, Tensor) else 0


def _read_surroundings(batch: Batch, given: Mapping[str, Any], outer: Batch | None) -> None:
    """Note tasks, cache, and the encoder's tokens that cross-attention reads."""
    tasks = given.get(TASKS)
    if tasks is None and outer is not None:
        tasks = outer.tasks
    rows = batch.rows if batch.shape is None else batch.shape[0]
    if isinstance(tasks, Tensor) and (rows is None or tasks.shape[0] in (rows, _packed(batch))):
        batch.tasks = tasks
    elif isinstance(tasks, Tensor) and batch.sequence and torch.compiler.is_compiling():
        batch.tasks = tasks  # how many sequences there are is not known while tracing
    batch.cache = next((given[n] for n in CACHES if given.get(n) is not None), None)
    if batch.cache is None and outer is not None:
        batch.cache = outer.cache
    states = given.get("encoder_hidden_states")
    if outer is not None and outer.encoder is not None and outer.encoder[0] is states:
        batch.encoder = outer.encoder
    elif isinstance(states, Tensor) and states.dim() == 3:
        of_states = Batch(shape=(states.shape[0], states.shape[1]), tasks=batch.tasks)
        mask = given.get("encoder_attention_mask")
        if mask is not None:
            of_states.mask, of_states.unclear = _padding(mask, of_states.shape)
        batch.encoder = (states, of_states)


def _packed(batch: Batch) -> int | None:
    return None if batch.sequence is None else batch.sequence[1]


def _padding(
    mask: Any, shape: tuple[int, int] | None, *, for_scores: bool = False
) -> tuple[Tensor | None, str]:
    """Return the mask of the call's own tokens, or in words why it is unknown.

    Args:
        mask: the argument.
        shape: (N, S) of the call.
        for_scores: the mask is one of numbers that attention adds to its scores.
    """
    if _axes(mask) != 2 or for_scores:
        return None, "its attention mask is not [rows, tokens]"
    if shape is None or mask.shape[0] != shape[0] or mask.shape[1] < shape[1]:
        return None, "its attention mask is of other tokens than its layers'"
    return mask[:, mask.shape[1] - shape[1] :], ""  # with a cache the mask covers the past too


def _packed_sequences(
    given: Mapping[str, Any], shape: tuple[int, int]
) -> tuple[tuple[Tensor, int] | None, Tensor | None]:
    """Number the sequences of packed rows, None if every row is one; and mask fill after them.

    By cumulated lengths, by a number for each token (seq_idx, below 0 for fill), or by position_ids
    that do not go on by one, as transformers itself tells packed sequences apart without a mask.
    """
    rows, positions = shape
    lengths = next((given[n] for n in PACKED if _axes(given.get(n)) == 1), None)
    if lengths is not None and rows == 1:
        place_S = torch.arange(positions, device=lengths.device)
        number_S = torch.bucketize(place_S, lengths[1:], right=True)
        count = lengths.shape[0] - 1
        return (number_S.clamp(max=count - 1), count), (number_S < count)[None]
    number, step = given.get("seq_idx"), 0
    if _axes(number) != 2:
        number, step = given.get("position_ids"), 1
        if (
            isinstance(number, Tensor) and number.dim() == 3 and len(number) == 4
        ):  # the text's, then time, height, width
            number = number[0]
    if not isinstance(number, Tensor) or number.dim() != 2 or number.shape[1] != positions:
        return None, None
    number = number.expand(rows, positions)
    starts = torch.ones_like(number, dtype=torch.bool)
    starts[:, 1:] = number[:, 1:] != number[:, :-1] + step
    fill_mask = None
    if step == 0:
        starts, fill_mask = starts & (number >= 0), number >= 0
    if torch.compiler.is_compiling():  # the count is not known while tracing
        return (starts.flatten().cumsum(0) - 1, rows * positions), fill_mask
    sequence_T = starts.flatten().cumsum(0) - 1
    count = int(sequence_T[-1]) + 1 if sequence_T.numel() else rows
    if fill_mask is not None and bool(fill_mask.all()):
        fill_mask = None
    return (None if count == rows else (sequence_T, count)), fill_mask
