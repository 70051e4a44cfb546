"""How much faster and smaller than other mixtures of LoRA experts? One layer, forward and backward.

    python benchmarks/peers.py [--originals DIR] [--quick] [--csv FILE]

Their files are read unmodified from checkouts at the commits that originals.py names (DIR/AdaMoLE,
DIR/GOAT-PEFT, DIR/HydraLoRA, DIR/MoELoRA_Riemannian); a missing one is skipped with a message.
PEFT's Arrow needs no checkout. Number of experts, rank, selected experts, weights and inputs equal
ours. Outputs are compared first, and a difference ends the run. AdaMoLE selects by a threshold,
HydraLoRA uses every expert and Arrow scores in another way, so their outputs are compared with what
our layer computes from their expert weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import originals
import torch
from common import (
    SHAPES,
    Row,
    adapter_config,
    alternate,
    finish,
    parser,
    ratio,
    run,
    saved_mib,
    show,
    start,
)
from peft import get_peft_model
from torch import Tensor, nn

from rotmole.ops import mixture

MODES = ("none", "tangent")


@dataclass(frozen=True)
class Peer:
    """One other system.

    Attributes:
        make: (our experts, base layer) -> its layer.
        weights: (its layer, x) -> [T, E], where its routing is not one of ours.
        selection: ours for the same equation.
    """

    make: Callable[[Any, nn.Linear], nn.Module]
    weights: Callable[[Any, Tensor], Tensor] | None = None
    selection: str = "top_k"


def peers(folder: Path | None) -> dict[str, Peer]:
    """Return the systems at hand, by name."""
    found = {"PEFT Arrow": Peer(originals.Arrow, originals.arrow_weights)}
    table = {
        "AdaMoLE": ("AdaMoLE", Peer(originals.adamole, originals.adamole_weights)),
        "GOAT": ("GOAT-PEFT", Peer(originals.goat)),
        "HydraLoRA": ("HydraLoRA", Peer(originals.hydralora, selection="dense")),
        "Riemannian MoE-LoRA": ("MoELoRA_Riemannian", Peer(originals.riemannian)),
    }
    for name, (repository, peer) in table.items():
        path = originals.checkout(folder, repository)
        if path is not None:
            make = partial(peer.make, path)
            found[name] = Peer(make, peer.weights, peer.selection)
    return found


class Bench:
    """Layers of one shape around equal base layers, and steps of them on one x."""

    def __init__(self, widths: tuple[int, int, int], shape: tuple[int, int, int]) -> None:
        tokens, inputs, outputs = widths
        self.shape = shape
        self.case = f"T={tokens} D={inputs} O={outputs} E={shape[0]} R={shape[1]} K={shape[2]}"
        self.weight = torch.randn(outputs, inputs) / inputs**0.5
        self.x = torch.randn(4, tokens // 4, inputs, requires_grad=True)
        self.dy = torch.randn(4, tokens // 4, outputs)

    def base(self) -> nn.Linear:
        layer = nn.Linear(self.weight.shape[1], self.weight.shape[0], bias=False)
        layer.weight = nn.Parameter(self.weight, requires_grad=False)
        return layer

    def ours(self, mode: str, selection: str) -> nn.Module:
        config = adapter_config(mode, self.shape, ["0"], selection=selection)
        return get_peft_model(nn.Sequential(self.base()), config).base_model.model[0]

    def step(self, layer: nn.Module) -> Callable[[], None]:
        def forward_and_backward() -> None:
            layer(self.x).backward(self.dy)
            layer.zero_grad()
            self.x.grad = None

        return forward_and_backward

    def kept(self, layer: nn.Module) -> float:
        return saved_mib(lambda: layer(self.x), exclude=(layer, self.x))


@torch.no_grad()
def difference(bench: Bench, peer: Peer, ours: Any, theirs: nn.Module) -> float:
    """Return the largest relative difference of outputs, ours in mode none."""
    wanted = theirs(bench.x)
    found = ours(bench.x)
    if peer.weights is not None:
        experts, x_TD = ours.experts("default"), bench.x.flatten(0, 1)
        weight_TE, spec = peer.weights(theirs, x_TD), experts.spec
        more = mixture(spec, x_TD, x_TD, experts.weights(), weight_TE)
        found = ours.base_layer(bench.x) + more.view_as(found)
    return float((found - wanted).abs().max() / wanted.abs().max())


def compare(
    bench: Bench, name: str, peer: Peer, rounds: int, modes: tuple[str, ...] = MODES
) -> list[Row]:
    """Compare outputs, then time and memory, of one peer with ours in some modes, none first."""
    layers = {mode: bench.ours(mode, peer.selection) for mode in modes}
    theirs = peer.make(layers["none"].experts("default"), bench.base())
    apart = difference(bench, peer, layers["none"], theirs)
    print(f"{name}: outputs differ by {apart:.1e} of the largest; {bench.case}")
    if not apart < 1e-4:
        raise SystemExit(f"{name}: outputs do not agree, so times mean nothing")
    steps = {"base": bench.step(bench.base()), name: bench.step(theirs)}
    steps |= {mode: bench.step(layer) for mode, layer in layers.items()}
    times = alternate(steps, rounds)
    rows = []
    kept = bench.kept(theirs)
    for mode, layer in layers.items():
        row = partial(Row, "peers", bench.case, name)
        rows.append(row("their time with base", f"ours {mode}", **ratio(times, name, mode)))
        less = ratio(times, name, mode, less="base")
        rows.append(row("their adapter path, base subtracted", f"ours {mode}", **less))
        mine = bench.kept(layer)
        sizes = {"ours": kept, "baseline": mine}
        value = kept / mine
        rows.append(row("their saved for backward", f"ours {mode}", value, value, value, **sizes))
    return [show(row) for row in rows]


def main() -> int:
    """Measure every peer at hand with 4 and with 20 experts, and with 8 too if --full."""
    options = parser(__doc__)
    options.add_argument("--originals", type=Path, help="folder of the checkouts")
    given = options.parse_args()
    start(given)
    widths = (64, 32, 48) if given.quick else (1024, 1024, 1024)
    rows: list[Row] = []
    for name, peer in peers(given.originals).items():
        for shape in SHAPES[:1] if given.quick else SHAPES if given.full else SHAPES[::2]:
            modes = MODES if shape != SHAPES[1] else MODES[:1]
            rows += compare(Bench(widths, shape), name, peer, given.rounds, modes)
    return finish(rows, given)


if __name__ == "__main__":
    run(main)
