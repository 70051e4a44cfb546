"""Figures for pages: no fixed colours, no fixed size, ids that do not collide."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from matplotlib import rc_context

from rotmole.drawing import BETTER, FAINT, INK, THEME, draw, legend, pdf, series, standalone


def paint(figure) -> None:
    axes = figure.subplots()
    for index in range(12):
        axes.plot([0, 1], [index, index + 1], label=f"$x_{index} & Ω≈漢", **series(index))
    axes.axhline(0, color=INK)
    axes.plot(0.5, 0.5, "o", color=BETTER, mfc="none")
    axes.fill_between([0, 1], 0, 1, color=series(1)["color"], alpha=0.25, lw=0)
    axes.bar([0], [1], facecolor=series(2)["color"], alpha=0.5, edgecolor=FAINT)
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
    assert "<style" not in svg  # a style within would act on the whole page


def test_readers_who_cannot_see_it_hear_what_it_is(svg):
    root = ElementTree.fromstring(svg)
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-labelledby"] == "lines-title"
    assert root[0].text == 'a "figure" <of> lines'
    words = "from 0 & 1"
    told = ElementTree.fromstring(draw(paint, name="a", label="b", height=3, description=words))
    assert told.attrib["aria-labelledby"] == "a-title a-desc"
    assert (told[1].attrib["id"], told[1].text) == ("a-desc", words)


def test_ids_begin_with_the_name_and_are_all_found(svg):
    ids = set(re.findall(r'\sid="([^"]+)"', svg))
    assert all(name.startswith("lines-") for name in ids)
    assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg)) <= ids


def test_a_rounding_of_another_processor_changes_no_id(svg):
    """matplotlib hashes coordinates, and the last digit of one is the processor's."""

    def shifted(figure) -> None:
        paint(figure)
        figure.set_figwidth(figure.get_figwidth() * (1 + 1e-13))

    there = draw(shifted, name="lines", label='a "figure" <of> lines', height=3)
    assert re.findall(r'id="[^"]+', there) == re.findall(r'id="[^"]+', svg)


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
    assert (root.attrib["width"], root.attrib["height"]) == ("345.6pt", "216pt")


def test_series_differ_up_to_the_fortieth():
    looks = [(s["color"], s["linestyle"]) for s in map(series, range(40))]
    assert len(set(looks)) == 40


def test_a_pdf_has_the_light_colours_and_letters_that_can_be_edited():
    with rc_context({"pdf.compression": 0}):
        text = pdf(paint, height=3).decode("latin-1")
        assert pdf(paint, height=3).decode("latin-1") == text
    assert text.startswith("%PDF")
    assert "/Subtype /Type3" not in text
    assert "CreationDate" not in text
    colors = set(re.findall(r"([0-9.]+ [0-9.]+ [0-9.]+) (?:rg|RG)\b", text))
    levels = {tuple(round(255 * float(v)) for v in color.split()) for color in colors}
    light, _ = THEME.split("@media")
    known = {tuple(bytes.fromhex(value)) for value in re.findall(r"#([0-9a-f]{6})", light)}
    assert levels <= known | {(0, 0, 0)}
    assert {(0x1B, 0x1F, 0x24), (0x00, 0x72, 0xB2), (0xC7, 0x46, 0x00)} <= levels


def test_forty_series_differ_as_lines_and_as_points_without_lines() -> None:
    for left_out in ("fillstyle", "linestyle"):
        shown = [{k: v for k, v in series(n).items() if k != left_out} for n in range(40)]
        assert len({tuple(style.items()) for style in shown}) == 40
