"""One pass over tokens: what an adapter adds in each layer, and what parts of it change.

Every number is a sum over tokens, so memory does not grow with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rotmole.evaluation.scoring import evaluating
from rotmole.inspection.regression import Sums
from rotmole.inspection.sums import Running, double
from rotmole.tuner.experts.experts import Experts
from rotmole.tuner.experts.ways import Call, Way, altered
from rotmole.tuner.layer import RotMoleLayer

Batch = Mapping[str, Any]
Tick = Callable[[int], None]

MEMORY = 1 << 30
"""Bytes for the sums of a static share."""
ENOUGH = 4
"""Tokens for each number of a layer's input that a linear map is fitted on."""
NO_ROTATION, EVEN = altered(rotates=False), altered(even=True)


class Found(NamedTuple):
    """One adapted layer of a model.

    Attributes:
        layer: with the adapter.
        experts: of the adapter.
        is_block: whether it belongs to a block-routed block.
    """

    layer: RotMoleLayer
    experts: Experts
    is_block: bool

    @property
    def rotates(self) -> bool:
        """Whether any expert is rotated."""
        spec = self.experts.spec
        shared = spec.shared is not None and spec.shared.rotation != "none"
        return shared or spec.rotation != "none"

    @property
    def weighs(self) -> bool:
        """Whether the layer has a router of its own, whose weights can be made equal."""
        return self.experts.has_router and not self.is_block


def adapted_layers(model: Any, adapter: str) -> dict[str, Found]:
    """Return the layers of an adapter by their path in the base model, in the model's order."""
    base = model.get_base_model()
    return {
        path: Found(layer, layer.experts(adapter), adapter in layer.rotmole_blocks)
        for path, layer in base.named_modules()
        if isinstance(layer, RotMoleLayer) and adapter in layer.rotmole_experts
    }


@dataclass
class Power:
    """Sums over tokens of squared lengths.

    Attributes:
        tokens: T.
        output: sum of |W x + y|^2, y being what the adapter adds.
        added: sum of |y|^2.
        rotation_off: sum of |y' - y|^2, y' without rotation.
        uniform: sum of |y' - y|^2, y' with equal weights.
    """

    tokens: int = 0
    output: float = 0.0
    added: float = 0.0
    rotation_off: float = 0.0
    uniform: float = 0.0

    def __add__(self, other: Power) -> Power:
        return Power(*(a + b for a, b in zip(vars(self).values(), vars(other).values(),
                                             strict=True)))  # fmt: skip


class Probes:
    """Sums up what the adapter adds in each layer.

    Layers of block-routed blocks are left out: what their experts add is no function of the layer's
    input alone.

    Args:
        layers: of the adapter.
        tokens: that will be seen of each part, about.
        memory: bytes for sums.

    Attributes:
        running: part of the tokens -> sums for a regression of what is added on what is read.
        power: path -> task -> squared lengths.
    """

    def __init__(
        self, layers: Mapping[str, Found], *, tokens: int, memory: int = MEMORY, parts: int = 2
    ) -> None:
        self.layers = {path: found for path, found in layers.items() if not found.is_block}
        bytes_each = memory / max(8 * parts * len(self.layers), 1)
        width = max(min(tokens // ENOUGH, int(math.sqrt(bytes_each))), 1)
        self.reads, self.writes = {}, {}
        for path, found in self.layers.items():
            reads_MD, writes_MO = _rows(found.experts)
            if reads_MD.shape[1] > width:
                self.reads[path] = _sketch(reads_MD, width)
            if writes_MO is not None:
                self.writes[path] = span(writes_MO)
        self.running: dict[str, Running] = {}
        self.power: dict[str, dict[str, Power]] = {path: {} for path in self.layers}

    @property
    def sketched(self) -> list[str]:
        """Paths of the layers whose input is too wide for the tokens or the memory."""
        return list(self.reads)

    @contextmanager
    def listening(self, task: str, part: str | None, *, effects: bool) -> Iterator[None]:
        """Sum up the forward passes of the block.

        Args:
            task: whose tokens they are, for `power`; ignored without effects.
            part: for `running`; None leaves these sums out.
            effects: whether `power` is wanted.
        """
        running = None
        if part is not None:
            running = self.running.setdefault(part, Running(self.reads, self.writes))
        with ExitStack() as stack:
            for path, found in self.layers.items():
                hook = self._hook(path, found, task, running, effects=effects)
                stack.callback(found.experts.register_forward_hook(hook).remove)
            yield

    def _hook(
        self, path: str, found: Found, task: str, running: Running | None, *, effects: bool
    ) -> Any:
        def hook(module: Experts, arguments: tuple[Any, ...], _: Any) -> None:
            add, ways, call = arguments
            bare: Call = call._replace(base_TO=None)
            # again without W x, from which a sum in a half type could not be told apart
            added_TO, _ = module.forward(add, ways, bare)
            if running is not None:
                running.add(path, call.x, call.x_TD, added_TO)
            if not effects:
                return
            y_TO = double(added_TO)
            here = Power(len(y_TO), added=_square(y_TO))
            here.output = _square(double(call.base_TO) + y_TO)
            for name, way, applies in (
                ("rotation_off", NO_ROTATION, found.rotates),
                ("uniform", EVEN, found.weighs),
            ):
                if applies:
                    other_TO, _ = module.forward(add, (way,), bare)
                    setattr(here, name, _square(double(other_TO) - y_TO))
            self.power[path][task] = self.power[path].get(task, Power()) + here

        return hook

    def run(self, model: Any, batches: Sequence[Batch], tick: Tick | None = None) -> None:
        """Run batches through the model, in eval mode and without gradients."""
        with evaluating(model):
            for batch in batches:
                model(**batch)
                for running in self.running.values():
                    running.drop()
                if tick is not None:
                    tick(batch["input_ids"].numel())

    def sums(self, path: str) -> dict[str, Sums]:
        """Return the sums of one layer by part."""
        experts = self.layers[path].experts
        return {part: running.result(path, experts) for part, running in self.running.items()}


@contextmanager
def changed(layers: Mapping[str, Found], adapter: str, way: Way) -> Iterator[None]:
    """Compute every layer by another way in the block, as those of `altered`."""
    before = [(found.layer, found.layer.rotmole_ways[adapter]) for found in layers.values()]
    try:
        for layer, _ in before:
            layer.rotmole_ways[adapter] = (way,)
        yield
    finally:
        for layer, ways in before:
            layer.rotmole_ways[adapter] = ways


def _rows(experts: Experts) -> tuple[Tensor, Tensor | None]:
    """Return what x is multiplied by [M, D], and what spans all that is added [M, O].

    None instead of the second, if outputs are rotated by the adapter.
    """
    inputs, outputs = experts.expert_A.shape[-1], experts.expert_B.shape[-1]
    reads, writes = [], []
    for name, tensor in experts.named_parameters():
        if experts.whole_name(name) in ("expert_B", "shared_B", "residual_B"):
            writes.append(double(tensor).reshape(-1, outputs))
        elif tensor.shape[-1] == inputs:
            reads.append(double(tensor).reshape(-1, inputs))
    specs = [spec for spec in (experts.spec, experts.spec.shared) if spec is not None]
    turns_outputs = any(spec.rotation == "radar" for spec in specs)
    return torch.cat(reads), None if turns_outputs else torch.cat(writes)


def span(rows_MN: Tensor) -> Tensor:
    """Return an orthonormal basis [N, P] of the span of rows; of one column if all are 0."""
    _, S, Vh = torch.linalg.svd(rows_MN, full_matrices=False)
    kept = S / S[0].clamp(min=1e-300) > 1e-9
    kept[0] = True
    return Vh[kept].T.contiguous()


def _sketch(rows_MD: Tensor, width: int) -> Tensor:
    """Return an orthonormal basis [D, N]: the span of rows, filled up at random to a width.

    What the adapter adds is a function of x's products with these rows. The best linear map of x
    uses more than them, because other parts of x tell about what is not linear; see docs/inspect.md
    for what is lost.
    """
    basis_DH = span(rows_MD)
    inputs, more = rows_MD.shape[1], width - basis_DH.shape[1]
    if more <= 0:
        return basis_DH
    random_DN = torch.randn(
        inputs, more, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    both_DN = torch.cat([basis_DH, random_DN.to(basis_DH)], 1)
    return torch.linalg.qr(both_DN).Q


def _square(values: Tensor) -> float:
    return float(values.square().sum())
