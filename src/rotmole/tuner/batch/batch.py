"""What layers know of the batch at hand: one Batch for each call of a stack, gone when it returns.

A stack is a part of a model that walks one set of tokens: the model, an encoder, a decoder, a
vision tower. A hook makes a Batch when a stack is called and another one drops it when the call
ends. It belongs to that call and that thread, so several threads, several forward passes before one
backward pass, and stacks with other tokens never see each other's padding.

A checkpointed block runs again in the backward pass, after its stack has returned. Hooks on its
children recognise the arguments of such a run and give it the Batch of its own forward pass, which
the graph of the stack's output keeps alive.

Layers map the rows of their input to the batch by its structure: [N, S, D], flattened [N S, D] or
one row for each sequence, [N, D]. An input that fits none of them is refused by a router or
selection that has to know, and warned of once when a loss or a load count would like to know.
"""

from __future__ import annotations

import inspect
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rotmole.errors import ModelError
from rotmole.ops.spec import Tokens

TASKS = "task_id"
CACHES = ("past_key_values", "cache_params")
PACKED = ("cu_seq_lens_q", "cu_seqlens_q", "cu_seqlens")
STATES = ("inputs_embeds", "hidden_states")
ROWS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values")
SPEAKING = {"input_ids", "inputs_embeds", "hidden_states", "attention_mask", *ROWS}
REMEMBERED = 64  # forward passes that may wait for their backward pass under checkpointing


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
        tasks: [N] group of each row's task; None if the batch does not say.
        sequence: ([N S] number of each token's sequence, how many) of packed rows; None: each row
            is one sequence.
        unclear: what keeps padding or sequences from being known, in words; "" if nothing does.
        walks_tokens: whether the stack's arguments speak of tokens at all; any other model, such as
            one that maps rows of features, has neither padding nor sequences.
        encoder: (states, Batch) of the tokens that cross-attention reads.
        before: the batch at hand when this one was opened: a stack may call itself.
        cache: the key-value cache of this call, which tells one generation from another.
        last_read: what decoding layers share in this call, see experts/decoding.py.
        blocks: what the layers of block-routed blocks share in this call, see experts/blocks.py.
        calls: storages of the arguments of this call's blocks, to recognise a second run by.
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
    encoder: tuple[Tensor, Batch] | None = None
    before: Batch | None = None
    cache: Any = None
    last_read: Any = None
    blocks: dict[int, Any] = field(default_factory=dict)
    calls: set[int] = field(default_factory=set)
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
        if lead in ((rows, positions), (rows * positions,)):
            return self._all_tokens(x.device)
        if lead == (rows,):  # one row for each sequence, such as a pooler's
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


class _Local(threading.local):
    """The batch of the call at hand, in this thread; and one for calls outside of any stack."""

    batch: Batch | None = None
    outside: Batch | None = None
    again: tuple[int, str, Batch] | None = None  # backward pass, block that runs again, its batch


class Stack:
    """One part of a model that walks one set of tokens.

    Args:
        names: names of its forward's parameters, in order.
        outer: the stack around it, None for the model itself.
    """

    def __init__(self, names: tuple[str, ...] = (), outer: Stack | None = None) -> None:
        self.names, self.outer = names, outer
        self.takes_tasks = False
        self.warnings: set[str] = set()
        self._forget()

    def _forget(self) -> None:
        self.local = _Local()
        # in place of local.batch and local.outside, which cannot be set while tracing
        self.traced: Batch | None = None
        self.outside = Batch(is_outside=True, walks_tokens=True)
        self.waiting: deque[weakref.ref[Batch]] = deque(maxlen=REMEMBERED)
        self.first: dict[str, weakref.ref[nn.Module]] = {}  # the child that a block calls first
        # key-value cache of a generation -> what its decoding layers have packed
        self.packs: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles keep what is built and none of a call."""
        calls = ("local", "traced", "outside", "waiting", "packs", "first")
        return {name: value for name, value in self.__dict__.items() if name not in calls}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def current(self) -> Batch | None:
        """Return the batch of the call at hand in this thread, None outside of one."""
        if torch.compiler.is_compiling() and self.traced is not None:
            return self.traced
        return self.local.batch

    def batch(self, block: str = "") -> Batch:
        """Return the batch of the call at hand; outside of a call one that knows nothing.

        Args:
            block: path of the block in which the layer lies, for its second run in a backward pass.
        """
        batch = self.current()
        if batch is not None:
            return batch
        if torch.compiler.is_compiling():
            return self.outside
        again = self.local.again
        if again is not None and again[:2] == (torch._C._current_graph_task_id(), block):
            return again[2]
        if self.local.outside is None:
            self.local.outside = Batch(is_outside=True, walks_tokens=True)
        return self.local.outside

    def set(self, batch: Batch | None) -> None:
        """Make a batch the one at hand in this thread."""
        if torch.compiler.is_compiling():
            self.traced = batch
        else:
            self.local.batch = batch

    def warn_once(self, key: str, message: str) -> None:
        """Warn once for each key."""
        if key not in self.warnings and not torch.compiler.is_compiling():
            self.warnings.add(key)
            warnings.warn(message, stacklevel=2)

    def open(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Forward pre-hook of the stack's module: read its arguments into a Batch."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        outer = None if self.outer is None else self.outer.current()
        batch = read_batch(given, args, outer, encoder_decoder="decoder_input_ids" in self.names)
        batch.walks_tokens = bool(SPEAKING & set(self.names))
        batch.before = self.current()
        self.set(batch)
        if self.takes_tasks and TASKS in kwargs:  # the model itself does not know it
            return args, {name: value for name, value in kwargs.items() if name != TASKS}
        return None

    def close(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the stack's module, called when its forward raised as well."""
        batch = self.current()
        if batch is None:
            return
        self.set(batch.before)
        batch.before = None
        if torch.compiler.is_compiling() or not batch.calls:
            return
        for tensor in _tensors(output):
            if tensor.grad_fn is not None:  # its backward pass may run blocks again
                metadata: Any = tensor.grad_fn.metadata
                metadata[f"rotmole {id(self)}"] = batch
        self.waiting.append(weakref.ref(batch))

    def enter(self, block: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of a block's children: recognise a second run by its arguments.

        A checkpointed block runs its forward again with the arguments of the first time. Hooks on
        the block itself may not run then, those on its children do.
        """
        if torch.compiler.is_compiling() or not module.training:
            return
        batch = self.local.batch
        task = torch._C._current_graph_task_id()
        if batch is None and task == -1:
            return
        storages = {t.data_ptr() for t in _tensors((args, kwargs)) if not t.is_meta}
        if batch is not None:
            batch.calls |= storages
            self.first.setdefault(block, weakref.ref(module))
            return
        waiting = [batch for batch in (ref() for ref in self.waiting) if batch is not None]
        fits = [(len(storages & batch.calls), number) for number, batch in enumerate(waiting)]
        common, newest = max(fits, default=(0, 0))
        if common:
            self.local.again = (task, block, waiting[newest])
        elif block in self.first and self.first[block]() is module:  # the block begins, unknown
            self.local.again = None


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
    if states is None and outer is not None:
        states = next((value for value in args[:1] if _axes(value) == 3), None)
    known = next((t for t in (ids, states, labels) if _axes(t) >= 2), None)
    batch = Batch(shape=None if known is None else (known.shape[0], known.shape[1]))
    batch.rows = next((given[n].shape[0] for n in ROWS if _axes(given.get(n)) >= 2), None)
    batch.ids = ids if _axes(ids) == 2 else None
    same = outer is not None and batch.shape is not None and outer.shape == batch.shape
    if same:
        assert outer is not None
        batch.ids = outer.ids if batch.ids is None else batch.ids
        batch.mask, batch.unclear, batch.sequence = outer.mask, outer.unclear, outer.sequence
    if mask is not None and not (same and _axes(mask) != 2):
        batch.mask, batch.unclear = _padding(mask, batch.shape)
    elif batch.mask is None and labels is not None and tuple(labels.shape) == batch.shape:
        batch.mask = labels != -100
    if batch.mask is None and batch.shape is not None:
        batch.sequence = _packed_sequences(given, batch.shape) or batch.sequence
    _read_surroundings(batch, given, outer)
    return batch


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
    if isinstance(tasks, Tensor) and (rows is None or tasks.shape[0] == rows):
        batch.tasks = tasks
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


def _padding(mask: Any, shape: tuple[int, int] | None) -> tuple[Tensor | None, str]:
    """Return the mask of the call's own tokens, or in words why it is unknown."""
    if _axes(mask) != 2:
        return None, "its attention mask is not [rows, tokens]"
    if shape is None or mask.shape[0] != shape[0] or mask.shape[1] < shape[1]:
        return None, "its attention mask is of other tokens than its layers'"
    return mask[:, mask.shape[1] - shape[1] :], ""  # with a cache the mask covers the past too


def _packed_sequences(
    given: Mapping[str, Any], shape: tuple[int, int]
) -> tuple[Tensor, int] | None:
    """Number the sequences of packed rows; None if every row is one sequence.

    By cumulated lengths, by a number for each token (seq_idx), or by position_ids that do not go
    on by one, as transformers itself tells packed sequences apart if there is no mask.
    """
    rows, positions = shape
    lengths = next((given[n] for n in PACKED if _axes(given.get(n)) == 1), None)
    if lengths is not None and rows == 1:
        place_S = torch.arange(positions, device=lengths.device)
        return torch.bucketize(place_S, lengths[1:], right=True), lengths.shape[0] - 1
    number, step = given.get("seq_idx"), 0
    if _axes(number) != 2:
        number, step = given.get("position_ids"), 1
    if not isinstance(number, Tensor) or number.dim() != 2 or number.shape[1] != positions:
        return None
    number = number.expand(rows, positions)
    starts = torch.ones_like(number, dtype=torch.bool)
    starts[:, 1:] = number[:, 1:] != number[:, :-1] + step
    if torch.compiler.is_compiling():  # the count is not known while tracing
        return starts.flatten().cumsum(0) - 1, rows * positions
    sequence_T = starts.flatten().cumsum(0) - 1
    count = int(sequence_T[-1]) + 1 if sequence_T.numel() else rows
    return None if count == rows else (sequence_T, count)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in arguments or outputs: tuples, lists and mappings are looked into."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


class Watch:
    """The stacks of one model that hold adapted layers, and the hooks on them.

    Attributes:
        stacks: by path in the model.
        blocks: paths of the blocks that are hooked.
        states: what the losses sum up, by part of the model (losses.BalanceState).
    """

    def __init__(self) -> None:
        self.stacks: dict[str, Stack] = {}
        self.states: dict[str, Any] = {}
        self.blocks: set[str] = set()
        self.handles: list[Any] = []

    def cover(self, model: nn.Module, paths: Sequence[str]) -> None:
        """Hook the stacks around modules; those that are hooked already stay.

        Args:
            model: the base model.
            paths: of the adapted layers in it.
        """
        lists: list[str] = []
        for path, module in model.named_modules():
            if isinstance(module, nn.ModuleList):
                lists.append(f"{path}.")
            if path in self.stacks or not any(_lies_in(name, path) for name in paths):
                continue
            names = tuple(inspect.signature(module.forward).parameters)
            in_list = path.startswith(tuple(lists))  # a layer of a stack, not a stack
            if path and not _is_stack(module, names, in_list):
                continue
            outer = None if path == "" else self.of(path.rpartition(".")[0])
            stack = self.stacks[path] = Stack(names, outer)
            self.handles += [
                module.register_forward_pre_hook(stack.open, with_kwargs=True),
                module.register_forward_hook(stack.close, always_call=True),
            ]

    def cover_blocks(self, model: nn.Module, paths: Sequence[str]) -> None:
        """Hook the blocks around modules, so that checkpointing finds their batch again."""
        modules = model.named_modules()
        lists = [name for name, module in modules if isinstance(module, nn.ModuleList)]
        for path in paths:
            around = next((name for name in lists if path.startswith(f"{name}.")), None)
            if around is None:
                continue
            block = ".".join(path.split(".")[: around.count(".") + 2])
            if block in self.blocks or block == path:
                continue
            self.blocks.add(block)
            enter = partial(self.of(block).enter, block)
            for child in model.get_submodule(block).children():
                self.handles.append(child.register_forward_pre_hook(enter, with_kwargs=True))

    def block_of(self, path: str) -> str:
        """Return the path of the hooked block around a module, "" if there is none."""
        return next((block for block in self.blocks if path.startswith(f"{block}.")), "")

    def of(self, path: str) -> Stack:
        """Return the innermost stack around a module."""
        names = [name for name in self.stacks if name == path or _lies_in(path, name)]
        return self.stacks[max(names, key=len)]

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self.handles:
            handle.remove()
        self.stacks, self.blocks, self.handles = {}, set(), []


def _lies_in(path: str, part: str) -> bool:
    return part == "" or path.startswith(f"{part}.")


def _is_stack(module: nn.Module, names: tuple[str, ...], in_list: bool) -> bool:
    """Whether a module walks a set of tokens of its own: a model, or the holder of its layers."""
    if isinstance(module, PreTrainedModel):
        return True
    holds_layers = any(isinstance(child, nn.ModuleList) for child in module.children())
    return holds_layers and not in_list and bool(SPEAKING & set(names))
