"""The mathematics: tensors in, tensors out; no modules, no configuration, no state.

reference.py states the whole method as slow loops; routing.py, rotation.py and mixture.py compute
the same numbers fast; balance.py measures how evenly the experts are used.

Letters in names are axes: T tokens, D inputs, O outputs, E experts, K selected per token, R rank,
P planes, V rows of a vector gate, M rows of an angle gate.
"""

from rotmole.ops.mixture.dense import mixture, rotated
from rotmole.ops.rotation.table import ROTATIONS, gate_shapes, is_rotation
from rotmole.ops.routing.balance import load_balance_loss, router_z_loss, usage
from rotmole.ops.routing.plain import Routing, route
from rotmole.ops.routing.routers import ROUTERS, router_scores, router_shapes
from rotmole.ops.routing.selection import SELECTIONS, select

__all__ = [
    "ROTATIONS",
    "ROUTERS",
    "SELECTIONS",
    "Routing",
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
