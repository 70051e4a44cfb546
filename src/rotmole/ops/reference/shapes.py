"""Names and shapes of every parameter of the gates, written out mode by mode and router by router.

E experts, R rank, D in_features, O out_features, P planes, H the hidden width of a router, rho the
width of radar's own hidden layer.
"""

from __future__ import annotations

Shapes = dict[str, tuple[int, ...]]


def gate_shapes(
    rotation: str,
    *,
    E: int,
    R: int,
    D: int,
    O: int,  # noqa: E741  the legend's letter for out_features
    rotation_input: str = "x",
    rotation_dim: int | None = None,
    rotation_planes: int | None = None,
    radar_rank: int | None = None,
) -> Shapes:
    """Return name and shape of every parameter of a rotation gate."""
    P = rotation_planes or R // 2
    N = {"x": rotation_dim or D, "z": R, "router": E}[rotation_input]
    down: Shapes = {"rotation_down": (rotation_dim, D)} if rotation_dim else {}
    rho = radar_rank or 8
    pairs: Shapes = {"radar_pair_angle": (E, E)}
    if radar_rank:
        pairs |= {"radar_pair_down": (D, radar_rank), "radar_pair_up": (radar_rank, E * E)}
    shapes: dict[str, Shapes] = {
        "none": {},
        "tangent": down | {"rotation_vector": (E, R, N)},
        "bivector": down | {"rotation_vector": (E, R - 1, N)},
        "plane": down | {"rotation_vector": (E, R, N), "rotation_angle": (E, 1, N)},
        "centroid": down | {"rotation_angle": (E, 1, N), "rotation_center": (E, R)},
        "givens": down | {"rotation_angle": (E, P, N)},
        "cayley": down | {"rotation_angle": (E, R * (R - 1) // 2, N)},
        "bias": down | {"rotation_vector": (E, R, N)},
        "radar": {"radar_down": (2 * O, rho), "radar_up": (rho, O // 2)},
        "radar_pairs": pairs,
        "offset": down | {"rotation_vector": (E, R, N)},
        "scale": down | {"rotation_angle": (E, 1, N)},
        "core": down | {"rotation_angle": (E, R * R, N)},
    }
    return shapes[rotation]


def router_shapes(router: str, *, E: int, D: int, H: int | None = None) -> Shapes:
    """Return name and shape of every parameter of a router.

    H is 16 if it is not given; a linear router has a hidden width only if it is given.
    """
    factored = H is not None
    H = H or 16
    query_and_key: Shapes = {"router_query": (H, D), "router_key": (E, H)}
    linear: Shapes = {"router_weight": (E, D)}
    hidden: Shapes = {"router_hidden": (H, D), "router_weight": (E, H)}
    shapes: dict[str, Shapes] = {
        "linear": hidden if factored else linear,
        "mlp": hidden,
        "mlp_hadamard": hidden | {"router_factor": (H, D)},
        "cosine": query_and_key,
        "attention": query_and_key,
        "hybrid": linear | query_and_key | {"router_mix": (1,)},
        "hash": {},
        "magnitude": {},
    }
    return shapes[router]


def threshold_shapes(D: int) -> Shapes:
    """Return name and shape of the parameters of selection "threshold": w and b of w.x + b."""
    return {"router_threshold_weight": (1, D), "router_threshold_bias": (1,)}


def scaling_gate_shapes(
    router: str, selection: str, *, E: int, D: int, H: int | None = None
) -> Shapes:
    """Return name and shape of every parameter of a scaling gate: its router's and threshold's."""
    shapes = dict(router_shapes(router, E=E, D=D, H=H))
    if selection == "threshold":
        shapes.update(threshold_shapes(D))
    return shapes
