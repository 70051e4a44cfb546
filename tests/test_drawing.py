"""Figures for pages: no fixed colours, no fixed size, ids that do not collide."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from rotmole.drawing import BETTER, INK, THEME, draw, legend, series, standalone


def paint(figure) -> None:
    axes = figure.subplots()
    for index in range(12):
        axes.plot([0, 1], [index, index + 1], label=f"$x_{index} & Ω≈漢", **series(index))
    axes.axhline(0, color=INK)
    axes.plot(0.5, 0.5, "o", color=BETTER, mfc="none")
    legend(figure, axes)


@pytest.fixture(scope="module")
def svg() -> str:
    return draw(paint, name="lines", label='a "figure" <of> lines', height=3)


def test_every_colour_is_the_pages(svg):
    assert not re.findall(r"#[0-9a-f]{6}", svg)
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", svg))
    assert {"ink", "faint", "better", "series-0", "series-9"} <= used
    light, dark = THEME.split("@media")
    for name in used:
        assert f"--{name}: #" in light
        assert f"--{name}: #" in dark


def test_the_element_takes_the_width_of_the_page(svg):
    root = ElementTree.fromstring(svg)
    assert "width" not in root.attrib
    assert root.attrib["viewBox"] == "0 0 345.6 216"
    assert root.attrib["aria-label"] == 'a "figure" <of> lines'
    assert "<style" not in svg  # a style within would act on the whole page


def test_ids_begin_with_the_name_and_are_all_found(svg):
    ids = set(re.findall(r'\sid="([^"]+)"', svg))
    assert all(name.startswith("lines-") for name in ids)
    assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg)) <= ids


def test_text_stays_text(svg):
    assert "$x_3 &amp; Ω≈漢" in svg
    assert "DejaVu" not in svg


def test_the_same_figure_is_the_same_text(svg):
    assert draw(paint, name="lines", label='a "figure" <of> lines', height=3) == svg


def test_a_file_of_its_own_has_the_colours(svg):
    text = standalone(svg)
    root = ElementTree.fromstring(text.encode())
    assert root[0].tag.endswith("style")
    assert root[0].text.strip() == THEME


def test_series_differ_up_to_the_fortieth():
    looks = [(s["color"], s["linestyle"]) for s in map(series, range(40))]
    assert len(set(looks)) == 40
