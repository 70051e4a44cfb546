"""The mixture for few tokens without gradients, as in cached decoding: one product reads x.

At one token a layer's time is the number of its operations, not their size. The factors A, the
vector gates and, where types allow, router and angle gates are laid into one matrix once; a call
then makes one product with it, routes, rotates and weighs. Layers that read the same x (q, k and v
of an attention) are laid into one matrix too: to all steps but the last they are more experts, and
to the routing more tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rotmole.ops.compiled import Kernels, kernels_of, may_compile
from rotmole.ops.mixture.products import add_product, scaled_product
from rotmole.ops.precision import at_least_float32, without_autocast
from rotmole.ops.rotation.table import ROTATIONS, Gate
from rotmole.ops.routing.selection import choose, spread_chosen
from rotmole.ops.spec import Spec, Weights


class Layout(NamedTuple):
    """Where the rows of one bank lie.

    Attributes:
        parts: (name, first row, row after the last one) of what is in rows_ND.
        sizes: E, L, R.
    """

    parts: tuple[tuple[str, int, int], ...]
    sizes: tuple[int, int, int]


class Apart(NamedTuple):
    """What of one bank, the routed experts or the shared one, is not in rows_ND.

    Attributes:
        wide: name -> [N, D] rows that are computed in a wider type; when read, values [N, T].
        small: name -> [L, E, rows, N] gate that reads few numbers in place of x.
        center_ER: [L E, R] learned vectors, or None.
    """

    wide: dict[str, Tensor]
    small: dict[str, Tensor]
    center_ER: Tensor | None


class PackedKind(NamedTuple):
    """What the steps have to know besides tensors.

    Attributes:
        specs, layouts: of each bank.
        dtype: type of the products.
        names: of each bank, those of what lies apart: wide, then small.
    """

    specs: tuple[Spec, ...]
    layouts: tuple[Layout, ...]
    dtype: torch.dtype
    names: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]


class Pack(NamedTuple):
    """Weights of L layers laid out for packed_additions.

    Rows lie layer by layer, in each layer expert by expert, so that what a layer multiplies with B
    lies together. Those of the router lie expert by expert, since experts are compared.

    Attributes:
        kind: of the steps.
        fixed: what the steps take besides x: [N, D] all A, vector gates, and what else is computed
            in the same type; then for each bank the rows of what is wide, its small gates, and its
            learned vectors or None.
        B_NO: the layers' output factors in that type; N = E R, plus R of the shared expert.
        kernels: the steps and the products with B in one, for a layer that asks for it.
    """

    kind: PackedKind
    fixed: list[Tensor | None]
    B_NO: list[Tensor]
    kernels: Kernels | None


def pack(spec: Spec, layers: Sequence[Weights], dtype: torch.dtype) -> Pack:
    """Lay out the weights of layers that read the same x.

    Args:
        spec: of each of the layers; rotation, and "top_k" or "dense" over a linear router.
        layers: with E, R, D and kinds of gates in common.
        dtype: type of the products.

    Returns:
        Copies (of B only where its type is another); valid until a weight changes.
    """
    layout, apart, rows = _pack_bank(spec, layers, dtype, 0)
    specs, layouts, aparts = [spec], [layout], [apart]
    B_NO = [layer.B_ERO.detach().to(dtype).flatten(0, 1) for layer in layers]
    shared = [layer.shared for layer in layers if layer.shared is not None]
    if spec.shared is not None and shared:
        layout, apart, more = _pack_bank(spec.shared, shared, dtype, sum(map(len, rows)))
        specs, layouts, aparts = [spec, spec.shared], [*layouts, layout], [*aparts, apart]
        rows += more
        B_NO = [
            torch.cat([B, layer.B_ERO.detach().to(dtype).flatten(0, 1)])
            for B, layer in zip(B_NO, shared, strict=True)
        ]
    names = tuple((tuple(bank.wide), tuple(bank.small)) for bank in aparts)
    kind = PackedKind(tuple(specs), tuple(layouts), dtype, names)
    fixed: list[Tensor | None] = [torch.cat(rows)]
    letters = ["TD", "RD"]
    for bank in aparts:
        fixed += [*bank.wide.values(), *bank.small.values(), bank.center_ER]
        letters += ["RD"] * len(bank.wide) + ["LERR"] * len(bank.small) + ["ER"]
    kernels = None
    if spec.kernels == "compiled":
        kernels = kernels_of(_additions, kind, [*letters, *["RO"] * len(B_NO)], fixed)
    return Pack(kind, fixed, B_NO, kernels)


def _pack_bank(
    spec: Spec, layers: Sequence[Weights], dtype: torch.dtype, start: int
) -> tuple[Layout, Apart, list[Tensor]]:
    """Return how one bank of the layers lies, and its rows, which begin at row `start`."""

    def together(weights: Sequence[Tensor]) -> Tensor:
        return torch.stack([weight.detach() for weight in weights])

    named = {"A": together([layer.A_ERD for layer in layers])}
    if "router_weight" in layers[0].router:
        router_LED = together([layer.router["router_weight"] for layer in layers])
        named["router"] = router_LED.transpose(0, 1)
    kinds = {"rotation_vector": "vector", "rotation_angle": "angle", "rotation_center": "center"}
    for name, kind in kinds.items():
        if name in layers[0].gates:
            named[kind] = together([layer.gates[name] for layer in layers])
    center = named.pop("center", None)
    small: dict[str, Tensor] = {}
    if spec.small_gates:
        kept = {name: named.pop(name) for name in ("vector", "angle") if name in named}
        small = {name: at_least_float32(weight) for name, weight in kept.items()}
    if "rotation_down" in layers[0].gates:
        named["down"] = together([layer.gates["rotation_down"] for layer in layers])
    rows = {name: weight.reshape(-1, weight.shape[-1]) for name, weight in named.items()}
    wide = {}
    if dtype not in (torch.float32, torch.float64):
        wide = {name: rows.pop(name) for name in ("router", "angle") if name in rows}
    parts = []
    for name, weight_ND in rows.items():
        parts.append((name, start, start + len(weight_ND)))
        start += len(weight_ND)
    experts, rank = layers[0].B_ERO.shape[:2]
    apart = Apart(
        {name: at_least_float32(weight_ND) for name, weight_ND in wide.items()},
        small,
        None if center is None else at_least_float32(center.flatten(0, 1)),
    )
    layout = Layout(tuple(parts), (experts, len(layers), rank))
    return layout, apart, [weight_ND.to(dtype) for weight_ND in rows.values()]


def packed_activations(x_TD: Tensor, packed: Pack) -> tuple[Tensor, ...]:
    """Return what each layer multiplies with B, the scale s left out, without gradients.

        m_e = g_e(x) R_e(x)[A_e x];   of the shared expert (s_0 / s) g_0(x) R_0(x)[A_0 x]

    Args:
        x_TD: [T, D] the layers' input.
        packed: their weights.

    Returns:
        [T, E R] in the type of the products for each layer, [T, E R + R_0] with a shared expert.
    """
    with without_autocast(x_TD):
        return _weighed(packed.kind, [x_TD, *packed.fixed]).unbind()


class Addition(NamedTuple):
    """What one layer adds to W x, as far as it is computed.

    Attributes:
        value: [T, O] all of it, the scale included, without B; else [T, N] what is still to be
            multiplied with B and the scale.
        B_NO: [N, O] the layer's output factors, or None.
    """

    value: Tensor
    B_NO: Tensor | None

    def to(self, base_TO: Tensor | None, scale: float) -> Tensor:
        """Return the sum of base_TO [T, O], if there is one, and the addition."""
        if self.B_NO is not None:
            return add_product(base_TO, self.value, self.B_NO, scale)
        return self.value if base_TO is None else base_TO + self.value


def packed_additions(x_TD: Tensor, packed: Pack) -> list[Addition]:
    """Return what each layer adds, without gradients: by kernels all of it, else all but B.

    Args:
        x_TD: [T, D] the layers' input.
        packed: their weights.

    Returns:
        One for each layer. A product that adds to W x as it goes is one operation less than one
        before an addition, but kernels have no W x of layers that did not come yet.
    """
    if packed.kernels is None or not may_compile(packed.kind.specs[0], x_TD):
        return [*map(Addition, packed_activations(x_TD, packed), packed.B_NO)]
    with without_autocast(x_TD):
        added = packed.kernels([x_TD, *packed.fixed, *packed.B_NO])
    return [Addition(value_TO, None) for value_TO in added]


def _additions(kind: PackedKind, tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Return what each layer adds, [T, O]; tensors: as for _weighed, then each layer's B."""
    layers = kind.layouts[0].sizes[1]
    m_LTN = _weighed(kind, tensors[:-layers])
    pairs = zip(m_LTN.unbind(), tensors[-layers:], strict=True)
    scale = kind.specs[0].scale
    return tuple(scaled_product(m_TN, B_NO, scale) for m_TN, B_NO in pairs if B_NO is not None)


def _weighed(kind: PackedKind, tensors: Sequence[Tensor | None]) -> Tensor:
    """Return the weighted activations of all banks, [L, T, N], without the first one's scale.

    Args:
        kind: of the pack.
        tensors: [T, D] the layers' input, then what is fixed.
    """
    parts: list[Tensor] = []
    x_TD, rows_ND, start = tensors[0], tensors[1], 2
    assert x_TD is not None
    assert rows_ND is not None
    x_DT = x_TD.mT
    rows_NT = rows_ND @ (x_DT if x_DT.dtype == kind.dtype else x_DT.to(kind.dtype))
    for spec, layout, (wide, small) in zip(kind.specs, kind.layouts, kind.names, strict=True):
        middle = start + len(wide)
        stop = middle + len(small)
        weights = dict(zip(wide, tensors[start:middle], strict=True))
        values = {
            name: weight_ND @ x_DT.to(weight_ND.dtype)
            for name, weight_ND in weights.items()
            if weight_ND is not None  # all are there
        }
        gates = dict(zip(small, tensors[middle:stop], strict=True))
        read = Apart(values, gates, tensors[stop])  # type: ignore[arg-type] # are there
        start = stop + 1
        m_LNT = _activations(spec, layout, rows_NT, read)
        factor = spec.scale / kind.specs[0].scale
        parts.append(m_LNT if not parts else factor * m_LNT)
    both = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return both.to(kind.dtype).mT


def _activations(spec: Spec, layout: Layout, rows_NT: Tensor, read: Apart) -> Tensor:
    """Return the weighted activations of one bank, [L, E R, T]."""
    (experts, layers, rank), tokens = layout.sizes, rows_NT.shape[1]
    values = dict(read.wide)
    for name, first, stop in layout.parts:
        values[name] = at_least_float32(rows_NT[first:stop])
    z_NT, logits_NT = values["A"], values.get("router")
    if len(z_NT) < experts * layers * rank:  # one A for all experts
        z_NT = z_NT.view(layers, 1, rank, tokens).expand(-1, experts, -1, -1)
    z_ERT = z_NT.reshape(experts * layers, rank, tokens)  # here E counts all layers' experts
    gates: dict[str, Tensor] = {}
    for name in ("vector", "angle"):
        if name in values:
            rows = len(values[name]) // (experts * layers)
            gates[name] = values[name].view(experts * layers, rows, tokens)
    if read.small:
        gates = _small(spec, layout, read.small, z_ERT, logits_NT, values.get("down"))
    rotate = ROTATIONS[spec.rotation].rotate
    assert rotate is not None
    m_ERT = rotate(z_ERT, Gate(gates.get("vector"), gates.get("angle"), read.center_ER))
    if logits_NT is not None:
        weight_ET = _weights(spec, logits_NT.view(experts, layers * tokens))
        weight_EL1T = weight_ET.view(experts, layers, 1, tokens)
        m_LERT = m_ERT.reshape(layers, experts, rank, tokens)
        m_ERT = (m_LERT * weight_EL1T.transpose(0, 1)).flatten(0, 1)
    return m_ERT.reshape(layers, experts * rank, tokens)


def _weights(spec: Spec, logits_ET: Tensor) -> Tensor:
    """Return the weights [E, T] of a plain scaling gate, or of the shared expert's sigmoid."""
    if spec.scoring == "sigmoid":
        return torch.sigmoid(logits_ET)
    chosen = choose(
        logits_ET,
        top_k=spec.top_k,
        selection=spec.selection,
        norm_topk_prob=spec.norm_topk_prob,
    )
    return spread_chosen(chosen.weight_KT, chosen.index_KT, len(logits_ET))


def _small(
    spec: Spec,
    layout: Layout,
    small: dict[str, Tensor],
    z_ERT: Tensor,
    logits_NT: Tensor | None,
    down_NT: Tensor | None,
) -> dict[str, Tensor]:
    """Return the values of vector and angle gate that read few numbers, each [L E, rows, T]."""
    (experts, layers, rank), tokens = layout.sizes, z_ERT.shape[-1]
    if spec.rotation_input == "z":
        source = z_ERT.view(layers, experts, rank, tokens)
    elif spec.rotation_input == "router":
        assert logits_NT is not None
        source = logits_NT.view(experts, layers, tokens).transpose(0, 1).unsqueeze(1)
    else:
        assert down_NT is not None
        source = down_NT.view(layers, 1, len(down_NT) // layers, tokens)
    return {
        name: (weight_LEMN.to(source.dtype) @ source).flatten(0, 1)
        for name, weight_LEMN in small.items()
    }


def packed_mixture(x_TD: Tensor, packed: Pack, base_TO: Tensor | None = None) -> Tensor:
    """Return what the adapter of one layer adds to W x, or its sum with W x, without gradients.

    Args:
        x_TD: as for packed_activations.
        packed: the weights of the layer alone.
        base_TO: [T, O] W x; None leaves it out.

    Returns:
        [T, O] in the type of the products or base_TO's, whichever is wider; differs from
        fused_mixture by rounding alone.

    >>> weights = Weights(torch.ones(2, 4, 3), torch.ones(2, 4, 6))
    >>> weights = weights._replace(router={"router_weight": torch.ones(2, 3)})
    >>> packed = pack(Spec(num_experts=2), [weights], torch.float32)
    >>> packed_mixture(torch.ones(5, 3), packed).shape
    torch.Size([5, 6])
    """
    (addition,) = packed_additions(x_TD, packed)
    return addition.to(base_TO, packed.kind.specs[0].scale)
