"""Planted truths: each is named, with its layer, task, experts and number, and nothing else is."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from planted_cases import FIRST, RIGHT_ANGLE, SECOND, inspected
from rotmole.inspection.diagnose import RULES
from rotmole.inspection.inspection import Verdict
from rotmole.inspection.probe import Found

Plant = Callable[[dict[str, Found]], None]


def only(plant: Plant, **settings: object) -> Verdict:
    """Inspect a planted mixture, of which one thing alone is to be said."""
    found = inspected(plant, **settings).verdicts
    assert [verdict.name for verdict in found] == [found[0].name], found
    return found[0]


@pytest.mark.parametrize("settings", [{}, {"rotation": "none"}, {"rotation": "plane"},
                                      {"selection": "dense"}, {"num_experts": 8, "top_k": 4}],
                         ids=["tangent", "none", "plane", "dense", "eight"])  # fmt: skip
def test_of_a_healthy_mixture_nothing_is_said(settings: dict[str, object]) -> None:
    assert inspected(**settings).verdicts == ()


def test_one_expert_for_all_tokens_is_a_collapse() -> None:
    def plant(layers: dict[str, Found]) -> None:
        layers[SECOND].experts.router_weight[2, 0] += 40.0

    verdict = only(plant, top_k=1, norm_topk_prob=False)
    assert (verdict.name, verdict.layers, verdict.experts) == ("collapsed", (SECOND,), (2,))
    assert verdict.value == 1.0
    assert "1 of 4 layers: 1 q_proj: expert 2 of 4 has 100 % of the choices" in verdict.sentence


def test_an_expert_that_no_token_selects_is_dead() -> None:
    def plant(layers: dict[str, Found]) -> None:
        layers[FIRST].experts.router_weight[3, 0] -= 40.0

    verdict = only(plant)
    assert (verdict.name, verdict.layers, verdict.experts) == ("dead expert", (FIRST,), (3,))
    assert verdict.value == 0
    assert "0 q_proj: expert 3 of 4, selected by 0 of 768 tokens" in verdict.sentence


def test_a_layer_that_adds_nothing_is_dead() -> None:
    def plant(layers: dict[str, Found]) -> None:
        layers[SECOND].experts.expert_B.zero_()

    verdict = only(plant)
    assert (verdict.name, verdict.layers, verdict.value) == ("dead layer", (SECOND,), 0.0)
    assert "dead layers, 1 of 4: 1 q_proj adds 0" in verdict.sentence


def test_a_router_as_it_was_drawn_never_moved() -> None:
    def plant(layers: dict[str, Found]) -> None:
        weight = layers[FIRST].experts.router_weight
        weight.clamp_(-1 / math.sqrt(32), 1 / math.sqrt(32))

    verdict = only(plant)
    assert (verdict.name, verdict.layers, verdict.value) == (
        "router that never moved", (FIRST,), 0.0
    )  # fmt: skip


def test_a_rotation_by_tiny_angles_does_nothing() -> None:
    def plant(layers: dict[str, Found]) -> None:
        layers[FIRST].experts.rotation_vector.mul_(1e-4)

    verdict = only(plant)
    assert (verdict.name, verdict.layers) == ("rotation that does nothing", (FIRST,))
    assert 0 < verdict.value < 1e-3


def test_the_worst_layer_comes_first() -> None:
    """The smallest change without rotation, the largest likeness of experts."""

    def idle(layers: dict[str, Found]) -> None:
        layers[FIRST].experts.rotation_vector.mul_(1e-3)
        layers[SECOND].experts.rotation_vector.mul_(1e-4)

    verdict = only(idle)
    assert verdict.layers == (SECOND, FIRST)
    assert verdict.sentence.startswith("the rotation does nothing in 2 of 4 layers: 1 q_proj")

    def alike(layers: dict[str, Found]) -> None:
        for path, far in ((FIRST, 0.01), (SECOND, 0.0)):
            for name in ("expert_A", "expert_B", "rotation_vector"):
                tensor = getattr(layers[path].experts, name)
                tensor[3] = (1 + far) * tensor[1]

    verdict = only(alike)
    assert verdict.layers == (SECOND, FIRST)
    assert verdict.value == pytest.approx(1.0)


def test_turning_in_one_plane_is_named() -> None:
    def plant(layers: dict[str, Found]) -> None:
        experts = layers[FIRST].experts
        experts.expert_A[:, 2:] = 0.0
        experts.rotation_vector[:, 2:] = 0.0

    verdict = only(plant)
    assert (verdict.name, verdict.layers) == ("planes all alike", (FIRST,))
    assert verdict.experts == (0, 1, 2, 3)
    assert verdict.value > 0.999


def test_two_equal_experts_are_duplicates() -> None:
    def plant(layers: dict[str, Found]) -> None:
        experts = layers[SECOND].experts
        for name in ("expert_A", "expert_B", "rotation_vector"):
            tensor = getattr(experts, name)
            tensor[3] = tensor[1]

    verdict = only(plant)
    assert (verdict.name, verdict.layers) == ("duplicate experts", (SECOND,))
    assert verdict.experts == (1, 3)
    assert verdict.value == pytest.approx(1.0)
    assert "1 q_proj: experts 1 and 3 are alike to 1.000" in verdict.sentence


def test_a_mixture_with_constant_weights_is_one_lora() -> None:
    """Of four experts of rank 2 with weights that no token changes: a LoRA of rank 8."""

    def plant(layers: dict[str, Found]) -> None:
        for found in layers.values():
            found.experts.router_weight.zero_()

    found = inspected(plant, rotation="none", selection="dense", r=2)
    named = {verdict.name: verdict for verdict in found.verdicts}
    verdict = named["mixture that is one LoRA"]
    assert verdict.value > 0.999
    assert "static map of rank 8: a LoRA of rank 8 would do" in verdict.sentence
    assert found.static is not None
    assert found.static.ranks == (1, 2, 4, 8)
    assert found.static.held_out[-1] == pytest.approx(found.static.linear[1])


def test_an_expert_that_turns_one_task_alone_is_named() -> None:
    """Expert 1 of the first layer turns the tokens of "fr" by a right angle, and no others."""

    def plant(layers: dict[str, Found]) -> None:
        experts = layers[FIRST].experts
        experts.rotation_angle[1] = 0.0
        experts.rotation_angle[1, :, 1] = RIGHT_ANGLE

    verdict = only(plant, rotation="givens")
    assert (verdict.name, verdict.layers, verdict.experts) == (
        "task turned alone", (FIRST,), (1,)
    )  # fmt: skip
    assert verdict.task == "fr"
    assert verdict.value == pytest.approx(RIGHT_ANGLE, abs=1e-3)
    assert not verdict.is_fault


def test_experts_that_follow_the_language_are_named() -> None:
    def plant(layers: dict[str, Found]) -> None:
        weight = layers[FIRST].experts.router_weight
        for expert, sign in enumerate((1, -1, 1, -1)):  # 0 and 2 for "fr", 1 and 3 for "de"
            weight[expert, 0], weight[expert, 1] = -20.0 * sign, 40.0 * sign

    verdict = only(plant)
    assert (verdict.name, verdict.layers) == ("task-expert affinity", (FIRST,))
    assert (verdict.task, verdict.experts) in [
        ("fr", (0,)),
        ("fr", (2,)),
        ("de", (1,)),
        ("de", (3,)),
    ]
    assert verdict.value == pytest.approx(1.0)
    assert "the group says 100 %" in verdict.sentence
    assert "gets 50 % of the choices" in verdict.sentence
    assert "0 % of those of the others" in verdict.sentence
    assert not verdict.is_fault


def test_the_docs_have_every_rule() -> None:
    """Its words with its threshold, in the order of the table."""
    page = (Path(__file__).parents[2] / "docs" / "inspect.md").read_text(encoding="utf-8")
    shown = page.replace("\\|", "|").splitlines()
    lines = [f"| {r.name} | {r.words.format(f'{r.threshold:g}')} |" for r in RULES]
    places = [shown.index(line) for line in lines]
    assert places == list(range(places[0], places[0] + len(RULES)))
    assert [rule.is_fault for rule in RULES] == [True] * 8 + [False] * 2
