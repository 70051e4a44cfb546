"""Would q, k and v gain from sharing the products that read their common input?

    python benchmarks/sharing.py [--quick] [--csv FILE]

The adapters of q, k and v read the same x. Three layers make three products with it and return
three gradients; sharing would make one product instead of three. This script times both ways with
the sizes of an attention block of SmolLM2-135M (576 to 576, 192 and 192; 4 x 128 tokens, x in the
model's type, float32 adapters), and a whole training step of a model of such blocks. The difference
as a share of the step is the most that sharing could save.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import (
    SHAPES,
    Row,
    alternate,
    finish,
    model_type,
    parser,
    ratio,
    run,
    show,
    spread,
    start,
)
from cost import Layer
from step import TARGETS, pair, smollm2, stepper
from torch import Tensor

BLOCKS = 2  # of the model whose step is timed
READERS = 3  # q, k and v


def separate(x_TD: Tensor, rows: list[Tensor], grads: list[Tensor]) -> Callable[[], Tensor]:
    """Return the products with x, forward and backward, of layers each by itself."""

    def products() -> Tensor:
        for rows_ND in rows:
            rows_ND @ x_TD.to(rows_ND.dtype).mT
        total = None
        for rows_ND, grad_NT in zip(rows, grads, strict=True):
            dx_TD = (grad_NT.mT @ rows_ND).to(x_TD.dtype)
            total = dx_TD if total is None else total + dx_TD
            grad_NT @ x_TD.to(rows_ND.dtype)
        assert total is not None
        return total

    return products


def shared(x_TD: Tensor, rows: list[Tensor], grads: list[Tensor]) -> Callable[[], Tensor]:
    """Return the same as one product each; rows and gradients are laid together first."""

    def products() -> Tensor:
        return separate(x_TD, [torch.cat(rows)], [torch.cat(grads)])()

    return products


def main() -> int:
    """Measure the small and the large mixture in mode tangent."""
    given = parser(__doc__).parse_args()
    start(given)
    base = smollm2(quick=True)
    width, tokens = base.config.hidden_size, 4 * 128
    rows_out = []
    for E, R, K in SHAPES[:1] if given.quick else SHAPES[::2]:
        count = Layer(tokens, width, width, E, K, R, "tangent").rows_in
        x_TD = torch.randn(tokens, width).to(base.dtype)
        rows = [torch.randn(count, width) for _ in range(READERS)]
        grads = [torch.randn(count, tokens) for _ in range(READERS)]
        ours, _ = pair(base, "tangent", (E, R, K), TARGETS["q,k,v,o"])
        steps = {
            "separate": separate(x_TD, rows, grads),
            "shared": shared(x_TD, rows, grads),
            "step": stepper(ours, (4, 128)),
        }
        times = alternate(steps, given.rounds)
        case = f"q,k,v 4 x 128 {model_type()} E={E} R={R} K={K}"
        row = ("sharing", case, "tangent")
        found = ratio(times, "shared", "separate")
        rows_out.append(show(Row(*row, "products with x", "three layers apart", **found)))
        saved = [
            BLOCKS * (apart - once) / step
            for apart, once, step in zip(*(times[name] for name in steps), strict=True)
        ]
        value, low, high = spread(saved)
        measure = "share of a step that sharing saves"
        rows_out.append(show(Row(*row, measure, "", value, low, high, "of 1", rounds=given.rounds)))
    return finish(rows_out, given)


if __name__ == "__main__":
    run(main)
