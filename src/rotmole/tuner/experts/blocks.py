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

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rotmole.errors import ConfigError, ModelError
from rotmole.ops.mixture.block import slot_additions, slot_experts, slot_mean, weigh_slots
from rotmole.ops.mixture.dense import rotated
from rotmole.ops.routing.plain import Routing
from rotmole.tuner.experts.scaling import NO_TOKENS, Tokens

if TYPE_CHECKING:
    from rotmole.tuner.config import RotMoleConfig
    from rotmole.tuner.experts.experts import Experts


@dataclass(eq=False)
class BlockState:
    """What the layers of one block share between its first and its last layer.

    Attributes:
        routing: of the block's input; None outside of a forward pass.
        expert_TK: [T, K] which expert sits in each slot.
        lead: the block input's shape but for its width.
    """

    routing: Routing | None = None
    expert_TK: Tensor | None = None
    lead: tuple[int, ...] = ()

    def now(self) -> tuple[Routing, Tensor]:
        """Return routing and slots of the pass at hand."""
        if self.routing is None or self.expert_TK is None:
            raise ModelError(
                "a layer of a block-routed feed-forward block was called before the block's first "
                "layer, or outside its block; such a block cannot have router_scope 'block'"
            )
        return self.routing, self.expert_TK


@dataclass(eq=False)
class BlockPart:
    """What one layer is in its block, for one adapter.

    Attributes:
        state: shared by the layers of the block.
        outer: whether it writes the block's output; the others read its input.
        leads: whether it is the first, which has the router.
    """

    state: BlockState
    outer: bool
    leads: bool

    def read(self, x: Tensor) -> Tensor:
        """Return what the base layer reads: for the outer layer the weighted sum of the slots."""
        if not self.outer:
            return x
        routing, expert_TK = self.state.now()
        self._check(x, (expert_TK.shape[1], *self.state.lead))
        slots = x.reshape(x.shape[0], -1, x.shape[-1])
        return slot_mean(slots, routing.weight_TE, expert_TK).reshape(*x.shape[1:])

    def lead(self, x: Tensor) -> tuple[int, ...]:
        """Return the shape of the layer's addition to x but for its width."""
        if self.outer:
            return tuple(x.shape[1:-1])
        _, expert_TK = self.state.now()
        return (expert_TK.shape[1], *x.shape[:-1])

    def begin(self, x: Tensor) -> None:
        """Note the shape of the block's input, or check it against the first layer's."""
        if self.leads:
            self.state.lead = tuple(x.shape[:-1])
            return
        self.state.now()
        if not self.outer:
            self._check(x, self.state.lead)

    def _check(self, x: Tensor, lead: tuple[int, ...]) -> None:
        if tuple(x.shape[:-1]) != lead:
            raise ModelError(
                f"a layer of a block-routed feed-forward block got an input of shape "
                f"{tuple(x.shape)}, but its block's wiring asks for {(*lead, x.shape[-1])}; such a "
                "block cannot have router_scope 'block'"
            )

    def add(
        self, experts: Experts, x_TD: Tensor, dropped_TD: Tensor, tokens: Tokens = NO_TOKENS
    ) -> tuple[Tensor, tuple[Tensor, Routing] | None]:
        """Return the layer's addition, [K, T, O] or for the outer layer [T, O], as Experts does.

        Args:
            experts: of the layer.
            x_TD: [T, D] the layer's input; the outer layer's is [K T, D], slot by slot.
            dropped_TD: the same after dropout.
            tokens: what the router knows of the tokens.
        """
        state, routed = self.state, None
        if self.leads:
            routed = experts.route(x_TD, tokens)
            assert routed is not None  # a part has more than one expert
            gate = experts.scaling_gate
            slots = gate.top_k if gate.selection == "top_k" else gate.experts
            state.routing = routed[1]
            state.expert_TK = slot_experts(routed[1].selected_TE, slots)
        routing, expert_TK = state.now()
        A_ERD, B_ERO = experts.expert_A, experts.expert_B
        _, turned = rotated(
            x_TD,
            dropped_TD,
            A_ERD,
            B_ERO,
            experts.gates(),
            rotation=experts.rotation,
            rotation_input=experts.rotation_input,
            rotation_metric=experts.rotation_metric,
        )
        scale = experts.scale
        if not self.outer:
            return slot_additions(turned, expert_TK, B_ERO, scale=scale), routed
        state.routing = state.expert_TK = None  # the block ends here; keep no graph alive
        tokens_T, slots = expert_TK.shape
        turned = turned.reshape(slots, tokens_T, *turned.shape[1:])
        return weigh_slots(turned, routing.weight_TE, expert_TK, B_ERO, scale=scale), None


def _widths(module: nn.Module) -> tuple[int, int] | None:
    """Return (in, out) of a linear layer, adapted or not; None for any other module."""
    layer: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(layer, Conv1D):
        return int(layer.weight.shape[0]), int(layer.weight.shape[1])
    if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
        return int(layer.in_features), int(layer.out_features)
    return None


def find_block(module: nn.Module) -> tuple[list[str], str] | None:
    """Tell whether a module is a feed-forward block, from the widths of its linear layers.

    Args:
        module: any module of the base model; its layers may be adapted already.

    Returns:
        (names of the inner layers in their order, name of the outer layer), or None.
    """
    linear: dict[str, tuple[int, int]] = {}
    for name, child in module.named_children():
        widths = _widths(child)
        if widths is not None:
            linear[name] = widths
        elif any(_widths(part) is not None for part in child.modules()):
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


def block_part(parent: nn.Module, name: str, adapter_name: str) -> BlockPart | None:
    """Return what a layer is in its block, None where it is in none.

    Args:
        parent: the module that holds the layer.
        name: the layer's name in it.
        adapter_name: for which adapter; layers of one block share a state per adapter.
    """
    found = find_block(parent)
    if found is None:
        return None
    inner, outer = found
    parts = [
        getattr(child, "rotmole_blocks", {}).get(adapter_name)
        for child in parent.children()
        if child is not getattr(parent, name)
    ]
    state = next((part.state for part in parts if part is not None), None)
    return BlockPart(state or BlockState(), outer=name == outer, leads=name == inner[0])


def plain_outside(config: RotMoleConfig, own: RotMoleConfig, name: str) -> None:
    """Give a module outside of all blocks one expert, unless num_experts_pattern names it.

    Args:
        config: the adapter's settings.
        own: the module's, which are changed.
        name: path of the module.
    """
    pattern = config.num_experts_pattern
    named = isinstance(pattern, dict) and get_pattern_key(list(pattern), name) in pattern
    if not named:
        own.num_experts = own.top_k = 1


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
        found = find_block(module)
        if found is None:
            continue
        names = [*found[0], found[1]]
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
        counts = {layer.experts(adapter_name).num_experts for layer in layers}
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
