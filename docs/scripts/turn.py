"""Draw the README's picture: what a scaling gate and a rotation gate do to an expert's activation.

    python docs/scripts/turn.py [FILE]

z and the q of each token are real: `rotmole.ops` turns z, and the plane span(z, q) is drawn.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from rotmole.ops.rotation.modes import tangent

PICTURE = Path(__file__).parents[1] / "pictures" / "turn.svg"
INK, BLUE, RED = "#444444", "#2b6cb0", "#c05621"
RANK = 8
WEIGHTS = (0.4, 0.7)  # g_e(x) of two tokens
QUERIES = (0.7, 1.6, -1.1)  # how long Q_e x is for three tokens, and its sign


def turned() -> list[tuple[float, float]]:
    """Rotate one z by three q and return each result in the axes (z, part of q across z)."""
    generator = torch.Generator().manual_seed(0)
    z, direction = torch.randn(2, 1, RANK, 1, generator=generator, dtype=torch.float64)
    z = z / z.norm()
    across = direction - (direction * z).sum() * z
    across = across / across.norm()
    points = []
    for length in QUERIES:
        rotated = tangent(z, length * direction / (direction * across).sum())
        assert torch.allclose(rotated.norm(), z.norm())
        points.append((float((rotated * z).sum()), float((rotated * across).sum())))
    return points


def _arrow(axes: Axes, end: tuple[float, float], color: str, width: float = 2.2) -> None:
    style = {"arrowstyle": "-|>", "color": color, "linewidth": width, "mutation_scale": 14}
    style |= {"shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, (0, 0), arrowprops=style)


def _panel(axes: Axes, title: str, formula: str) -> None:
    axes.set_title(f"{title}\n{formula}", fontsize=13, color=INK)
    axes.set_xlim(-0.35, 1.5)
    axes.set_ylim(-1.08, 1.18)
    axes.set_aspect("equal")
    axes.axis("off")
    axes.add_patch(Circle((0, 0), 1, fill=False, color="#bbbbbb", linestyle=(0, (4, 3))))
    _arrow(axes, (1, 0), INK)
    axes.text(1.05, 0, "z", fontsize=15, va="center", color=INK)


def draw(path: Path) -> None:
    """Write the picture as SVG, the same bytes at every call."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _panel(left, "scaling gate", "g(x) z: same direction, other length")
    for number, weight in enumerate(WEIGHTS, 1):
        _arrow(left, (weight, 0), BLUE, 4)
        height = 0.09 if number == 1 else -0.19
        left.text(weight, height, f"token {number}", fontsize=13, ha="right", color=BLUE)
    _panel(right, "rotation gate", "R(x) z: same length, other direction")
    for number, (x, y) in enumerate(turned(), 1):
        _arrow(right, (x, y), RED)
        side = "left" if x > -0.1 else "right"
        right.text(1.07 * x, 1.07 * y, f"token {number}", fontsize=13, ha=side, color=RED)
    settings = {"svg.hashsalt": "turn", "svg.fonttype": "path", "font.family": "DejaVu Sans"}
    with mpl.rc_context(settings):
        figure.savefig(path, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)
