"""Tokens of a text, and what two experts reach, beside the layer itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial import ConvexHull

import rotmole
from planted_cases import FIRST, RIGHT_ANGLE, SECOND, Words, inspected, layers, mixture
from rotmole.inspection.inspect import Request
from rotmole.inspection.inspection import Inspection
from rotmole.inspection.pages.summary import token_lines
from rotmole.inspection.passage import matching, passage_of
from rotmole.inspection.reach import reach_of

TEXT = "5 60 7 61"


def test_each_token_has_the_weights_and_angles_of_its_layer() -> None:
    """Tokens of "fr" are turned by a right angle in the first layer by expert 1."""
    model = mixture(rotation="givens")
    with torch.no_grad():
        experts = layers(model)[FIRST].experts
        experts.rotation_angle.zero_()
        experts.rotation_angle[1, :, 1] = RIGHT_ANGLE
        experts.rotation_angle[0] = 1.0  # no token selects it
        experts.router_weight.zero_()
        experts.router_weight[1, 0] = experts.router_weight[3, 0] = 10.0  # both for every token
    found = passage_of(model, "default", Words(), TEXT, [FIRST])
    assert found.tokens == ("5", "60", "7", "61")
    routing = found.layers[FIRST]
    assert np.array(routing.weight) == pytest.approx(np.array([[0, 0.5, 0, 0.5]] * 4))
    assert routing.angle is not None
    expected = [[0, 0, 0, 0], [0, RIGHT_ANGLE, 0, 0]] * 2
    assert np.array(routing.angle) == pytest.approx(np.array(expected), abs=1e-5)
    each = passage_of(model, "default", Words(), TEXT, list(layers(model))).layers
    weights = np.array([one.weight for one in each.values()])
    assert np.array(found.mean.weight) == pytest.approx(weights.mean(0))
    turned = np.abs(np.array([one.angle for one in each.values()]))
    mean = turned.sum(0) / np.maximum((weights > 0).sum(0), 1)  # of the layers that selected it
    assert np.array(found.mean.angle) == pytest.approx(mean)


def test_a_text_is_part_of_an_inspection() -> None:
    found = inspected(request=Request(TEXT, "layers.1.*q_proj", answers=False))
    assert found.passage is not None
    assert list(found.passage.layers) == [SECOND]
    assert Inspection.from_dict(found.to_dict()) == found


def test_layers_are_found_by_a_part_of_their_path() -> None:
    paths = [FIRST, SECOND]
    assert matching(paths, None) == []
    assert matching(paths, "q_proj") == paths
    assert matching(paths, "layers.1.*q_") == [SECOND]
    with pytest.raises(rotmole.ConfigError, match=r"--layer 'k_proj' names no adapted layer"):
        matching(paths, "k_proj")


def test_lines_of_tokens_fit_the_screen_and_show_the_largest() -> None:
    found = inspected(request=Request(TEXT, answers=False), num_experts=4).passage
    assert found is not None
    lines = token_lines(found.tokens, found.mean)
    assert lines[0] == ["token", "expert 0", "expert 1", "expert 2", "expert 3"]
    assert [line[0] for line in lines[1:]] == list(found.tokens)
    weight, angles = found.mean.weight[0][0], found.mean.angle
    assert angles is not None
    assert lines[1][1].endswith(f" {weight:.2f} {angles[0][0]:+.2f}")
    many = inspected(request=Request(TEXT, answers=False), num_experts=12, top_k=3).passage
    assert many is not None
    (_, *rest) = token_lines(many.tokens, many.mean)
    first = max(range(12), key=lambda e: many.mean.weight[0][e])
    assert rest[0][1].startswith(f"{first}: ")
    assert f" {many.mean.weight[0][first]:.2f} " in rest[0][1]
    # in a frame of rich, with the longest token
    assert max(14 + len(line[1]) + 7 for line in rest) <= 80
    assert max(14 + sum(map(len, line[1:])) + 16 for line in lines) <= 80


def test_reach_is_what_the_layer_can_do_with_its_outputs() -> None:
    """Corners and circles by hand, in the plane of both outputs."""
    model = mixture().double()
    ids = [5, 60, 7, 61]
    reach = reach_of(model, "default", Words(), ids, FIRST)
    assert reach is not None
    found = layers(model)[FIRST].experts
    x = model.get_input_embeddings().weight[int(reach.token)].detach()
    x = x / x.square().mean().sqrt()  # the norm before the layer
    first, second = reach.experts
    A, B, Q = (t.detach() for t in (found.expert_A, found.expert_B, found.rotation_vector))
    v = [found.spec.scale * (A[e] @ x) @ B[e] for e in (first, second)]
    lengths = [math.hypot(*point) for point in reach.outputs]
    assert lengths == pytest.approx([float(each.norm()) for each in v], rel=1e-4)
    inner = sum(a * b for a, b in zip(*reach.outputs, strict=True))
    assert inner == pytest.approx(float(v[0] @ v[1]), rel=1e-3, abs=1e-3)
    assert reach.outputs[0][1] == pytest.approx(0, abs=1e-9)
    # tangent turns towards q: the circle of the first expert in span(z, q)
    z, q = A[first] @ x, Q[first] @ x
    across = q - (q @ z) / (z @ z) * z
    across = across / across.norm() * z.norm()
    axis = v[0] / v[0].norm()
    other = v[1] - (v[1] @ axis) * axis
    quarter = found.spec.scale * across @ B[first]
    expected = (float(quarter @ axis), float(quarter @ other / other.norm()))
    point = reach.turned[3 + 12]  # after 0 and both outputs: a quarter of the way around
    assert point == pytest.approx(expected, rel=1e-3, abs=1e-3)
    inside = ConvexHull(np.array(reach.turned)).equations
    for x_, y_ in reach.scaled:
        assert (inside @ [x_, y_, 1] <= 1e-9).all()


def test_without_rotation_nothing_is_reached_by_it() -> None:
    model = mixture(rotation="none")
    assert reach_of(model, "default", Words(), [5, 60], FIRST) is None
