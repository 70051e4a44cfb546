"""The whole method again, as slow loops: read method.py first.

Nothing here shares a function with the fast side, and neither side imports the other.
"""

from rotmole.ops.reference.method import (
    Routing,
    load_balance_loss,
    mixture,
    rotated,
    route,
    router_z_loss,
)

__all__ = [
    "Routing",
    "load_balance_loss",
    "mixture",
    "rotated",
    "route",
    "router_z_loss",
]
