"""Write the table of the gates' parameters in docs/method.md: what each way of reading costs.

python docs/scripts/gate_table.py [--page FILE]
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from rotmole.ops import ROTATIONS, gate_shapes
from rotmole.ops.routing.route import scaling_gate_shapes
from rotmole.ops.spec import Spec

PAGE = Path(__file__).parents[1] / "method.md"
START, END = "<!-- gates -->", "<!-- end of gates -->"
EXPERTS, RANK, DIM = 4, 8, 4
# (layers, [(in, out) of q, k, v, o]) as in the models' config.json
MODELS = {
    "SmolLM2-135M": (30, [(576, 576), (576, 192), (576, 192), (576, 576)]),
    "Llama-3.2-3B": (28, [(3072, 3072), (3072, 1024), (3072, 1024), (3072, 3072)]),
}
WAYS = {
    "x": {},
    f"C x (`rotation_dim: {DIM}`)": {"rotation_dim": DIM},
    "z": {"rotation_input": "z"},
    "the logits": {"rotation_input": "router"},
}
SHOWN = ("tangent", "bivector", "plane", "givens", "bias")


def _count(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _in_all(model: str, count: int | None, rotation: str, way: dict[str, object]) -> int:
    layers, widths = MODELS[model]
    total = 0
    for inputs, outputs in widths:
        sizes = {"E": EXPERTS, "R": RANK, "D": inputs, "O": outputs}
        if rotation in ROTATIONS:
            total += _count(gate_shapes(rotation, **sizes, **way))  # type: ignore[arg-type] # of WAYS
        elif rotation == "A and B":
            total += EXPERTS * RANK * (inputs + outputs)
        else:
            spec = Spec(num_experts=EXPERTS, router_dim=count)
            total += _count(scaling_gate_shapes(spec, inputs))
    return layers * total


def table() -> str:
    """Return the table, in thousands of parameters."""
    lines = [
        "| of all q, k, v and o | " + " | ".join(MODELS) + " |",
        "|---|" + "---|" * len(MODELS),
    ]

    def row(name: str, count: int | None, rotation: str, way: dict[str, object]) -> None:
        cells = [f"{_in_all(model, count, rotation, way) / 1e3:,.1f} k" for model in MODELS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")

    row("A and B, for comparison", None, "A and B", {})
    row("linear router", None, "router", {})
    row(f"linear router, `router_dim: {DIM}`", DIM, "router", {})
    for rotation in SHOWN:
        for name, way in WAYS.items():
            if way.get("rotation_input") != "z" or ROTATIONS[rotation].input_z:
                row(f"`{rotation}`, reads {name}", None, rotation, way)
    return "\n".join(lines)


def page(text: str) -> str:
    """Return the page with the table in its place."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n\n{table()}\n\n{END}{after}"


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, default=PAGE)
    file = parser.parse_args().page
    file.write_text(page(file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
