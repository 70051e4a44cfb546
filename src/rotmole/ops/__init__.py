"""The mathematics: tensors in, tensors out; no modules, no configuration, no state.

reference/method.py states the whole method as slow loops; routing/, rotation/ and mixture/ compute
the same numbers fast. What a layer computes, apart from its tensors, is a Spec; its tensors are
Weights.

Letters in names are axes: T tokens, D inputs, O outputs, E experts, K selected per token, R rank,
P planes, V rows of a vector gate, M rows of an angle gate, N sequences.
"""

from rotmole.ops.mixture.dense import mixture, rotated
from rotmole.ops.rotation.table import ROTATIONS, gate_shapes, is_rotation
from rotmole.ops.routing.balance import load_balance_loss, router_z_loss, usage
from rotmole.ops.routing.route import route
from rotmole.ops.routing.routers import ROUTERS, router_scores, router_shapes
from rotmole.ops.routing.selection import SELECTIONS, Routing, select
from rotmole.ops.spec import Spec, Tokens, Weights

__all__ = [
    "ROTATIONS",
    "ROUTERS",
    "SELECTIONS",
    "Routing",
    "Spec",
    "Tokens",
    "Weights",
    "gate_shapes",
    "is_rotation",
    "load_balance_loss",
    "mixture",
    "rotated",
    "route",
    "router_scores",
    "router_shapes",
    "router_z_loss",
    "select",
    "usage",
]
