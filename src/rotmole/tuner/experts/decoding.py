"""Cached decoding: weights packed for one generation, and layers that read one input together.

At one token a layer's time is the number of its operations. So weights are packed
(rotmole.ops.mixture.packed), and layers that read the very same tensor, as q, k and v do, share all
steps but the last, by kernels the last too: the first of them computes for the others. The layers
of a group are observed, not configured: a layer that is called with the tensor of the call before
joins the group of that call's first layer, and one that fails to come leaves it.

Packs live as long as one generation: they are kept by its key-value cache, and dropped when the
cache begins another or an adapter is deleted. What the layers of one step share lives in the
step's Batch.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from rotmole.ops.compiled import few
from rotmole.ops.mixture.packed import Addition, Pack, pack, packed_additions
from rotmole.ops.spec import Spec
from rotmole.tuner.batch.batch import Batch
from rotmole.tuner.batch.stack import Stack

if TYPE_CHECKING:
    from rotmole.tuner.experts.experts import Experts


class _Group:
    """The packed weights of one layer and of those that read what it reads, right after it.

    Attributes:
        followers: the other layers.
        awaited: those for which the layer has computed in this step and that did not come yet.
        pack: of the layer, then of its followers; None before the first use.
        key: versions and addresses of the weights that are packed.
    """

    def __init__(self) -> None:
        self.followers: list[Experts] = []
        self.awaited: set[Experts] = set()
        self.packed: tuple[tuple[object, ...], Pack] | None = None

    def pack(self, layers: Sequence[Experts], dtype: torch.dtype) -> Pack:
        """Return the pack of layers as they are now.

        A weight's version grows with every change in place (training, loading), its address
        changes when it is replaced (moving, casting).
        """
        weights = [  # parameters() takes longer than the pack saves
            weight
            for layer in layers
            for weight in layer._parameters.values()
            if weight is not None
        ]
        key = (dtype, *[w.data_ptr() for w in weights], *[w._version for w in weights])
        if self.packed is None or key != self.packed[0]:
            weights_of_layers = [layer.weights() for layer in layers]
            self.packed = key, pack(layers[0].spec, weights_of_layers, dtype)
        return self.packed[1]


class _Read(NamedTuple):
    """One input, the layer that read it first, and what is computed already.

    Attributes:
        x, version: the tensor, weakly, and its version.
        spec, dtype: of the first reader; others share its work if theirs are equal.
        leader, group: the first reader, and its group.
        ahead: follower -> what it adds, taken away by the follower's call.
    """

    x: weakref.ref[Tensor]
    version: int
    spec: Spec
    dtype: torch.dtype
    leader: Experts
    group: _Group
    ahead: dict[Experts, Addition]

    def is_of(self, x: Tensor, spec: Spec, dtype: torch.dtype) -> bool:
        """Whether this is what was read before, unchanged since, with an equal spec."""
        same = self.x() is x and self.version == x._version
        return same and self.dtype == dtype and self.spec == spec

    def take(self, layer: Experts) -> Addition | None:
        """Return what is computed already for a layer that came, for this once."""
        self.group.awaited.discard(layer)
        return self.ahead.pop(layer, None)


class Decoding:
    """One new token a row, in one layer.

    Args:
        x: [N, 1, D] the layer's input as the model gave it.
        batch: at hand, with the key-value cache of the generation.
        stack: of the layer, which holds the packs of every generation.
    """

    def __init__(self, x: Tensor, batch: Batch, stack: Stack) -> None:
        self.x, self.batch, self.stack = x, batch, stack

    def _group(self, layer: Experts) -> _Group:
        groups: dict[Experts, _Group] = self.stack.packs.setdefault(self.batch.cache, {})
        group = groups.get(layer)
        if group is None:
            group = groups[layer] = _Group()
        return group

    def addition(self, layer: Experts, dtype: torch.dtype) -> Addition:
        """Return what a layer adds to W x, by packed weights; may_pack must hold.

        Args:
            layer: the adapter's parameters, with a plain scaling gate.
            dtype: type of the products.
        """
        x, spec = self.x, layer.spec
        if x.is_inference():  # has no version: a change between two readers would not be seen
            return self._compute([layer], dtype)[0]
        last: _Read | None = self.batch.last_read
        if last is not None and layer is not last.leader and last.is_of(x, spec, dtype):
            result = last.take(layer)
            if result is None:  # it reads the same and is not known yet
                if layer not in last.group.followers and _shapes(layer) == _shapes(last.leader):
                    last.group.followers.append(layer)
                return self._compute([layer], dtype)[0]
            return result
        group = self._group(layer)
        if group.awaited:
            group.followers = [one for one in group.followers if one not in group.awaited]
        followers = [one for one in group.followers if _fits(one, layer, x)]
        group.awaited = set(followers)
        first, *others = self._compute([layer, *followers], dtype)
        ahead = dict(zip(followers, others, strict=True))
        for follower in followers:
            self._group(follower).packed = None  # a second copy of its weights
        version = x._version
        self.batch.last_read = _Read(weakref.ref(x), version, spec, dtype, layer, group, ahead)
        return first

    def _compute(self, layers: Sequence[Experts], dtype: torch.dtype) -> list[Addition]:
        packed = self._group(layers[0]).pack(layers, dtype)
        return packed_additions(self.x.reshape(-1, self.x.shape[-1]), packed)


def decoding_of(x: Tensor, batch: Batch, stack: Stack) -> Decoding | None:
    """Return how a layer decodes its input, None if it is no decoding of one new token a row."""
    if x.dim() != 3 or x.shape[1] != 1 or torch.is_grad_enabled() or batch.cache is None:
        return None
    return Decoding(x, batch, stack) if few(x) else None


def may_pack(layer: Experts, dropout: nn.Module) -> bool:
    """Whether a decoding layer's weights stand still, and a change of them would be seen."""
    if layer.training or dropout.training:
        return False
    return not layer.expert_A.is_inference()  # those have no version by which to see a change


def _fits(layer: Experts, leader: Experts, x: Tensor) -> bool:
    """Whether the leader may compute for a layer now, out of that layer's own call.

    Until their own call, weights can lie elsewhere (offloaded) or in parts (sharded).
    """
    ours, theirs = leader.expert_A, layer.expert_A
    here = theirs.device == x.device and type(theirs) is type(ours)
    still = not (layer.training or theirs.is_inference())
    return here and still and theirs.shape == ours.shape


def _shapes(layer: Experts) -> list[tuple[int, torch.Size]]:
    """What is laid together; E besides, which A does not say if it is shared."""
    tensors = []
    for weights in (layer.weights(), layer.weights().shared):
        if weights is not None:
            tensors += [weights.A_ERD, *weights.router.values(), *weights.gates.values()]
    return [(layer.spec.num_experts, tensor.shape) for tensor in tensors]
