"""Tables, Markdown and the page of a study: complete, safe, narrow, from study.json alone."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from judged_cases import TASKS, made_results
from rotmole.comparison.judge import judge
from rotmole.comparison.judgement import read_judgement, write_judgement
from rotmole.comparison.pages import tables
from rotmole.comparison.pages.figures import convergence, drawings, heat_map
from rotmole.comparison.pages.page import Drawn, drawn, html, markdown, write_pages
from rotmole.evaluation.render import plain_text

SHIFTS = {"lora": 0.0, "moe_lora": 0.05, "rotmole": -0.05, "always_on": 0.001}


@pytest.fixture(scope="module")
def judged():
    return judge(made_results(SHIFTS, seconds={"rotmole": 200}))


@pytest.fixture(scope="module")
def figures(judged):
    return drawn(judged)


class Page(HTMLParser):
    """What a browser would act on."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_holds_all_it_needs_and_runs_nothing(judged, figures):
    text = html(judged, "Title", figures)
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert page.tags.count("svg") == len(figures.plain) + len(figures.clock) == 9
    addresses = [value for name, value in page.attributes if name in ("href", "src", "xlink:href")]
    assert all(address.startswith("#") for address in addresses)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_every_number_of_the_tables_is_on_the_page_and_in_the_text(judged, figures):
    page, text = html(judged, "Title", figures), markdown(judged, "Title", figures)
    measures = judged.measures
    for lines in (
        tables.overview(judged), *(tables.differences(judged, m) for m in measures),
        tables.seconds(judged), tables.trials(judged),
        tables.at_budget(judged, judged.at_equal_flops, "operations"),
    ):  # fmt: skip
        for cell in (cell for line in lines for cell in line if cell):
            assert cell in page
            assert cell in text
    for lines in map(tables.by_task, [judged] * 2, measures):
        for cell in (cell for line in lines[1:] for cell in line):
            assert cell in page  # in the heat map
            assert cell in text
    for remark in tables.remarks(judged):
        assert remark in text


def test_the_page_says_what_each_method_is(judged):
    """Names alone do not: what the study file says of a method, and its size."""
    assert tables.methods(judged) == []  # made-up studies have no file
    planned = {
        "lora": {"written": {"adapter.peft_type": "LORA", "adapter.r": 26},
                 "solved": None, "value": None, "raised_layers": 0},
        "slow": {"written": {"adapter.preset": "moe_lora", "optimizer.scaling_gate_lr": 2e-4},
                 "solved": "r", "value": 3, "raised_layers": 21},
    }  # fmt: skip
    judged = replace(judged, study={**judged.study, "methods": planned})
    assert tables.methods(judged)[1:] == [
        ["lora", "peft_type LORA, r 26", ""],
        ["slow", "preset moe_lora, optimizer.scaling_gate_lr 0.0002", "r 3, 4 in 21 layers"],
    ]
    none = Drawn([], [])
    for text in (html(judged, "Title", none), markdown(judged, "Title", none)):
        assert "preset moe_lora, optimizer.scaling_gate_lr 0.0002" in text


def test_names_are_text_and_no_markup():
    judged = judge(made_results({"<b>lora</b>": 0.0, "a|b": 0.1}))
    page = html(judged, "<i>title</i>", drawn(judged))
    assert "<b>" not in page
    assert "<i>" not in page
    assert "&lt;b&gt;lora" in page
    assert "a\\|b" in markdown(judged, "t", Drawn([], []))


def test_pages_come_from_study_json_alone(judged, tmp_path):
    again = read_judgement(write_judgement(judged, tmp_path / "study.json"))
    first = write_pages(judged, tmp_path, "Title")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert write_pages(again, tmp_path, "Title") == first
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    linked = re.findall(r"\((figures/[^)]+)\)", first[1].read_text(encoding="utf-8"))
    assert len(linked) == 9
    for name in linked:
        ElementTree.parse(tmp_path / name)


def test_tables_of_the_screen_fit_80_columns(judged):
    for title, lines in tables.screen(judged):
        assert max(map(len, [title, *plain_text(lines).splitlines()])) <= 80
    few = judge(made_results(SHIFTS, seeds=(0, 1), tuned=False))
    for title, lines in tables.screen(few):
        assert max(map(len, [title, *plain_text(lines).splitlines()])) <= 80
    title = tables.screen(few)[0][0]
    assert title == "rates not tuned, two seeds: shows the tool, decides nothing"


def test_many_methods_converge_in_panels_with_the_baseline(judged):
    def bands(drawing):
        return drawing.svg.count("-FillBetweenPolyCollection_")

    many, few = convergence(judged, "update"), judge(made_results({"lora": 0.0, "moe_lora": 0.1}))
    assert bands(many) == 2 * len(judged.others())
    assert "Each panel: a method and the baseline." in many.caption
    assert bands(convergence(few, "update")) == 2
    assert "panel" not in convergence(few, "update").caption


def test_a_study_of_one_seed_without_tuning_curves_or_tasks_has_a_page():
    results = made_results({"lora": 0.0, "moe": 0.1}, seeds=(0,), tuned=False, tasks={"all": ()})
    bare = [replace(c, curve=(), difference=None) for c in results.final]
    judged = judge(replace(results, final=tuple(bare)))
    assert [drawing.name for drawing in drawings(judged)] == [
        "score-by-parameters", "differences-nll", "differences-own-metric",
    ]  # fmt: skip
    page = html(judged, "Title", drawn(judged))
    assert "Tuning" not in page
    assert tables.differences(judged, judged.measures[0])[1][1].startswith("+0.1")
    assert Page(page).open == []


def test_a_method_that_diverged_and_one_without_cells_are_shown():
    results = made_results(SHIFTS)
    final = []
    for cell in results.final:
        if cell.method == "moe_lora":
            continue
        nll = float("inf") if (cell.method, cell.seed) == ("rotmole", 0) else 0.5
        rows = {name: replace(row, nll=nll) for name, row in cell.rows.items()}
        curve = [replace(point, nll=nll) for point in cell.curve]
        final.append(replace(cell, rows=rows, curve=curve))
    trials = [replace(t, nll=float("inf")) if t.rate == 3e-3 else t for t in results.tuning]
    plan = {"methods": {"moe_lora": {"equal": True}}}
    judged = judge(replace(results, final=tuple(final), tuning=tuple(trials), plan=plan))
    assert judged.claims == 6  # the family was stated before anything failed
    lines = tables.differences(judged, judged.measures[0])
    assert lines[1] == ["moe_lora", "0", "-", "1.000", "not paired"]
    assert lines[2] == ["rotmole", "0", "-", "1.000", "diverged"]
    assert tables.trials(judged)[-1][1:] == ["-"] * 4
    assert Page(html(judged, "Title", drawn(judged))).open == []


def test_one_task_with_groups_is_drawn_by_group():
    judged = judge(made_results(SHIFTS, tasks={"dates": TASKS["dates"]}))
    heat = heat_map(judged, judged.measures[0])
    assert "dates de" in heat.svg
    assert heat.wide
