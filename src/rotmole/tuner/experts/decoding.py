"""Cached decoding: packed weights that are never stale, and layers that read one input together.

At one token a layer's time is the number of its operations. So weights are packed
(rotmole.ops.mixture.packed), and layers that read the very same tensor, as q, k and v do, share all
steps but the last: the first of them computes for the others too. Which layers those are is seen, not
configured: a layer that is called with the tensor of the call before joins the first one's group,
and one that fails to come is dropped from it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rotmole.ops.mixture.packed import LayerWeights, Pack, finish, pack, packed_activations
from rotmole.ops.mixture.passes import Settings

if TYPE_CHECKING:
    from rotmole.tuner.experts.experts import Experts

FEW_TOKENS = 64  # rows up to which packing pays: a layer's time is the number of its operations


class PackCache:
    """The packed weights of one layer and its followers, made again whenever one may have changed.

    Weights change in training, which is between a call of train() and one of eval(): both forget
    the pack, and so does a forward pass that could train. Versions and addresses of the weights
    show loading and moving besides; fused optimizers change weights without a new version, and so
    does who writes through `.data`, who must call eval() afterwards.

    Attributes:
        pack: of this layer, then of its followers; None before the first use.
        followers: layers that read what this one reads, right after it.
        count: how often this was cleared; a leader's pack holds its followers' weights too.
        trains: whether a forward pass that can train came since the last train() or eval().
        fits: whether the layer is of a kind that can be packed; None before it was asked.
        settings: of the layer, by type of the products.
    """

    def __init__(self) -> None:
        self.count = 0
        self.clear()

    def clear(self) -> None:
        """Forget the pack and who follows."""
        self.count += 1
        self._forget()

    def _forget(self) -> None:
        self.key: tuple[object, ...] | None = None
        self.pack: Pack | None = None
        self.followers: list[Experts] = []
        self.trains = False
        self.fits: bool | None = None
        self.settings: dict[torch.dtype, Settings] = {}

    def note_training(self) -> None:
        """A forward pass can train the weights: make no pack until train() or eval() is called."""
        self._forget()  # no count, which would change in compiled steps: trains says it all
        self.trains = True

    def __reduce__(self) -> tuple[type[PackCache], tuple[()]]:
        """Copies and pickles start empty."""
        return PackCache, ()

    def of(self, layers: Sequence[Experts], dtype: torch.dtype) -> Pack:
        """Return the pack of layers, of which this one is the first, as they are now.

        A weight's version grows with every change in place (training, loading), its address
        changes where it is replaced (moving, casting).
        """
        weights = [  # parameters() takes longer than the pack saves
            weight
            for layer in layers
            for weight in layer._parameters.values()
            if weight is not None
        ]
        counts = [layer.packs.count for layer in layers]
        key = (dtype, *counts, *[w.data_ptr() for w in weights], *[w._version for w in weights])
        found = self.pack
        if found is None or key != self.key:  # a local one: another thread may forget it meanwhile
            found = pack([_weights(layer) for layer in layers], dtype)
            self.key, self.pack = key, found
        return found


def _weights(layer: Experts) -> LayerWeights:
    return LayerWeights(layer.expert_A, layer.expert_B, layer.gates(), layer.router_weight)


class _Read(NamedTuple):
    """One input, who read it first and what is computed already.

    Attributes:
        x, version: the tensor, weakly, and its version.
        settings: of the first reader; others share its work where theirs are equal.
        leader: the first reader.
        ahead: follower -> (activations, its B), taken away by the follower's call.
    """

    x: weakref.ref[Tensor]
    version: int
    settings: Settings
    leader: Experts
    ahead: dict[Experts, tuple[Tensor, Tensor]]

    def is_of(self, x: Tensor, settings: Settings) -> bool:
        """Whether this is what was read before, unchanged since, with equal settings."""
        return self.x() is x and self.version == x._version and self.settings == settings


@dataclass(eq=False)
class SharedReads:
    """What the layers of one module know of the input read last."""

    last: _Read | None = None

    def __reduce__(self) -> tuple[type[SharedReads], tuple[()]]:
        """Copies and pickles start empty."""
        return SharedReads, ()


class Decoding(NamedTuple):
    """One new token a row.

    Attributes:
        x: [N, 1, D] the layer's input as the model gave it.
        shared: of the layer's siblings.
    """

    x: Tensor
    shared: SharedReads


def may_pack(layer: Experts, x_TD: Tensor) -> bool:
    """Whether packing pays, the layer's weights stand still, and a change would be seen."""
    if x_TD.shape[0] > FEW_TOKENS or torch.is_grad_enabled():
        return False
    moves = layer.training or layer.packs.trains or torch.compiler.is_compiling()
    # weights made in inference mode have no version by which to see a change
    return not (moves or layer.expert_A.is_inference())


def decoded(
    layer: Experts, x_TD: Tensor, settings: Settings, now: Decoding, base_TO: Tensor | None
) -> Tensor:
    """Return what a layer adds to W x, or their sum, by packed weights; may_pack must hold.

    Args:
        layer: the adapter's parameters, whose scaling gate is plain.
        x_TD: [T, D] now.x without its middle axis.
        settings: of the layer.
        now: input and siblings.
        base_TO: [T, O] W x; None leaves it out.

    Returns:
        [T, O], as packed_mixture.
    """
    if now.x.is_inference():  # has no version: a change between two readers would not be seen
        (only,) = _activations([layer], x_TD, settings)
        return finish(settings, *only, base_TO)
    last = now.shared.last
    if last is not None and layer is not last.leader and last.is_of(now.x, settings):
        found = last.ahead.pop(layer, None)
        if found is None:  # it reads the same and is not known yet
            _follow(last.leader, layer)
            (found,) = _activations([layer], x_TD, settings)
        return finish(settings, *found, base_TO)
    if last is not None and last.ahead:  # those did not come
        followers = last.leader.packs.followers
        last.leader.packs.followers = [one for one in followers if one not in last.ahead]
    layers = [layer, *[one for one in layer.packs.followers if _fits(one, layer, x_TD)]]
    own, *others = _activations(layers, x_TD, settings)
    ahead = dict(zip(layers[1:], others, strict=True))
    for follower in ahead:
        follower.packs.pack = None  # a second copy of its weights
    now.shared.last = _Read(weakref.ref(now.x), now.x._version, settings, layer, ahead)
    return finish(settings, *own, base_TO)


def _activations(
    layers: Sequence[Experts], x_TD: Tensor, settings: Settings
) -> list[tuple[Tensor, Tensor]]:
    """Return the layers' activations and what they are multiplied with."""
    packed = layers[0].packs.of(layers, settings.dtype)
    return list(zip(packed_activations(settings, x_TD, packed), packed.B_NO, strict=True))


def _fits(layer: Experts, leader: Experts, x_TD: Tensor) -> bool:
    """Whether the leader may compute for a layer now, out of that layer's own call.

    Until their own call, weights can lie elsewhere (offloaded) or in parts (sharded).
    """
    ours, theirs = leader.expert_A, layer.expert_A
    here = theirs.device == x_TD.device and type(theirs) is type(ours)
    return here and theirs.shape == ours.shape and may_pack(layer, x_TD)


def _follow(leader: Experts, layer: Experts) -> None:
    """Let the leader compute for a layer too, where their weights fit together."""
    if layer not in leader.packs.followers and _shapes(layer) == _shapes(leader):
        leader.packs.followers.append(layer)


def _shapes(layer: Experts) -> list[tuple[int, torch.Size]]:
    """What is laid together; E besides, which A does not say where it is shared."""
    weights = [layer.expert_A, layer.router_weight, *layer.gates().values()]
    return [(layer.num_experts, weight.shape) for weight in weights]
