"""One Batch for each call of a stack, gone when it returns.

A stack is a part of a model that walks one set of tokens: the model, an encoder, a decoder, a
vision tower. A hook makes a Batch when a stack is called and another one drops it when the call
ends. It belongs to that call and that thread, so several threads, several forward passes before one
backward pass, and stacks with other tokens never see each other's padding.

A checkpointed block runs again in the backward pass, after its stack has returned. Hooks on its
children recognise the arguments of such a run and give it the Batch of its own forward pass, which
the graph of the stack's output keeps alive.
"""

from __future__ import annotations

import inspect
import sys
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel
from transformers.cache_utils import StaticLayer

from rotmole.ops.transforms import is_transformed
from rotmole.tuner.batch.batch import Batch
from rotmole.tuner.batch.reading import SPEAKING, TASKS, read_batch

# types of models that have layers which read [S, N, D]
TOKENS_FIRST = {"xlnet", "fsmt", "longformer", "led", "bridgetower"}
REMEMBERED = 64  # forward passes that may wait for their backward pass under checkpointing


class _Local(threading.local):
    """The batch of the call at hand, in this thread; and one for calls outside of any stack."""

    batch: Batch | None = None
    outside: Batch | None = None
    # backward pass, block that runs again, its batch
    again: tuple[int, str, weakref.ref[Batch]] | None = None


class Stack:
    """One part of a model that walks one set of tokens.

    Args:
        names: names of its forward's parameters, in order.
        outer: the stack around it, None for the model itself.
        tokens_first: whether some of its layers read [S, N, D].
    """

    def __init__(
        self,
        names: tuple[str, ...] = (),
        outer: Stack | None = None,
        *,
        tokens_first: bool = False,
    ) -> None:
        self.names, self.outer, self.tokens_first = names, outer, tokens_first
        self.has_sides = "decoder_input_ids" in names  # an encoder and a decoder
        self.takes_tasks = False
        self.warnings: set[str] = set()
        self._forget()

    def _forget(self) -> None:
        self.local = _Local()
        # in place of local.batch and local.outside, which cannot be set while tracing
        self.traced: Batch | None = None
        self.outside = Batch(is_outside=True, walks_tokens=True)
        self.waiting: deque[weakref.ref[Batch]] = deque(maxlen=REMEMBERED)
        # block -> the child that it calls first
        self.first: dict[str, weakref.ref[nn.Module]] = {}
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
        if torch.compiler.is_compiling():
            return self.outside if batch is None else batch
        task, again = torch._C._current_graph_task_id(), self.local.again
        if batch is not None and batch.task == task:
            return batch
        if again is not None and again[:2] == (task, block):
            first_run = again[2]()
            if first_run is not None:
                return first_run
        if self.local.outside is None:
            self.local.outside = Batch(is_outside=True, walks_tokens=True)
        return self.local.outside

    def ongoing(self) -> Batch | None:
        """Return the batch of the call at hand; drop those of calls that Ctrl-C ended.

        Python calls no forward hook after an exception such as KeyboardInterrupt.
        """
        if torch.compiler.is_compiling():
            return self.current()
        batch = self.local.batch
        while batch is not None and not _goes_on(batch.frame):
            batch = batch.before
        self.local.batch = batch
        return batch

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
        outer = None if self.outer is None else self.outer.ongoing()
        batch = read_batch(given, args, outer, encoder_decoder=self.has_sides)
        batch.walks_tokens = bool(SPEAKING & set(self.names))
        batch.tokens_first = self.tokens_first
        batch.before = self.ongoing()
        if not torch.compiler.is_compiling():
            batch.task, batch.frame = torch._C._current_graph_task_id(), sys._getframe(1)
            if not may_hold_packs(batch.cache):
                batch.cache = None
            elif begins_generation(batch):  # one cache can serve several; weights may change
                self.packs.pop(batch.cache, None)
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
        batch.before = batch.frame = None
        outer = None if self.outer is None else self.outer.current()
        if outer is not None and outer.is_decoders and batch.encoder is None:
            states = next((tensor for tensor in _tensors(output) if tensor.dim() == 3), None)
            outer.encoder = None if states is None else (states, batch)
        if torch.compiler.is_compiling() or is_transformed() or not batch.calls:
            return
        for tensor in _tensors(output):
            if tensor.grad_fn is not None:  # its backward pass may run blocks again
                metadata: Any = tensor.grad_fn.metadata
                metadata[f"rotmole {id(self)}"] = batch
        self.waiting.append(weakref.ref(batch))

    def note(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of a block: remember its arguments, which checkpointing keeps alive."""
        if torch.compiler.is_compiling() or not block.training or self.local.batch is None:
            return
        if is_transformed():  # its tensors have no storage to be known by
            return
        for storage in _storages((args, kwargs)):
            self.local.batch.calls[storage.cdata] = storage

    def recognise(self, block: str, child: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of a block's children: is this the second run of a block, and whose?

        A checkpointed block runs its forward again with the arguments of the first time. Hooks on
        the block itself may not run then, those on its children do. The child that the block calls
        first tells which call of the block it is, by an argument that it passes on. Later children
        cannot: they are called with new tensors, which may lie where those of another call lay.
        """
        if torch.compiler.is_compiling() or is_transformed() or not child.training:
            return
        task, again = torch._C._current_graph_task_id(), self.local.again
        if self.local.batch is not None and self.local.batch.task == task:
            self.first.setdefault(block, weakref.ref(child))
            return
        if task == -1:
            return
        goes_on = again is not None and again[:2] == (task, block)
        begins = block in self.first and self.first[block]() is child
        if goes_on and not begins:
            return
        storages = {storage.cdata for storage in _storages((args, kwargs))}
        waiting = [batch for batch in (ref() for ref in self.waiting) if batch is not None]
        common = [len(storages & batch.calls.keys()) for batch in waiting]
        most = max(common, default=0)
        if most and common.count(most) == 1:
            self.local.again = (task, block, weakref.ref(waiting[common.index(most)]))
        elif begins or not goes_on:  # of no known call, or of one of several
            self.local.again = None


def _goes_on(frame: FrameType | None) -> bool:
    """Whether a call still runs in this thread."""
    outer: FrameType | None = sys._getframe(1)
    while outer is not None and outer is not frame:
        outer = outer.f_back
    return outer is not None


def may_hold_packs(cache: Any) -> bool:
    """Tell whether packs can be found by a cache and die with it: no tuples, no lists.

    A static cache cannot tell whether it is empty without waiting for the device.
    """
    kind = type(cache)
    if cache is None or kind.__weakrefoffset__ == 0 or kind.__hash__ is None:
        return False
    return not any(isinstance(layer, StaticLayer) for layer in _layers(cache))


def begins_generation(batch: Batch) -> bool:
    """Tell whether a call writes the first tokens into its cache, or several at once."""
    if batch.shape is not None and batch.shape[1] > 1:
        return True
    first = next((layer for layer in _layers(batch.cache) if hasattr(layer, "keys")), None)
    if first is None:
        return False
    return not first.is_initialized or first.keys.shape[-2] == 0  # never filled, or cropped to 0


def _layers(cache: Any) -> Sequence[Any]:
    layers: Sequence[Any] = getattr(getattr(cache, "self_attention_cache", cache), "layers", ())
    return layers


def _storages(value: Any) -> list[StorageWeakRef]:
    storages = (tensor.untyped_storage() for tensor in _tensors(value))
    return [StorageWeakRef(storage) for storage in storages]  # type: ignore[no-untyped-call] # torch's


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
            if path in self.stacks:
                continue
            # an encoder's output may be read outside of it, by layers between it and the decoder
            around = self.stacks.get(path.rpartition(".")[0])
            is_side = (
                isinstance(module, PreTrainedModel) and around is not None and around.has_sides
            )
            if not is_side and not any(_lies_in(name, path) for name in paths):
                continue
            names = tuple(inspect.signature(module.forward).parameters)
            in_list = path.startswith(tuple(lists))  # a layer of a stack, not a stack
            if path and not _is_stack(module, names, in_list):
                continue
            outer = None if path == "" else self.of(path.rpartition(".")[0])
            kind = getattr(getattr(module, "config", None), "model_type", None)
            first = kind in TOKENS_FIRST or (outer is not None and outer.tokens_first)
            stack = self.stacks[path] = Stack(names, outer, tokens_first=first)
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
            module, stack = model.get_submodule(block), self.of(block)
            self.handles.append(module.register_forward_pre_hook(stack.note, with_kwargs=True))
            recognise = partial(stack.recognise, block)
            for child in _called_children(module):
                self.handles.append(child.register_forward_pre_hook(recognise, with_kwargs=True))

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


def _called_children(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the children that a module can call: a list of modules is none, its members are."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _called_children(child)
        else:
            yield child


def _lies_in(path: str, part: str) -> bool:
    return part == "" or path.startswith(f"{part}.")


def _is_stack(module: nn.Module, names: tuple[str, ...], in_list: bool) -> bool:
    """Whether a module walks a set of tokens of its own: a model, or the holder of its layers."""
    if isinstance(module, PreTrainedModel):
        return True
    holds_layers = any(isinstance(child, nn.ModuleList) for child in module.children())
    return holds_layers and not in_list and bool(SPEAKING & set(names))
