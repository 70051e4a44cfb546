"""Operations and bytes of one adapted layer, counted on paper; docs/performance.md explains them.

T tokens, D in_features, O out_features, E experts, K selected, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from rotmole.ops.rotation import ROTATIONS

# elementwise operations for each number of z, forward and backward, read off ops/modes.py and
# ops/adjoint.py; the weight g, its product and its gradient are among them
ELEMENTWISE = {"none": (1, 4), "tangent": (13, 33), "plane": (18, 46), "givens": (5, 14)}


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
        row = ROTATIONS[self.mode]
        vector = row.vector_rows(self.rank) if row.vector_rows else 0
        angle = row.angle_rows(self.rank, self.rank // 2) if row.angle_rows else 0
        return self.experts * (self.rank + 1 + vector + angle)

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
        """Forward and backward: each product comes back as two."""
        return 3 * self.forward_flops

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
        """Kept for the backward pass besides x and parameters: z, gates and weights, float32."""
        row = ROTATIONS[self.mode]
        rows = self.rank + 1
        rows += row.vector_rows(self.rank) if row.vector_rows else 0
        rows += row.angle_rows(self.rank, self.rank // 2) if row.angle_rows else 0
        return 4 * self.tokens * self.experts * rows
