"""What layers know of one forward pass of one stack, and how the rows of their inputs lie in it.

Layers map the rows of their input to the batch by its structure: [N, S, D], flattened [N S, D] or
one row for each sequence, [N, D]. An input that fits none of them is refused by a router or
selection that has to know, and warned of once when a loss or a load count would like to know.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from rotmole.errors import ModelError
from rotmole.ops.spec import Tokens


class Layout(NamedTuple):
    """How the T rows of a layer's input lie in the batch.

    Attributes:
        tokens: ids, padding and sequences of the T rows.
        weight_T: [T] how much each row counts in a loss: 1 for a token, 0 for padding, and the
            tokens of its sequence for the one row of a sequence; None: all count 1.
        rows: N rows of the batch, each of T/N rows of the input; None if they are not known.
    """

    tokens: Tokens
    weight_T: Tensor | None = None
    rows: int | None = None


@dataclass(eq=False)
class Batch:
    """One call of one stack.

    Attributes:
        shape: (N, S), N rows of S tokens; None if the call does not say.
        rows: N, known without S for images and sound.
        mask: [N, S] True for tokens that are no padding; None: all.
        ids: [N, S] token ids; None if the stack got none.
        tasks: group of the task of each of the N rows, or of each sequence of packed rows; None if
            the batch does not say.
        sequence: ([N S] number of each token's sequence, how many) of packed rows; None: each row
            is one sequence.
        unclear: what keeps padding or sequences from being known, in words; "" if nothing does.
        walks_tokens: whether the stack's arguments speak of tokens at all; any other model, such as
            one that maps rows of features, has neither padding nor sequences.
        is_decoders: whether the stack holds an encoder and a decoder; shape, mask and ids are then
            those of the decoder's tokens.
        has_features: whether the call got images or sound too.
        tokens_first: whether some of the stack's layers read [S, N, D].
        encoder: (states, Batch) of the tokens that cross-attention reads.
        before: the batch at hand when this one was opened: a stack may call itself.
        cache: the key-value cache of this call, if it can hold packed weights.
        last_read: what decoding layers share in this call, see experts/decoding.py.
        blocks: what the layers of block-routed blocks share in this call, see experts/blocks.py.
        calls: storages of the arguments of this call's blocks, to recognise a second run by; the
            weak references keep their addresses from being used again.
        task: the backward pass in which this call was made, -1 for none.
        frame: of the call while it goes on.
        checked_groups: below which number all of `tasks` are known to lie.
        layouts: what `layout` has worked out, by the shape of the input.
        is_outside: no stack was called: the layer, or a part of the model, by itself.
    """

    shape: tuple[int, int] | None = None
    rows: int | None = None
    mask: Tensor | None = None
    ids: Tensor | None = None
    tasks: Tensor | None = None
    sequence: tuple[Tensor, int] | None = None
    unclear: str = ""
    walks_tokens: bool = False
    is_decoders: bool = False
    has_features: bool = False
    tokens_first: bool = False
    encoder: tuple[Tensor, Batch] | None = None
    before: Batch | None = None
    cache: Any = None
    last_read: Any = None
    blocks: dict[int, Any] = field(default_factory=dict)
    calls: dict[int, StorageWeakRef] = field(default_factory=dict)
    task: int = -1
    frame: FrameType | None = None
    checked_groups: int = 0
    layouts: dict[tuple[int, ...], Layout | None] = field(default_factory=dict)
    is_outside: bool = False

    def check_known(self) -> None:
        """Refuse to go on if this is a second run of a layer whose forward pass is not known.

        Raises:
            ModelError: the layer is computed in a backward pass, outside of every known block.
        """
        if self.is_outside and torch._C._current_graph_task_id() != -1:
            raise ModelError(
                "a layer was computed again in a backward pass, and it is not known for which "
                "batch: checkpoint whole blocks of the model (model.gradient_checkpointing_enable) "
                "and run the backward pass while the model's output still exists"
            )

    def layout(self, x: Tensor) -> Layout | None:
        """Return how the rows of a layer's input [..., D] lie in the batch; None if unknown."""
        if self.encoder is not None and _is_same(x, self.encoder[0]):
            return self.encoder[1].layout(x)
        key = tuple(x.shape[:-1])
        if torch.compiler.is_compiling():
            return self._layout(x)
        if key not in self.layouts:
            self.layouts[key] = self._layout(x)
        return self.layouts[key]

    def _layout(self, x: Tensor) -> Layout | None:
        lead = tuple(x.shape[:-1])
        if self.shape is None:
            if self.rows is None:  # nothing is known: the first of several axes numbers sequences
                rows = lead[0] if len(lead) > 1 else None
                unknown = rows is None and self.walks_tokens
                return None if unknown else Layout(Tokens(sequences=rows or 1), rows=rows)
            fits = bool(lead) and lead[0] == self.rows
            return Layout(Tokens(sequences=self.rows), rows=self.rows) if fits else None
        rows, positions = self.shape
        if self.tokens_first and rows == positions and len(lead) > 1:  # which axis is which?
            return None
        if lead in ((rows, positions), (rows * positions,)):
            return self._all_tokens(x.device)
        if lead == (rows,) and not self.has_features:  # one row a sequence, such as a pooler's
            weight_N = None if self.mask is None else self.mask.sum(1).to(x.device)
            mask_N = None if weight_N is None else weight_N > 0
            return Layout(Tokens(mask_T=mask_N, sequences=rows), weight_N, rows)
        return None

    def _all_tokens(self, device: torch.device) -> Layout:
        assert self.shape is not None
        flat = [None if t is None else t.reshape(-1).to(device) for t in (self.ids, self.mask)]
        number_T, count = None, self.shape[0]
        if self.sequence is not None:
            number_T, count = self.sequence[0].to(device), self.sequence[1]
        mask_T = None if flat[1] is None else flat[1].bool()
        return Layout(Tokens(flat[0], mask_T, number_T, count), mask_T, self.shape[0])


def _is_same(x: Tensor, states: Tensor) -> bool:
    if x is states:
        return True
    if torch.compiler.is_compiling() or x.shape != states.shape:
        return False
    return not x.is_meta and x.data_ptr() == states.data_ptr()
