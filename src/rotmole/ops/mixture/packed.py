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

from rotmole.ops.compiled import compiled, may_compile
from rotmole.ops.mixture.products import add_product, project
from rotmole.ops.precision import at_least_float32, without_autocast
from rotmole.ops.rotation.table import ROTATIONS, Gate
from rotmole.ops.routing.selection import choose, spread_chosen
from rotmole.ops.spec import Spec, Weights


class Layout(NamedTuple):
    """Where the rows of one bank lie.

    Attributes:
        parts: (name, first row, experts, rows of an expert in a layer) of what is in rows_ND.
        sizes: E, L, R.
    """

    parts: tuple[tuple[str, int, int, int], ...]
    sizes: tuple[int, int, int]


class PackedBank(NamedTuple):
    """One bank of experts of L layers: the routed ones, or the shared one.

    Attributes:
        layout: of its rows.
        apart: name -> [E L, rows, D] weight of what is computed in a wider type.
        small: name -> [E, L, rows, N] gate that reads few numbers in place of x.
        center_ER: [E L, R] learned vectors, or None.
    """

    layout: Layout
    apart: dict[str, Tensor]
    small: dict[str, Tensor]
    center_ER: Tensor | None


class Pack(NamedTuple):
    """Weights of L layers laid out for packed_activations, expert by expert, in each L layers.

    Attributes:
        rows_ND: [N, D] all A, vector gates, and what else is computed in the same type.
        banks: of the routed experts, then of the shared one if there is one.
        B_NO: the layers' output factors in that type; N = E R, plus R of the shared expert.
    """

    rows_ND: Tensor
    banks: list[PackedBank]
    B_NO: list[Tensor]


def pack(spec: Spec, layers: Sequence[Weights], dtype: torch.dtype) -> Pack:
    """Lay out the weights of layers that read the same x.

    Args:
        spec: of each of the layers.
        layers: with E, R, D and kinds of gates in common.
        dtype: type of the products.

    Returns:
        Copies (of B only where its type is another); valid until a weight changes.
    """
    routed, rows = _pack_bank(spec, layers, dtype, 0)
    banks = [routed]
    B_NO = [layer.B_ERO.detach().to(dtype).flatten(0, 1) for layer in layers]
    shared = [layer.shared for layer in layers if layer.shared is not None]
    if spec.shared is not None and shared:
        start = sum(len(part) for part in rows)
        bank, more = _pack_bank(spec.shared, shared, dtype, start)
        banks, rows = [routed, bank], rows + more
        B_NO = [
            torch.cat([B, layer.B_ERO.detach().to(dtype).flatten(0, 1)])
            for B, layer in zip(B_NO, shared, strict=True)
        ]
    return Pack(torch.cat(rows), banks, B_NO)


def _pack_bank(
    spec: Spec, layers: Sequence[Weights], dtype: torch.dtype, start: int
) -> tuple[PackedBank, list[Tensor]]:
    """Return one bank of the layers, and its rows, which begin at row `start`."""

    def together(weights: Sequence[Tensor]) -> Tensor:
        return torch.stack([weight.detach() for weight in weights], dim=1)

    named = {"A": together([layer.A_ERD for layer in layers])}
    if "router_weight" in layers[0].router:
        named["router"] = together([layer.router["router_weight"].unsqueeze(1) for layer in layers])
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
        named["down"] = together([layer.gates["rotation_down"].unsqueeze(0) for layer in layers])
    wide = dtype in (torch.float32, torch.float64)
    apart = {} if wide else {name: named.pop(name) for name in ("router", "angle") if name in named}
    parts = []
    for name, weight in named.items():
        parts.append((name, start, weight.shape[0], weight.shape[2]))
        start += weight[..., 0].numel()
    sizes = (layers[0].B_ERO.shape[0], len(layers), layers[0].B_ERO.shape[1])
    bank = PackedBank(
        Layout(tuple(parts), sizes),
        {name: at_least_float32(weight.flatten(0, 1)) for name, weight in apart.items()},
        small,
        None if center is None else at_least_float32(center.flatten(0, 1)),
    )
    return bank, [weight.to(dtype).flatten(0, 2) for weight in named.values()]


def packed_activations(
    spec: Spec, x_TD: Tensor, packed: Pack, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Return what each layer multiplies with B, the scale s left out, without gradients.

        m_e = g_e(x) R_e(x)[A_e x];   of the shared expert (s_0 / s) g_0(x) R_0(x)[A_0 x]

    Args:
        spec: of each of the layers; rotation, and "top_k" or "dense" over a linear router.
        x_TD: [T, D] the layers' input.
        packed: their weights.
        dtype: type of the products, as given to `pack`.

    Returns:
        [T, E R] in dtype for each layer, [T, E R + R_0] with a shared expert.
    """
    with without_autocast(x_TD):
        rows_NT = packed.rows_ND @ (x_TD if x_TD.dtype == dtype else x_TD.to(dtype)).mT
        specs = (spec,) if spec.shared is None else (spec, spec.shared)
        kind = PackedKind(specs, tuple(bank.layout for bank in packed.banks), dtype)
        read = [
            PackedRead(
                {n: project(x_TD.to(w.dtype), w) for n, w in bank.apart.items()},
                bank.small,
                bank.center_ER,
            )
            for bank in packed.banks
        ]
        as_kernels = may_compile(spec, x_TD)
        m_LTN = (
            compiled(_weighed, kind, rows_NT, read) if as_kernels else _weighed(kind, rows_NT, read)
        )
        return m_LTN.unbind()


class PackedKind(NamedTuple):
    """What the steps after the products have to know besides tensors.

    Attributes:
        specs, layouts: of each bank.
        dtype: type of the products.
    """

    specs: tuple[Spec, ...]
    layouts: tuple[Layout, ...]
    dtype: torch.dtype


class PackedRead(NamedTuple):
    """What the steps read of one bank besides the common product.

    Attributes:
        apart: name -> [E L, rows, T] what was computed in a wider type.
        small, center_ER: of the bank.
    """

    apart: dict[str, Tensor]
    small: dict[str, Tensor]
    center_ER: Tensor | None


def _weighed(kind: PackedKind, rows_NT: Tensor, reads: Sequence[PackedRead]) -> Tensor:
    """Return the weighted activations of all banks, [L, T, N], without the first one's scale."""
    parts: list[Tensor] = []
    for spec, layout, read in zip(kind.specs, kind.layouts, reads, strict=True):
        m_LTN = _activations(spec, layout, rows_NT, read)
        factor = spec.scale / kind.specs[0].scale
        parts.append(m_LTN if not parts else factor * m_LTN)
    both = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return both.to(kind.dtype)


def _activations(spec: Spec, layout: Layout, rows_NT: Tensor, bank: PackedRead) -> Tensor:
    """Return the weighted activations of one bank, [L, T, E R]."""
    (experts, layers, rank), tokens = layout.sizes, rows_NT.shape[1]
    parts = {name: place for name, *place in layout.parts}

    def read(name: str) -> Tensor | None:
        if name not in parts:
            return bank.apart.get(name)
        start, count, each = parts[name]
        value = at_least_float32(rows_NT[start : start + count * layers * each])
        value = value.view(count * layers, each, tokens)
        return value.repeat(experts, 1, 1) if name == "A" and count != experts else value

    logits, z_ERT = read("router"), read("A")
    assert z_ERT is not None
    vector, angle = read("vector"), read("angle")
    if bank.small:
        vector, angle = _small(spec, layout, bank.small, z_ERT, logits, read("down"))
    rotate = ROTATIONS[spec.rotation].rotate
    assert rotate is not None
    m_ERT = rotate(z_ERT, Gate(vector, angle, bank.center_ER))
    if logits is not None:
        m_ERT = (
            _weights(spec, logits.reshape(experts, layers * tokens)).view(
                experts * layers, 1, tokens
            )
            * m_ERT
        )
    m_LTER = m_ERT.view(experts, layers, rank, tokens).permute(1, 3, 0, 2)
    return m_LTER.reshape(layers, tokens, experts * rank)


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
    logits: Tensor | None,
    down_LHT: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the values of vector and angle gate that read few numbers, each [E L, rows, T]."""
    (experts, layers, rank), tokens = layout.sizes, z_ERT.shape[-1]
    source = down_LHT
    if spec.rotation_input == "z":
        source = z_ERT.view(experts, layers, rank, tokens)
    elif spec.rotation_input == "router":
        assert logits is not None
        source = logits.view(experts, layers, tokens).transpose(0, 1)
    assert source is not None
    values = {
        name: (weight_ELMN.to(source.dtype) @ source).view(experts * layers, -1, tokens)
        for name, weight_ELMN in small.items()
    }
    return values.get("vector"), values.get("angle")


def packed_mixture(
    spec: Spec,
    x_TD: Tensor,
    packed: Pack,
    dtype: torch.dtype,
    base_TO: Tensor | None = None,
) -> Tensor:
    """Return what the adapter of one layer adds to W x, or its sum with W x, without gradients.

    Args:
        spec, x_TD, dtype: as for packed_activations.
        packed: the weights of the layer alone.
        base_TO: [T, O] W x; None leaves it out.

    Returns:
        [T, O] in dtype or base_TO's, whichever is wider; differs from fused_mixture by rounding
        alone.

    >>> weights = Weights(torch.ones(2, 4, 3), torch.ones(2, 4, 6))
    >>> weights = weights._replace(router={"router_weight": torch.ones(2, 3)})
    >>> spec = Spec(num_experts=2)
    >>> packed = pack(spec, [weights], torch.float32)
    >>> packed_mixture(spec, torch.ones(5, 3), packed, torch.float32).shape
    torch.Size([5, 6])
    """
    (m_TN,) = packed_activations(spec, x_TD, packed, dtype)
    return add_product(base_TO, m_TN, packed.B_NO[0], spec.scale)
