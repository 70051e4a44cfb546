"""Mixture: every function and its twin agree; the laws are in tests/ops/mixture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from ops_cases import IN_RANK_SPACE, Problem, Variant, assert_close, make
from torch import Tensor

from rotmole.ops import compiled
from rotmole.ops.mixture import block, products
from rotmole.ops.mixture.banks import Bank, How, Parts
from rotmole.ops.mixture.fused import GATES, can_compile, can_fuse, fused_mixture
from rotmole.ops.mixture.grouped import chosen_dots, chosen_outer, chosen_sum, grouped_mixture
from rotmole.ops.mixture.packed import pack, packed_activations, packed_additions, packed_mixture
from rotmole.ops.mixture.passes import backward, dropped, forward
from rotmole.ops.mixture.radar import radar_pairs_weights, radar_sum
from rotmole.ops.mixture.rank_space import Kind, Read, Small, read_small_gates, turn_back, weigh
from rotmole.ops.reference import block as slow_block
from rotmole.ops.reference import layer, method
from rotmole.ops.reference import products as slow
from rotmole.ops.reference import rotation as slow_rotation
from rotmole.ops.rotation.table import ROTATIONS
from rotmole.ops.spec import Spec, Weights

FUSED = [v for v in IN_RANK_SPACE if can_fuse(v.rotation) and not v.metric]
READS_X = ("rotation_vector", "rotation_angle")
every = pytest.mark.parametrize("variant", FUSED, ids=str)
selections = pytest.mark.parametrize(
    "options", [{}, {"norm_topk_prob": False}, {"selection": "dense"}], ids=str
)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_products() -> None:
    x, weight, base = normal(0, 3, 5), normal(1, 2, 4, 5), normal(2, 3, 6)
    m, B = normal(3, 2, 4, 3), normal(4, 2, 4, 6)
    assert_close(products.project(x, weight), slow.project(x, weight), 1e-13)
    for A in (weight, weight[:1]):
        assert_close(products.activations(x, A, 2), slow.activations(x, A, 2), 1e-13)
    for source in (normal(5, 5, 3), normal(6, 2, 5, 3)):
        assert_close(products.read_gate(weight, source), slow.read_gate(weight, source), 1e-13)
    assert_close(products.combine(m, B), slow.combine(m, B), 1e-13)
    for found, wanted in zip(
        products.project_all(x, [weight, weight[:1, :2]]),
        slow.project_all(x, [weight, weight[:1, :2]]),
        strict=True,
    ):
        assert_close(found, wanted, 1e-13)
    assert torch.equal(products.stack([x, base[:, :5]]), slow.stack([x, base[:, :5]]))
    for banks in (([m], [B]), ([m, m[:1, :2]], [B, B[:1, :2]])):
        assert_close(products.combine_all(*banks), slow.combine_all(*banks), 1e-13)
    m_TN, B_NO = m.flatten(0, 1).T, B.flatten(0, 1)
    for scale in (1.0, 1.7):
        found = products.scaled_product(m_TN, B_NO, scale)
        assert_close(found, slow.add_product(None, m_TN, B_NO, scale), 1e-13)
    for before in (None, base):
        found = products.add_product(before, m_TN, B_NO, 1.7)
        assert_close(found, slow.add_product(before, m_TN, B_NO, 1.7), 1e-13)


def test_products_of_many_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product is turned where it pays, and nobody sees it but by its strides."""
    monkeypatch.setattr(compiled, "FEW_TOKENS", 2)
    monkeypatch.setattr(products, "TURNED_FROM", 5)
    monkeypatch.setattr(products, "TURNED_UP_TO", 8)
    x, weight = normal(0, 3, 5), normal(1, 2, 4, 5)
    for turned, x_TD, weight_EMD in (
        (True, x, weight),
        (False, x[:, :4], weight[..., :4]),
        (False, x[:2], weight),
        (False, x, torch.cat([weight, weight[:1]])),
        (False, x.bfloat16(), weight.bfloat16()),
    ):
        weight_ND, wanted = weight_EMD.flatten(0, 1), slow.project(x_TD, weight_EMD)
        tolerance = 1e-13 if x_TD.dtype == torch.float64 else 0.02
        for scale in (1.0, 1.7):
            found = products.tokens_last(x_TD, weight_ND, scale)
            assert found.is_contiguous() != turned
            assert_close(found, scale * wanted.flatten(0, 1), tolerance)
        for found in (
            products.project(x_TD, weight_EMD), products.project_all(x_TD, [weight_EMD])[0]
        ):  # fmt: skip
            assert_close(found, wanted, tolerance)
        assert products.project(x_TD, weight_EMD).is_contiguous()


def test_dropped() -> None:
    x, keep = normal(0, 3, 5), normal(1, 3, 5) > 0
    how = How(Spec(), torch.float64, keep_scale=4 / 3)
    for mask in (None, keep):
        assert_close(dropped(x, mask, how), slow.dropped(x, mask, 4 / 3), 1e-15)


def test_sums_over_chosen_rows() -> None:
    rows = torch.tensor([[0, 3], [3, 1], [4, 4]])
    x, w, table = normal(0, 3, 5), normal(1, 3, 2), normal(2, 6, 5)
    assert_close(chosen_dots(x, table, rows), slow.chosen_dots(x, table, rows), 1e-13)
    assert_close(chosen_sum(w, table, rows), slow.chosen_sum(w, table, rows), 1e-13)
    assert_close(chosen_outer(w, x, rows, 6), slow.chosen_outer(w, x, rows, 6), 1e-13)


def test_slots() -> None:
    turned, weight, B = normal(0, 5, 4, 3), normal(1, 5, 4).softmax(-1), normal(2, 4, 3, 6)
    selected = weight >= weight.sort(-1).values[:, 2:3]  # two of each token
    weight = weight * selected
    weight = weight / weight.sum(-1, keepdim=True)
    for slots in (2, 3):
        experts = block.slot_experts(selected, slots)
        assert experts.tolist() == slow_block.slot_experts(selected, slots)
        found = block.slot_additions(turned, experts, B, scale=1.7)
        assert_close(found, slow_block.slot_additions(turned, experts, B, scale=1.7), 1e-13)
        hidden, turned_KTER = normal(3, slots, 5, 7), normal(4, slots, 5, 4, 3)
        found = block.slot_mean(hidden, weight, experts)
        assert_close(found, slow_block.slot_mean(hidden, weight, experts), 1e-13)
        found = block.weigh_slots(turned_KTER, weight, experts, B, scale=1.7)
        wanted = slow_block.weigh_slots(turned_KTER, weight, experts, B, scale=1.7)
        assert_close(found, wanted, 1e-13)


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_can_fuse(rotation: str) -> None:
    for metric in ("rank", "output"):
        assert can_fuse(rotation, metric) == slow_rotation.can_fuse(rotation, metric)
    assert can_compile(rotation) == slow_rotation.can_compile(rotation)


@pytest.mark.parametrize("normalize", [True, False])
def test_radar_sum(normalize: bool) -> None:
    z, weight, B = normal(0, 3, 4, 2), normal(1, 3, 4), normal(2, 4, 2, 6)
    selected = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0], [1, 1, 1, 1]]).bool()
    weight = weight * selected
    gates = {"radar_down": normal(3, 12, 5), "radar_up": normal(4, 5, 3)}
    found_TO = radar_sum(z, weight, selected, B, gates, normalize)
    for t in range(3):
        v = {e: z[t, e] @ B[e] for e in range(4) if selected[t, e]}
        turned = method.radar(v, gates, normalize)
        assert_close(found_TO[t], sum(weight[t, e] * v_O for e, v_O in turned.items()), 1e-12)


@pytest.mark.parametrize("reads_x", [True, False])
def test_radar_pairs_weights(reads_x: bool) -> None:
    x, z, weight, B = normal(9, 3, 5), normal(0, 3, 4, 2), normal(1, 3, 4), normal(2, 4, 2, 6)
    selected = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0], [1, 1, 1, 1]]).bool()
    weight = weight * selected
    gates = {"radar_pair_angle": normal(3, 4, 4)}
    if reads_x:
        gates |= {"radar_pair_down": normal(4, 5, 2), "radar_pair_up": normal(5, 2, 16)}
    mixed_TE = radar_pairs_weights(x, z, weight, selected, B, gates)
    for t in range(3):
        v = {e: z[t, e] @ B[e] for e in range(4) if selected[t, e]}
        turned = method.radar_pairs(v, gates, x[t])
        wanted = sum(weight[t, e] * v_O for e, v_O in turned.items())
        found = sum(mixed_TE[t, e] * v_O for e, v_O in v.items())
        assert_close(found, wanted, 1e-12)


def spec_of(problem: Problem, **options: Any) -> Spec:
    return Spec(
        num_experts=len(problem.B_ERO), scale=problem.scale, top_k=problem.top_k,
        rotation=problem.variant.rotation, **problem.variant.reading, **options,
    )  # fmt: skip


def weights_of(problem: Problem, router_ED: Tensor) -> Weights:
    return Weights(problem.A_ERD, problem.B_ERO, problem.gates, {"router_weight": router_ED})


@every
@selections
@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_passes_and_fused_mixture(
    variant: Variant, options: dict[str, Any], drops: bool, shared: bool
) -> None:
    problem = make(variant, 2, T=3, E=4, K=2, D=5, O=6)
    if shared:
        problem = replace(problem, A_ERD=problem.A_ERD[:1])
    router_ED, base_TO = normal(3, 4, 5), normal(4, 3, 6)
    keep_TD = problem.keep_TD > 0 if drops else None
    how = How(spec_of(problem, **options), torch.float64, keep_scale=1 / 0.75)
    gates = [problem.gates.get(name) for name in GATES]
    routed = Bank(problem.A_ERD, problem.B_ERO, router_ED, *gates)
    parts = Parts(base_TO, problem.x_TD, keep_TD, None, None, routed)
    tensors = {
        "x_TD": problem.x_TD, "router_ED": router_ED, "A_ERD": problem.A_ERD,
        "B_ERO": problem.B_ERO,
    } | problem.gates  # fmt: skip
    settings = options | {
        "rotation": variant.rotation, "scale": problem.scale, "top_k": 2, "keep_TD": keep_TD,
        "keep_scale": 1 / 0.75, "rotation_input": variant.reading["rotation_input"],
    }  # fmt: skip
    arguments = {name: x for name, x in tensors.items() if name not in GATES}
    wanted_TO, logits_TE = layer.layer(
        **arguments, gates=problem.gates, base_TO=base_TO, **settings
    )
    y_TO, found_TE, _, saved = forward(how, parts)
    fused_TO, fused_TE, _ = fused_mixture(
        how, problem.x_TD, weights_of(problem, router_ED), keep_TD=keep_TD, base_TO=base_TO
    )
    for y, logits in ((y_TO, found_TE), (fused_TO, fused_TE)):
        assert_close(y, wanted_TO, 1e-12)
        assert_close(logits, logits_TE, 1e-13)
    dy_TO, dlogits_TE = normal(5, 3, 6), normal(6, 3, 4)
    gradients = backward(how, parts, saved, dy_TO, dlogits_TE, needs_x=True)
    found = {"x_TD": gradients.x_TD} | gradients.routed._asdict()
    wanted = layer.layer_gradients(tensors, dy_TO, dlogits_TE, **settings)
    names = ("vector_EVN", "angle_EMN", "center_ER", "down_HD")
    fields = dict(zip(GATES, names, strict=True))
    for name, gradient in wanted.items():
        assert_close(found[fields.get(name, name)], gradient, 1e-11, name)


@pytest.mark.parametrize("variant", [v for v in FUSED if not v.input_z], ids=str)
def test_grouped_mixture(variant: Variant) -> None:
    problem = make(variant, 5, T=3, E=5, K=2, D=5, O=6)
    routed = method.route(problem.logits_TE, top_k=2)
    arguments = problem.x_TD, problem.dropped_TD
    weights = Weights(problem.A_ERD, problem.B_ERO, problem.gates)
    logits_TE = problem.logits_TE
    found = grouped_mixture(spec_of(problem), *arguments, weights, *routed[:2], logits_TE)
    wanted = method.mixture(
        *arguments, routed.weight_TE, problem.A_ERD, problem.B_ERO, problem.gates,
        rotation=variant.rotation, scale=problem.scale, logits_TE=logits_TE,
        rotation_input=variant.reading["rotation_input"],
    )  # fmt: skip
    assert_close(found, wanted, 1e-12)


@every
@selections
@pytest.mark.parametrize("shared", [False, True])
def test_packed_activations_and_mixture(
    variant: Variant, options: dict[str, Any], shared: bool
) -> None:
    problems = [make(variant, seed, T=3, E=4, K=2, D=5, O=6) for seed in (7, 8)]
    if shared:
        problems = [replace(problem, A_ERD=problem.A_ERD[:1]) for problem in problems]
    x_TD, routers = problems[0].x_TD, [normal(1, 4, 5), normal(2, 4, 5)]
    spec, base_TO = spec_of(problems[0], **options), normal(3, 3, 6)
    reads = variant.reading["rotation_input"]
    layers = [weights_of(p, router) for p, router in zip(problems, routers, strict=True)]
    packed = pack(spec, layers, torch.float64)
    named = []
    for p, router in zip(problems, routers, strict=True):
        reads_x = {name: p.gates[name] for name in READS_X if name in p.gates}
        if spec.small_gates:
            down = p.gates.get("rotation_down")
            reads_x = {} if down is None else {"rotation_down": down.unsqueeze(0)}
        named.append({"A": p.A_ERD, "router": router, **reads_x})
    assert torch.equal(packed.fixed[0], layer.pack(named))
    activations, additions = packed_activations(x_TD, packed), packed_additions(x_TD, packed)
    for p, router, m_TN, addition in zip(problems, routers, activations, additions, strict=True):
        tensors = x_TD, p.A_ERD, p.B_ERO, p.gates
        wanted = layer.weighted_activations(
            *tensors, router, rotation=variant.rotation, top_k=2, rotation_input=reads, **options
        )
        assert_close(m_TN, wanted, 1e-12)
        alone = pack(spec, [weights_of(p, router)], torch.float64)
        found = packed_mixture(x_TD, alone, base_TO)
        wanted, _ = layer.layer(
            *tensors, router_ED=router, rotation=variant.rotation, scale=p.scale, top_k=2,
            base_TO=base_TO, rotation_input=reads, **options,
        )  # fmt: skip
        assert_close(found, wanted, 1e-12)
        assert_close(addition.to(base_TO, spec.scale), wanted, 1e-12)


@every
@selections
def test_rank_space(variant: Variant, options: dict[str, Any]) -> None:
    """Between the products: weighted activations, and their way back to what reads x."""
    problem = make(variant, 2, T=3, E=4, K=2, D=5, O=6)
    x, A, B, gates = problem.x_TD, problem.A_ERD, problem.B_ERO, problem.gates
    router_ED, dy_TO, dlogits_TE = normal(3, 4, 5), normal(5, 3, 6), normal(6, 3, 4)
    spec, reads = spec_of(problem, **options), variant.reading["rotation_input"]
    vector, angle, center, down = (gates.get(name) for name in GATES)
    kind = Kind((spec,), (B.shape[:2],), (True,), torch.float64)
    z_ERT, logits_ET, few_NT = slow.project(x, A), router_ED @ x.mT, None
    if spec.small_gates:
        few_NT = None if down is None else down @ x.mT
        small, read_gates = Small(vector, angle, center), (None, None)
    else:
        small = Small(None, None, center)
        read_gates = tuple(None if g is None else slow.project(x, g) for g in (vector, angle))
    weighed = weigh(kind, [small], [Read(z_ERT, logits_ET, *read_gates, few_NT)], None)
    wanted_TN = layer.weighted_activations(
        x, A, B, gates, router_ED, rotation=variant.rotation, top_k=2, rotation_input=reads,
        **options,
    )  # fmt: skip
    assert_close(weighed.m_NT.mT, problem.scale * wanted_TN, 1e-12)
    kept = weighed.saved[0]
    if spec.small_gates:
        source = z_ERT if kept.few_NT is None else kept.few_NT
        for found, gate in zip(
            read_small_gates(small, kept.few_NT, z_ERT), (vector, angle), strict=True
        ):
            assert (found is None) == (gate is None)
            if gate is not None:
                assert_close(found, slow.read_gate(gate, source), 1e-12)
    dm_NT = (dy_TO @ B.flatten(0, 1).mT).mT
    again = [read_gates[1] if kept.angle_EMT is None else None]
    m_NT, (back,) = turn_back(kind, [small], [kept], again, None, dm_NT, dlogits_TE)
    assert_close(m_NT, weighed.m_NT, 1e-12)
    tensors = {"x_TD": x, "router_ED": router_ED, "A_ERD": A, "B_ERO": B} | gates
    settings = options | {"rotation": variant.rotation, "scale": problem.scale, "top_k": 2}
    wanted = layer.layer_gradients(tensors, dy_TO, dlogits_TE, rotation_input=reads, **settings)
    found = {
        "A_ERD": back.z_ERT @ x,
        "router_ED": back.router_ET @ x,
        "rotation_center": back.center_ER,
    }
    if spec.small_gates:
        found |= {"rotation_vector": back.small.vector_EVN, "rotation_angle": back.small.angle_EMN}
        found |= {"rotation_down": None if down is None else back.small.few_NT @ x}
    else:
        for name, value in (
            ("rotation_vector", back.vector_EVT),
            ("rotation_angle", back.angle_EMT),
        ):
            found |= {name: None if value is None else value @ x}
    for name in tensors.keys() - {"x_TD", "B_ERO"}:
        assert_close(found[name], wanted[name], 1e-11, name)
