"""What is measured in one pass, against the layers computed by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model

import rotmole
from planted_cases import FIRST, Words, base, inspected, layers, mixture, rows
from rotmole.inspection.answers import answers_of
from rotmole.inspection.inspect import Request, inspect_adapter
from rotmole.inspection.inspection import ALL
from rotmole.inspection.probe import EVEN, NO_ROTATION, Probes, changed
from rotmole.inspection.regression import Sums, best_map
from rotmole.inspection.sample import Sample, batches
from rotmole.inspection.static_share import (
    CALIBRATION,
    HELD_OUT,
    ranks_up_to,
    static_share,
    total,
)
from rotmole.ops.mixture.dense import mixture as mixed
from rotmole.ops.reference import method as reference
from rotmole.ops.routing.route import route


def inputs(model: Any, path: str, sample: dict[str, list[Any]]) -> torch.Tensor:
    """What a layer reads, token by token, in float64."""
    seen: list[torch.Tensor] = []
    layer = model.get_base_model().get_submodule(path)
    hook = layer.register_forward_pre_hook(lambda m, a: seen.append(a[0].flatten(0, 1).double()))
    for each in sample.values():
        for batch in batches(each, model):
            with torch.no_grad():
                model(**batch)
    hook.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("settings", [
    {}, {"rotation": "radar"}, {"rotation": "plane", "shared_expert_r": 2,
                                "shared_expert_rotation": "tangent"},
    {"rotation": "givens", "norm_topk_prob": False},
], ids=["tangent", "radar", "shared", "not normalised"])  # fmt: skip
def test_effects_are_those_of_the_layers_by_hand(settings: dict[str, object]) -> None:
    """By the slow reference where there is one: without rotation, and with equal weights."""
    model = mixture(**settings).double()
    sample = rows(2, count=2)
    probes = Probes(layers(model), tokens=1)
    for task, each in sample.items():
        with probes.listening(task, None, effects=True):
            probes.run(model, batches(each, model))
    x = inputs(model, FIRST, sample)
    found = layers(model)[FIRST]
    spec, weights = found.experts.spec, found.experts.weights()
    with torch.no_grad():
        _, routing = route(spec, x, weights)
        weight_TE = routing.weight_TE
        even_TE = weight_TE.sum(-1, keepdim=True).expand_as(weight_TE) / spec.num_experts
        y = mixed(spec, x, x, weights, weight_TE, routing.selected_TE)
        even = mixed(spec, x, x, weights, even_TE, torch.ones_like(weight_TE).bool())
        plain = reference.mixture(
            x, x, weight_TE, weights.A_ERD, weights.B_ERO, {}, rotation="none", scale=spec.scale
        )
        if weights.shared is not None and spec.shared is not None:
            ones = torch.ones_like(weight_TE[:, :1])
            plain = plain + reference.mixture(
                x, x, ones, weights.shared.A_ERD, weights.shared.B_ERO, {}, rotation="none",
                scale=spec.shared.scale,
            )  # fmt: skip
        base = found.layer.get_base_layer()(x)
    power = sum(probes.power[FIRST].values(), type(next(iter(probes.power[FIRST].values())))())
    expected = {
        "tokens": len(x),
        "added": float(y.square().sum()),
        "output": float((base + y).square().sum()),
        "rotation_off": float((plain - y).square().sum()),
        "uniform": float((even - y).square().sum()),
    }
    assert vars(power) == pytest.approx(expected, rel=1e-9)
    assert probes.power[FIRST].keys() == sample.keys()


def test_a_layer_by_another_way_is_put_back() -> None:
    model = mixture()
    ids = {"input_ids": torch.tensor([[5, 60, 7]])}
    with torch.no_grad():
        before = model(**ids).logits
        with changed(layers(model), "default", NO_ROTATION):
            off = model(**ids).logits
        with changed(layers(model), "default", EVEN):
            assert not torch.allclose(model(**ids).logits, before)
        for found in layers(model).values():
            found.experts.rotation_vector.zero_()
        torch.testing.assert_close(model(**ids).logits, off)
    assert not torch.allclose(off, before)


@pytest.mark.parametrize("rotation", ["tangent", "radar"])
def test_the_static_share_is_that_of_a_fitted_map(rotation: str) -> None:
    """Of full inputs: of the map of each rank, fitted and judged by hand.

    Outputs that radar turns lie outside the span of B.
    """
    model = mixture(rotation=rotation, num_experts=2, top_k=1, norm_topk_prob=False).double()
    parts = {CALIBRATION: rows(1), HELD_OUT: rows(2)}
    probes = Probes(layers(model), tokens=10_000)
    for part, sample in parts.items():
        for task, each in sample.items():
            with probes.listening(task, part, effects=False):
                probes.run(model, batches(each, model))
    assert probes.sketched == []
    share = static_share(probes.sums(FIRST), (1, 2, 4))
    assert share is not None
    found = layers(model)[FIRST].experts
    sides = []
    for sample in parts.values():
        x = inputs(model, FIRST, sample)
        with torch.no_grad():
            _, routing = route(found.spec, x, found.weights())
            weight_TE, chosen_TE = routing.weight_TE, routing.selected_TE
            y = mixed(found.spec, x, x, found.weights(), weight_TE, chosen_TE)
        sides.append((x, y))
    (x, y), (other_x, other_y) = sides
    sums = Sums(x.T @ x, x.T @ y, float(y.square().sum()), len(x))
    for i, rank in enumerate((1, 2, 4)):
        _, A, B = best_map(sums, rank)
        for shares, (x_TD, y_TO) in ((share.calibration, sides[0]), (share.held_out, sides[1])):
            left = (y_TO - x_TD @ A.T @ B.T).square().sum() / y_TO.square().sum()
            assert shares[i] == pytest.approx(float(1 - left), abs=1e-9)
    assert share.tokens == (len(x), len(other_x))
    assert share.power[1] == pytest.approx(float(other_y.square().sum()) / len(other_x))


def test_too_few_tokens_leave_a_lower_bound() -> None:
    """The map then reads what experts, router and rotation read, and some random directions."""
    model = mixture(r=2, num_experts=2, top_k=1, norm_topk_prob=False)
    shares = []
    for tokens in (40, 10_000):
        probes = Probes(layers(model), tokens=tokens)
        for part, sample in ((CALIBRATION, rows(1)), (HELD_OUT, rows(2))):
            for task, each in sample.items():
                with probes.listening(task, part, effects=False):
                    probes.run(model, batches(each, model))
        assert (probes.sketched == list(layers(model))) == (tokens == 40)
        share = static_share(probes.sums(FIRST), (4,))
        assert share is not None
        shares.append(share.calibration[0])
    assert 0.1 < shares[0] < shares[1]


def test_memory_for_sums_is_kept() -> None:
    model = mixture(r=2, num_experts=2, top_k=1, norm_topk_prob=False)
    probes = Probes(layers(model), tokens=10_000, memory=8 * 2 * 4 * 20 * 20)
    assert [basis.shape for basis in probes.reads.values()] == [(32, 20)] * 4
    assert probes.reads.keys() == layers(model).keys()


def test_shares_are_weighed_by_power() -> None:
    assert ranks_up_to(1) == (1,)
    share = inspected().layers[0].static
    assert share is not None
    both = total([share, share])
    assert both is not None
    assert both.held_out == pytest.approx(share.held_out)
    assert both.power == pytest.approx([2 * power for power in share.power])
    assert total([]) is None


def test_answers_cost_what_the_loss_says() -> None:
    model = mixture()
    sample = {"a": [{"input_ids": [5, 60, 7, 8], "labels": [-100, -100, 7, 8]}],
              "b": [{"input_ids": [9, 10, 11]}]}  # fmt: skip
    found = answers_of(model, "default", layers(model), sample)
    with torch.no_grad():

        def loss(row: dict[str, list[int]]) -> float:
            ids = torch.tensor([row["input_ids"]])
            labels = torch.tensor([row.get("labels", row["input_ids"])])
            return float(model(input_ids=ids, labels=labels).loss)

        a, b = (loss(each[0]) for each in sample.values())
        with model.disable_adapter():
            base = loss(sample["a"][0])
    assert found["a"].trained == pytest.approx(a, rel=1e-5)
    assert found["a"].base == pytest.approx(base, rel=1e-5)
    assert found["a"].tokens == 2
    assert found[ALL].trained == pytest.approx((2 * a + 2 * b) / 4, rel=1e-5)
    with torch.no_grad(), changed(layers(model), "default", EVEN):
        assert found["a"].uniform == pytest.approx(loss(sample["a"][0]), rel=1e-5)
    assert found["a"].rotation_off != found["a"].trained


def test_blocks_are_recorded_and_say_what_is_not_measured() -> None:
    torch.manual_seed(0)
    config = rotmole.RotMoleConfig(
        task_type="CAUSAL_LM", r=4, num_experts=3, top_k=2, rotation="tangent",
        router_scope="block", target_modules=["gate_proj", "up_proj", "down_proj"],
        init_weights=False,
    )  # fmt: skip
    model = get_peft_model(base(), config).eval()
    found = inspect_adapter(
        model, Words(), Sample(rows(1, 2), rows(2, 2), "rows"), request=Request("5 6 60")
    )
    assert all(layer.usage and layer.effects == {} for layer in found.layers)
    assert found.static is None
    assert "block-routed" in found.notes[0]
    assert found.answers[ALL].uniform is None
    assert found.answers[ALL].rotation_off is not None
    assert found.passage is not None
    assert len(found.passage.mean.weight[0]) == 3


def test_the_model_is_left_as_it_was() -> None:
    model = mixture().train()
    before = copy.deepcopy(model.state_dict())
    inspect_adapter(model, Words(), Sample(rows(1, 1), rows(2, 1), "rows"))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for found in layers(model).values():
        assert not found.experts._forward_hooks
        assert not found.experts._forward_pre_hooks


def test_what_was_measured_does_not_hang_on_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    one = inspected()
    monkeypatch.setattr("rotmole.inspection.sample.BATCH", 1)
    other = inspected()
    for a, b in zip(one.layers, other.layers, strict=True):
        assert a.usage[ALL].choices == b.usage[ALL].choices
        assert a.static is not None
        assert b.static is not None
        assert a.static.held_out == pytest.approx(b.static.held_out, abs=1e-6)
        assert a.effects[ALL].uniform == pytest.approx(b.effects[ALL].uniform, rel=1e-5)
