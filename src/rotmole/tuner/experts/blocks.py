"""Block routing: one router for a feed-forward block, whose experts are whole blocks (MixLoRA).

    y = sum_{e in S(x)} g_e(x) FFN_e(x);   FFN_e(x) = down_e(act(gate_e x) * up_e x)
    layer_e(v) = W v + s R_e(v)[A_e drop(v)] B_e        each layer with experts of its own

The block's own forward pass is used as it is. Its inner layers return one more leading axis, the K
slots of a token; activation and product act elementwise on it; the outer layer takes it away
again. So nothing is written by hand for a class of models: a block is any module whose linear
layers are one or two from width D to F (or one to 2F, gate and up in one) and one from F to D.

Cost beside the same block with plain layers, a token: K slots of width F where there was one (three
tensors of that size are kept for the backward pass: gate, up and their product), and K E R numbers
for each inner layer. With selection dense or top_p, K is E. The base layers run once, not K times.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from rotmole.errors import ConfigError, ModelError
from rotmole.ops.mixture.block import slot_additions, slot_experts, slot_mean, weigh_slots
from rotmole.ops.mixture.dense import rotated
from rotmole.ops.routing.route import route
from rotmole.ops.routing.selection import Routed, Routing
from rotmole.ops.spec import NO_TOKENS, Spec, Tokens, Weights
from rotmole.tuner.batch.batch import Batch
from rotmole.tuner.targets import linear_widths

if TYPE_CHECKING:
    from rotmole.tuner.settings.settings import Settings


@dataclass(frozen=True)
class BlockPart:
    """What one layer is in its block, for one adapter.

    Attributes:
        block: number of the block; its layers share it.
        outer: whether the layer writes the block's output; the others read its input.
        leads: whether it is the first, which has the router.
    """

    block: int
    outer: bool
    leads: bool


class BlockPass(NamedTuple):
    """What the layers of one block share in one forward pass, from the first to the last.

    Attributes:
        routing: of the block's input.
        expert_TK: [T, K] which expert sits in each slot.
        lead: the block input's shape but for its width.
    """

    routing: Routing
    expert_TK: Tensor
    lead: tuple[int, ...]


@dataclass
class BlockCall:
    """One call of a layer of a block-routed block.

    Attributes:
        part: what the layer is in its block.
        batch: at hand; it holds the block's pass until the outer layer has run.
        x: the layer's input.
    """

    part: BlockPart
    batch: Batch
    x: Tensor

    def shared(self) -> BlockPass:
        """Return the pass that the block's first layer began."""
        block_pass: BlockPass | None = self.batch.blocks.get(self.part.block)
        if block_pass is None:
            raise ModelError(
                "a layer of a block-routed feed-forward block was called before the block's first "
                "layer, or outside its block; such a block cannot have router_scope 'block'"
            )
        return block_pass

    def read(self) -> Tensor:
        """Return what the base layer reads: for the outer layer the weighted sum of the slots."""
        if not self.part.outer:
            return self.x
        routing, expert_TK, lead = self.shared()
        self._check((expert_TK.shape[1], *lead))
        slots = self.x.reshape(self.x.shape[0], -1, self.x.shape[-1])
        return slot_mean(slots, routing.weight_TE, expert_TK).reshape(*self.x.shape[1:])

    def lead(self) -> tuple[int, ...]:
        """Return the shape of the layer's addition but for its width."""
        if self.part.outer:
            return tuple(self.x.shape[1:-1])
        expert_TK = self.shared().expert_TK
        return (expert_TK.shape[1], *self.x.shape[:-1])

    def _check(self, lead: tuple[int, ...]) -> None:
        if tuple(self.x.shape[:-1]) != lead:
            raise ModelError(
                f"a layer of a block-routed feed-forward block got an input of shape "
                f"{tuple(self.x.shape)}, but its block's wiring asks for "
                f"{(*lead, self.x.shape[-1])}; such a block cannot have router_scope 'block'"
            )

    def add(
        self,
        spec: Spec,
        weights: Weights,
        x_TD: Tensor,
        dropped_TD: Tensor,
        tokens: Tokens = NO_TOKENS,
        *,
        training: bool = False,
    ) -> tuple[Tensor, Routed | None]:
        """Return the layer's addition, [K, T, O] or for the outer layer [T, O].

        Args:
            spec, weights: of the layer.
            x_TD: [T, D] the layer's input; the outer layer's is [K T, D], slot by slot.
            dropped_TD: the same after dropout.
            tokens: what the router knows of the tokens.
            training: whether the router's input is jittered.
        """
        routed = None
        if self.part.leads:
            logits_TE, routing = route(spec, x_TD, weights, tokens=tokens, training=training)
            routed = Routed(logits_TE, routing)
            slots = spec.top_k if spec.selection == "top_k" else spec.num_experts
            expert_TK = slot_experts(routing.selected_TE, slots)
            lead = tuple(self.x.shape[:-1])
            self.batch.blocks[self.part.block] = BlockPass(routing, expert_TK, lead)
        routing, expert_TK, lead = self.shared()
        if not self.part.outer:
            self._check(lead)
        _, turned = rotated(spec, x_TD, dropped_TD, weights)
        if not self.part.outer:
            return slot_additions(turned, expert_TK, weights.B_ERO, scale=spec.scale), routed
        del self.batch.blocks[self.part.block]  # the block ends here; keep no graph alive
        tokens_T, slots = expert_TK.shape
        turned = turned.reshape(slots, tokens_T, *turned.shape[1:])
        weight_TE, scale = routing.weight_TE, spec.scale
        return weigh_slots(turned, weight_TE, expert_TK, weights.B_ERO, scale=scale), None


def find_block(module: nn.Module) -> tuple[list[str], str] | None:
    """Tell whether a module is a feed-forward block, from the widths of its linear layers.

    Args:
        module: any module of the base model; its layers may be adapted already.

    Returns:
        (names of the inner layers in their order, name of the outer layer), or None.
    """
    linear: dict[str, tuple[int, int]] = {}
    for name, child in module.named_children():
        widths = linear_widths(child)
        if widths is not None:
            linear[name] = widths
        elif any(linear_widths(part) is not None for part in child.modules()):
            return None  # linear layers further down: more than one block
    if len(linear) not in (2, 3):
        return None
    for outer, (hidden, width) in reversed(linear.items()):  # of two layers the later writes
        inner = [name for name in linear if name != outer]
        outs = {linear[name][1] for name in inner}
        fits = outs == {hidden} or (len(inner) == 1 and outs == {2 * hidden})
        if fits and hidden != width and all(linear[name][0] == width for name in inner):
            return inner, outer
    return None


def block_part(parent: nn.Module, name: str) -> BlockPart | None:
    """Return what a layer is in its block, None if it is in none.

    Args:
        parent: the module that holds the layer.
        name: the layer's name in it.
    """
    names = find_block(parent)
    if names is None:
        return None
    inner, outer = names
    return BlockPart(id(parent), outer=name == outer, leads=name == inner[0])


def plain_outside(settings: Settings, module: Settings, name: str) -> Settings:
    """Give a module outside of all blocks one expert, unless num_experts_pattern names it.

    Args:
        settings: the adapter's.
        module: the module's, all patterns applied.
        name: path of the module.
    """
    pattern = settings.num_experts_pattern
    if isinstance(pattern, dict) and get_pattern_key(list(pattern), name) in pattern:
        return module
    return replace(module, num_experts=1, top_k=1)


def check_blocks(model: nn.Module, adapter_name: str) -> None:
    """Refuse an adapter whose blocks are not whole.

    Args:
        model: the base model with the adapter's layers.
        adapter_name: its name.

    Raises:
        ConfigError: no block at all, a block of which a layer is no target, or one whose layers
            differ in their number of experts.
    """
    whole = 0
    for path, module in model.named_modules():
        block = find_block(module)
        if block is None:
            continue
        names = [*block[0], block[1]]
        layers = [getattr(module, name) for name in names]
        parts = [getattr(layer, "rotmole_blocks", {}).get(adapter_name) for layer in layers]
        if not any(parts):
            continue
        missing = [name for name, part in zip(names, parts, strict=True) if part is None]
        if missing:
            raise ConfigError(
                "router_scope is 'block', which adapts a feed-forward block as a whole, but "
                f"{', '.join(missing)} of {path!r} has no experts; add it to target_modules "
                "(and check num_experts_pattern)"
            )
        counts = {layer.experts(adapter_name).spec.num_experts for layer in layers}
        if len(counts) > 1:
            raise ConfigError(
                f"router_scope is 'block', but the layers of {path!r} have {sorted(counts)} "
                "experts by num_experts_pattern; one router chooses for all of them"
            )
        whole += 1
    if not whole:
        raise ConfigError(
            "router_scope is 'block', but target_modules hold no feed-forward block (a module with "
            "one or two linear layers from width D to F and one from F to D); add gate_proj, "
            "up_proj and down_proj, or whatever the model calls them"
        )
