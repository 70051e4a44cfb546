"""Figures of an inspection against known data: a wrong axis, label, task or order fails."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from inspected_cases import BINS, RANKS, TASKS, angle_of, curves, made_inspection, share_of
from rotmole.inspection.inspection import ALL
from rotmole.inspection.pages import figures, turning

DEPTHS = 3
BIN = 2 * math.pi / BINS


@pytest.fixture(scope="module")
def inspection():
    return made_inspection(layers=DEPTHS)


def painted(plot) -> list:
    """The visible axes of a figure."""
    figure = Figure()
    plot.paint(figure)
    return [axes for axes in figure.axes if axes.get_visible()]


def line(axes, label: str) -> np.ndarray:
    """The points [N, 2] of the line with a label."""
    (found,) = [found for found in axes.lines if found.get_label() == label]
    return found.get_xydata()


def column(plot, name: str) -> list[str]:
    """A column of a figure's table."""
    place = plot.sheet.head.index(name)
    return [line[place].text for line in plot.sheet.lines]


def test_angles_by_layer_are_those_of_the_most_turned_expert_task_by_task(inspection):
    plot = turning.angles_by_layer(inspection)
    assert "expert 3 of v_proj" in plot.title
    panels = painted(plot)
    assert [axes.get_title() for axes in panels] == list(TASKS)
    for task, axes in enumerate(panels):
        middle = axes.lines[0].get_xydata()
        expected = [angle_of(depth, 1, 3, task) for depth in range(DEPTHS)]
        np.testing.assert_allclose(middle, list(enumerate(expected)), atol=1e-5)
        wide, narrow = (band.get_paths()[0].get_extents().intervaly for band in axes.collections)
        ends = np.array([expected[0], expected[-1]])
        np.testing.assert_allclose(wide, ends + np.array([-0.45, 0.45]) * BIN, atol=1e-5)
        np.testing.assert_allclose(narrow, ends + np.array([-0.25, 0.25]) * BIN, atol=1e-5)
        assert column(plot, TASKS[task]) == [
            f"{v:+.2f} [{v - 0.45 * BIN:+.2f}, {v + 0.45 * BIN:+.2f}]" for v in expected
        ]
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ["0", "1", "2"]
    assert panels[0].get_xticks().tolist() == [0, 1, 2]
    for words in ("angle (radians)", "layer", *TASKS):
        assert f">{words}<" in plot.svg


def test_one_task_has_one_panel_of_all_tokens():
    plot = turning.angles_by_layer(made_inspection(layers=2, tasks=("dates",)))
    assert [axes.get_title() for axes in painted(plot)] == ["all tokens"]
    assert plot.sheet.head == ("layer", "all tokens")


def test_a_layer_without_neighbours_is_a_dot():
    values = np.full(60, math.nan)
    values[[0, 7, 20, 21, 59]] = 1.0
    assert turning._dots(values) == [0, 7, 59]
    assert turning._dots(values[:3]) == [0, 1, 2]


def test_the_histogram_is_of_the_layer_in_which_tasks_differ_most(inspection):
    layers = list(inspection.layers)
    for place, layer in enumerate(layers):  # only layer 1 of v_proj knows the task
        if (layer.depth, layer.module) != (1, "v_proj"):
            same = replace(layer.usage["units"], angles=layer.usage["dates"].angles)
            layers[place] = replace(layer, usage={**layer.usage, "units": same})
    plot = turning.angle_histogram(replace(inspection, layers=tuple(layers)))
    assert plot.title == "Rotation angles of expert 3 of v_proj, layer 1, by task"
    (axes,) = painted(plot)
    assert axes.get_xlabel() == "angle (radians)"
    assert axes.get_ylabel() == "share of choices (%)"
    for task, steps in enumerate(axes.patches):
        data = steps.get_data()
        assert steps.get_label() == TASKS[task]
        place = int(np.argmax(data.values))
        middle = (data.edges[place] + data.edges[place + 1]) / 2
        assert math.isclose(middle, angle_of(1, 1, 3, task), abs_tol=1e-6)
        assert data.values[place] == 100
        assert column(plot, TASKS[task])[place] == "100 %"


def test_the_histogram_shows_tasks_that_share_no_token_with_one_another():
    made = made_inspection(layers=1, tasks=("dates/de", "dates/fr", "units/de"))
    assert turning.angle_histogram(made).sheet.head == ("angle", "dates", "units")
    assert turning.angles_by_layer(made).sheet.head == ("layer", "dates", "units", "de", "fr")
    one = made_inspection(layers=1, tasks=("dates/de", "dates/fr"))
    assert turning.angle_histogram(one).sheet.head == ("angle", "de", "fr")


def test_quantiles_of_a_known_histogram():
    edges = np.linspace(0, 10, 11)
    assert turning.quantiles(edges, np.ones(10)) == [0.5, 2.5, 5.0, 7.5, 9.5]
    assert all(map(math.isnan, turning.quantiles(edges, np.zeros(10))))


def test_planes_show_angle_and_plane_under_their_names(inspection):
    plot = turning.planes(inspection)
    (axes,) = painted(plot)
    assert line(axes, "angle")[:, 1].tolist() == [1.0] * DEPTHS
    np.testing.assert_allclose(line(axes, "plane")[:, 1], 0.4)
    means = [
        np.mean([angle_of(d, m, e, t) for m in (0, 1) for e in range(4) for t in (0, 1)])
        for d in range(DEPTHS)
    ]
    assert column(plot, "mean angle") == [f"{mean:.3f}" for mean in means]
    assert column(plot, "> 0.5") == ["100 %"] * DEPTHS


def test_reach_has_both_areas_and_both_experts_in_their_plane(inspection):
    plot = turning.reach(inspection)
    assert plot.title == "Outputs that experts 0 and 1 of layer 2 q_proj reach"
    (axes,) = painted(plot)
    np.testing.assert_allclose(line(axes, "expert 0, not turned"), [[0, 0], [1, 0]])
    np.testing.assert_allclose(line(axes, "expert 1, not turned"), [[0, 0], [0.3, 0.8]])
    np.testing.assert_allclose(line(axes, "expert 0, as turned"), [[0, 0], [0.9, 0.2]])
    np.testing.assert_allclose(line(axes, "expert 1, as turned"), [[0, 0], [0.1, 0.7]])
    corners = {tuple(np.round(point, 6)) for point in line(axes, "scaling alone")}
    assert corners == {(0.0, 0.0), (1.0, 0.0), (0.3, 0.8), (1.3, 0.8)}
    assert len(line(axes, "scaling and rotation")) == 25  # 24 corners, closed
    assert axes.get_xlabel() == "along expert 0's output"
    assert axes.get_ylabel() == "across, towards expert 1"
    assert column(plot, "area")[-2] == "0.8"
    assert "'·März'" in plot.caption


def test_the_outline_of_points_on_a_line_is_its_ends():
    assert turning.outline([(0, 0), (1, 2), (0.5, 1)]).tolist() in (
        [[0, 0], [1, 2]], [[1, 2], [0, 0]],
    )  # fmt: skip


def test_similarity_takes_the_two_most_alike_and_the_mean(inspection):
    layers = list(inspection.layers)
    table = [list(row) for row in layers[2].experts.cosine]
    table[3][1] = table[1][3] = -0.9
    unknown = ((None,) * 4,) * 4  # of experts that are zero
    experts = replace(layers[2].experts, cosine=tuple(map(tuple, table)), input_angle=unknown)
    layers[2] = replace(layers[2], experts=experts)
    plot = figures.similarity(replace(inspection, layers=tuple(layers)))
    (axes,) = painted(plot)
    one = [0.1 * (d + 1) / DEPTHS for d in range(DEPTHS)]
    most, middle = line(axes, "most alike")[:, 1], line(axes, "mean")[:, 1]
    np.testing.assert_allclose(most, [one[0], 0.9, one[2]])
    np.testing.assert_allclose(middle, [one[0], one[1] + (0.9 - one[1]) / 12, one[2]])
    assert column(plot, "inputs") == ["1.50"] * DEPTHS
    assert column(plot, "outputs") == ["1.20"] * DEPTHS


def test_static_share_is_that_of_held_out_rows_by_rank(inspection):
    plot = figures.static_share(inspection)
    (axes,) = painted(plot)
    for rank in RANKS:
        expected = [80 - 40 / rank - depth for depth in range(DEPTHS)]
        np.testing.assert_allclose(line(axes, f"rank {rank}")[:, 1], expected)
        assert column(plot, f"rank {rank}")[1:] == [f"{v:.0f} %" for v in expected]
    np.testing.assert_allclose(line(axes, "any rank")[:, 1], 85)
    assert [cell.text for cell in plot.sheet.lines[0]] == [
        "all", "40 %", "60 %", "80 %", "90 %", "91 %",
    ]  # fmt: skip


def test_lines_differ_without_colour_however_many_points_they_have():
    large = made_inspection(layers=60, modules=("q_proj",), tasks=("a", "b", "c", "d"))
    for plot in (figures.static_share(large), figures.effects(large), turning.planes(large)):
        (axes,) = painted(plot)
        looks = [(found.get_marker(), found.get_linestyle()) for found in axes.lines]
        assert len(set(looks)) == len(looks) > 1
        assert "None" not in [marker for marker, style in looks if style == "-"]
    (axes,) = painted(turning.angle_histogram(large))
    assert len({steps.get_linestyle() for steps in axes.patches}) == 4


def test_static_share_weighs_modules_by_what_they_add(inspection):
    layers = [
        replace(x, static=replace(x.static, held_out=(float(x.module == "v_proj"),) * len(RANKS)))
        for x in inspection.layers
    ]
    (axes,) = painted(figures.static_share(replace(inspection, layers=tuple(layers))))
    np.testing.assert_allclose(line(axes, "rank 1")[:, 1], 100 * 2 / 3)  # powers 1 and 2


def test_effects_keep_rotation_and_routing_apart(inspection):
    plot = figures.effects(inspection)
    (axes,) = painted(plot)
    np.testing.assert_allclose(line(axes, "rotation off")[:, 1], [1, 2, 3])
    np.testing.assert_allclose(line(axes, "routing uniform")[:, 1], [2, 4, 6])
    assert column(plot, "added") == ["10 %", "11 %", "12 %"]
    assert "%" in axes.get_ylabel()


def test_convergence_has_a_line_for_each_run(inspection):
    other = made_inspection(layers=1, target="runs/other")
    other = replace(other, source=replace(other.source, curves=curves(TASKS, shift=0.5)))
    plots = figures.convergence([inspection, other])
    assert [plot.name for plot in plots] == [
        "convergence-training", "convergence-dates", "convergence-units",
    ]  # fmt: skip
    for task, plot in zip(("", *TASKS), plots, strict=True):
        (axes,) = painted(plot)
        for name, shift in (("runs/made", 0.0), ("runs/other", 0.5)):
            np.testing.assert_allclose(line(axes, name), curves(TASKS, shift)[task])
        assert axes.get_xlabel() == "update"
        assert axes.get_ylabel() == f"{'validation' if task else 'training'} loss (nats)"
    assert column(plots[1], "runs/other") == ["3.500", "2.500", "2.167", "2.000"]


def test_maps_have_the_share_of_each_expert_in_its_place(inspection):
    found = {plot.name: plot for plot in figures.maps(inspection)}
    for task, name in enumerate(TASKS):
        plot = found[f"usage-{name}"]
        assert plot.title == f"Share of each expert by layer: {name}"
        (axes,) = painted(plot)
        texts = {text.get_position(): text.get_text() for text in axes.texts}
        for y in range(2 * DEPTHS):
            for expert in range(4):
                share = share_of(y // 2, expert, task, 4)
                assert texts[expert, y] == f"{100 * share:.0f} %"
        assert [t.get_text() for t in axes.get_yticklabels()][:3] == [
            "0 q_proj", "0 v_proj", "1 q_proj",
        ]  # fmt: skip
    assert set(found) == {"usage-dates", "usage-units", "similarity-matrix"}


def test_files_of_tasks_have_names_that_every_file_system_takes():
    tasks = ("a..b", "漢字", "a b")
    made = made_inspection(layers=1, modules=("q_proj",), tasks=tasks)
    assert [plot.name for plot in figures.maps(made)] == [
        "usage-a-b", "usage-2", "usage-a-b-3", "similarity-matrix",
    ]  # fmt: skip
    assert [plot.name for plot in figures.convergence([made])] == [
        "convergence-training", "convergence-a-b", "convergence-2", "convergence-a-b-3",
    ]  # fmt: skip


def test_without_rotation_routing_or_rows_there_is_nothing_to_draw(inspection):
    plain = made_inspection(layers=1, rotation="none")
    assert [plot.name for plot in figures.plots(plain)] == [
        "similarity", "static-share", "effects",
    ]  # fmt: skip
    assert "rotation off" not in figures.effects(plain).sheet.head
    bare = [replace(x, usage={}, experts=None, static=None, effects={}) for x in inspection.layers]
    assert figures.plots(replace(inspection, layers=tuple(bare))) == []
    empty = replace(inspection.source, curves={})
    assert figures.convergence([replace(inspection, source=empty)]) == []
    assert ALL not in TASKS
