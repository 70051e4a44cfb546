"""The whole method again, as slow loops: read method.py first.

Nothing here shares a function with the fast side, and neither side imports the other. The table in
tests/ops/reference/test_twins.py names the twin of each public function of the fast side.
"""

from rotmole.ops.reference.balance import load_balance_loss, router_z_loss
from rotmole.ops.reference.method import Routing, mixture, rotated, route

__all__ = [
    "Routing",
    "load_balance_loss",
    "mixture",
    "rotated",
    "route",
    "router_z_loss",
]
