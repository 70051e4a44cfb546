"""Operations and bytes of one adapted layer, counted on paper, and the tables made of them.

docs/performance.md explains the counts; targets.py writes the tables there.
T tokens, D in_features, O out_features, E experts, K selected, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from rotmole.ops.compiled import FEW_TOKENS
from rotmole.ops.rotation.table import ROTATIONS

# elementwise operations for each number of z, forward and backward, counted in
# ops/rotation/modes.py and adjoint.py (an inner product is two); the product with the weight and
# its gradient included, work on [E, 1, T] left out
ELEMENTWISE = {"none": (1, 4), "tangent": (12, 27), "plane": (14, 31), "givens": (5, 13)}


@dataclass(frozen=True)
class Layer:
    """Sizes of one adapted layer: T, D, O, E, K, R of the legend."""

    tokens: int
    inputs: int
    outputs: int
    experts: int
    top_k: int
    rank: int
    mode: str = "none"

    @property
    def rows_in(self) -> int:
        """Rows of everything that is multiplied with x: A, router, vector and angle gates."""
        return self.experts * (self.rank + 1 + self._rows("vector") + self._rows("angle"))

    def _rows(self, gate: str) -> int:
        """Rows of an expert's vector or angle gate."""
        row = ROTATIONS[self.mode]
        if gate == "vector":
            return row.vector_rows(self.rank) if row.vector_rows else 0
        return row.angle_rows(self.rank, self.rank // 2) if row.angle_rows else 0

    @property
    def parameters(self) -> int:
        """Trainable numbers: rows_in D + E R O."""
        return self.rows_in * self.inputs + self.experts * self.rank * self.outputs

    @property
    def forward_flops(self) -> int:
        """Multiplications and additions of the products: 2 T for each parameter."""
        return 2 * self.tokens * self.parameters

    @property
    def step_flops(self) -> int:
        """Forward and backward: each product comes back as two, an angle beside a vector as three.

        The latter is not kept but computed again.
        """
        again = self._rows("angle") if self._rows("vector") else 0
        return 3 * self.forward_flops + 2 * self.tokens * self.experts * again * self.inputs

    @property
    def chosen_flops(self) -> int:
        """Forward where only the K chosen experts are computed; the router still scores all E."""
        one = (self.rows_in // self.experts - 1) * self.inputs + self.rank * self.outputs
        return 2 * self.tokens * (self.top_k * one + self.experts * self.inputs)

    @property
    def elementwise(self) -> tuple[int, int]:
        """Elementwise operations, forward and backward; modes not counted are (0, 0)."""
        forward, backward = ELEMENTWISE.get(self.mode, (0, 0))
        numbers = self.tokens * self.experts * self.rank
        return forward * numbers, backward * numbers

    @property
    def saved_bytes(self) -> int:
        """Kept for the backward pass besides x and parameters, of at most 256 experts.

        z and the vectors (where there are none, the angles) in float32, and of each chosen expert
        its weight and one byte for its number; of few tokens all weights.
        """
        gate = self._rows("vector") or self._rows("angle")
        weights = 4 * self.experts if self.tokens <= FEW_TOKENS else 5 * self.top_k
        return self.tokens * (4 * self.experts * (self.rank + gate) + weights)

    @property
    def gate_bytes(self) -> int:
        """Size of z, the gates' values and the experts' weights in float32."""
        return 4 * self.tokens * self.rows_in

    @property
    def forward_bytes(self) -> int:
        """What a forward pass moves at least, half-precision x, y and weights, float32 in between.

        x is read once, the base's y is read and written, parameters are read once, z and the gates
        are written and read once.
        """
        x, y = self.tokens * self.inputs, self.tokens * self.outputs
        return 2 * (x + 2 * y + self.parameters) + 2 * self.gate_bytes

    @property
    def base_flops(self) -> int:
        """Forward of the frozen layer itself."""
        return 2 * self.tokens * self.inputs * self.outputs


# NVIDIA H100 SXM5: dense bfloat16 operations and bytes a second, from NVIDIA's data sheet
GPU_FLOPS, GPU_BYTES = 989e12, 3.35e12
GPU_LAYER = (8192, 4096, 4096)  # T, D, O
SHAPES = ((4, 6, 2), (8, 8, 2), (20, 4, 10))  # E, R, K


def cpu_table() -> str:
    """Return parameters, operations and bytes of every shape and mode at T = D = O = 1024."""
    lines = ["| E, R, K | mode | parameters | forward + backward, GFLOP | elementwise, % of that | "
             "kept for backward, MiB |", "|---|---|---|---|---|---|"]  # fmt: skip
    for E, R, K in SHAPES:
        for mode in ELEMENTWISE:
            layer = Layer(1024, 1024, 1024, E, K, R, mode)
            small = 100 * sum(layer.elementwise) / layer.step_flops
            kept = layer.saved_bytes / 2**20
            cells = (f"{E}, {R}, {K}", mode, layer.parameters, f"{layer.step_flops / 1e9:.2f}",
                     f"{small:.2f}", f"{kept:.2f}")  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def gpu_table() -> str:
    """Return least times on the GPU for T = 8192, D = O = 4096, by operations and by bytes."""
    lines = ["| E, R, K | mode | operations, us | bytes, us | operations a byte | base, us | "
             "adapter / base |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for E, R, K in SHAPES:
        for mode in ("none", "tangent"):
            layer = Layer(*GPU_LAYER, E, K, R, mode)
            compute = 1e6 * layer.forward_flops / GPU_FLOPS
            move = 1e6 * layer.forward_bytes / GPU_BYTES
            base = 1e6 * layer.base_flops / GPU_FLOPS
            cells = (f"{E}, {R}, {K}", mode, f"{compute:.0f}", f"{move:.0f}",
                     f"{layer.forward_flops / layer.forward_bytes:.0f}", f"{base:.0f}",
                     f"{max(compute, move) / base:.2f}")  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
