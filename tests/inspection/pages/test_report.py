"""The report: complete, safe, self-contained, readable without colour, small for many layers."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from inspected_cases import TASKS, made_inspection
from rotmole.inspection.inspection import ALL, Inspection, Passage, TokenRouting
from rotmole.inspection.pages import figures, sheets
from rotmole.inspection.pages.report import (
    PAGE,
    answers,
    glance,
    headline,
    html,
    passage,
    write_figures,
    write_report,
)


class Page(HTMLParser):
    """What a browser and a screen reader would act on."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def inspection():
    return made_inspection()


@pytest.fixture(scope="module")
def text(inspection):
    return html(inspection)


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_the_page_holds_all_it_needs_and_runs_nothing(page, text):
    assert page.open == []
    tags = {tag for tag, _ in page.elements}
    assert not {"script", "link", "img", "iframe", "form", "button", "image"} & tags
    every = [pair for _, attributes in page.elements for pair in attributes.items()]
    addresses = [value for name, value in every if name in ("href", "src", "xlink:href")]
    ids = [value for name, value in every if name == "id"]
    assert len(ids) == len(set(ids))
    assert all(address[0] == "#" and address[1:] in ids for address in addresses)
    assert not [name for name, _ in every if name.startswith("on")]
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
    assert "@import" not in text


def test_the_verdict_stands_first_with_rule_number_and_advice(page, inspection):
    words = " ".join(" ".join(page.words).split())
    places = [words.rindex(piece) for piece in (
        "1 thing to mend: collapsed.", "To mend: layer 1 q_proj sends 97 %",
        inspection.verdicts[0].advice, "Rule collapsed: Share of all choices", "; here 0.97.",
        "Experts: 2.", "Layers: model.layers.1.self_attn.q_proj.",
        "Worth knowing: task dates", "Task: dates.", "At a glance", "Usage by layer and task",
        "Rotation: angles and planes", "How much of the mixture is mixture", "How it was measured",
    )]  # fmt: skip
    assert places == sorted(places)


def test_headlines_count_what_is_to_be_mended(inspection):
    assert headline(replace(inspection, verdicts=())) == "Nothing to mend: no rule found a fault."
    healthy = replace(inspection, verdicts=inspection.verdicts[1:])
    assert headline(healthy) == "Nothing to mend: no rule found a fault."
    both = replace(inspection, verdicts=inspection.verdicts[:1] * 2)
    assert headline(both) == "2 things to mend: collapsed."


def test_every_number_of_figures_and_tables_is_text_on_the_page(page, inspection):
    words = {word.strip() for word in page.words}
    every = [plot.sheet for plot in figures.plots(inspection)]
    every += [plot.sheet for plot in figures.convergence([inspection])]
    every += [*sheets.usage_by_part(inspection).values(), *passage(inspection), answers(inspection)]
    every += [sheets.usage_grid(inspection), *sheets.affinity_grids(inspection)]
    every += [sheets.routing(inspection), sheets.similarity(inspection), glance([inspection])]
    every += [sheets.expert_sizes(inspection)]
    for sheet in every:
        assert sheet.caption in words
        for cell in (cell for line in sheet.lines for cell in line if cell.text):
            assert cell.text.strip() in words
        assert {name for name in sheet.head if name} <= words
        assert {len(line) for line in sheet.lines} == {len(sheet.head)}


def test_screen_readers_get_names_of_figures_tables_lines_and_columns(page):
    ids = {attributes.get("id") for _, attributes in page.elements}
    for svg in page.all("svg"):
        assert svg["role"] == "img"
        assert len(svg["aria-labelledby"].split()) == 2
        assert set(svg["aria-labelledby"].split()) <= ids
    for table in page.all("table"):
        assert table["aria-labelledby"] in ids
    assert {cell.get("scope") for cell in page.all("th")} == {"col", "row"}
    scrolled = [a for a in page.all("div") if "scroll" in (a.get("class") or "")]
    assert len(scrolled) == len(page.all("table")) > 15
    assert all(a["tabindex"] == "0" and a["role"] == "region" for a in scrolled)
    assert page.all("html")[0]["lang"] == "en"


def test_light_dark_and_print_are_styled(text):
    assert "@media (prefers-color-scheme: dark)" in text
    assert "@media print" in text
    for shade in set(re.findall(r'<td class="(s\d)"', text)):
        assert f".{shade} {{ background" in text


def test_usage_by_part_is_in_the_table_of_its_task(inspection):
    dates, units = sheets.usage_by_part(inspection).values()
    assert (dates.caption[-5:], units.caption[-5:]) == TASKS
    assert [cell.text for cell in dates.lines[0]] == ["0 q_proj", "70 %", "10 %", "10 %", "10 %"]
    assert [cell.text for cell in units.lines[0]] == ["0 q_proj", "10 %", "70 %", "10 %", "10 %"]
    assert [cell.shade for cell in units.lines[0]] == [0, 1, 6, 1, 1]


def test_tokens_of_groups_are_shown_by_task_and_by_group():
    made = made_inspection(
        layers=1, modules=("q_proj",), tasks=("dates/de", "dates/fr", "units/de")
    )
    assert sheets.parts_of(made) == {
        "dates": ("dates/de", "dates/fr"), "units": ("units/de",),
        "de": ("dates/de", "units/de"), "fr": ("dates/fr",),
    }  # fmt: skip
    found = sheets.usage_by_part(made)
    shares = {part: [c.text for c in sheet.lines[0][1:]] for part, sheet in found.items()}
    assert shares["dates"] == ["40 %", "40 %", "10 %", "10 %"]
    assert shares["de"] == ["40 %", "10 %", "40 %", "10 %"]
    assert shares["fr"] == ["10 %", "70 %", "10 %", "10 %"]
    same = made_inspection(layers=1, modules=("q_proj",), tasks=("de/de", "fr/fr"))
    assert list(sheets.parts_of(same)) == ["de", "fr", "group de", "group fr"]


def test_a_layer_that_uses_every_expert_is_shown_by_weights(inspection):
    layer = replace(inspection.layers[0], top_k=4)
    use = replace(layer.usage["dates"], choices=(9, 9, 9, 9), part=(0.1, 0.2, 0.3, 0.4))
    more = replace(use, part=(0.3, 0.2, 0.3, 0.2), tokens=3 * use.tokens)
    layer = replace(layer, usage={"dates": use, "units": more})
    assert sheets.used(layer, ["dates"]) == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert sheets.used(layer, ["dates", "units"]) == pytest.approx([0.25, 0.2, 0.3, 0.25])
    assert sheets.used(layer, ["none"]) is None


def test_grids_have_a_line_for_each_block_and_a_column_for_each_module(inspection):
    layers = list(inspection.layers)
    use = replace(layers[3].usage[ALL], choices=(0, 3, 97, 0))
    layers[3] = replace(layers[3], usage={ALL: use})
    sheet = sheets.usage_grid(replace(inspection, layers=tuple(layers)))
    assert sheet.head == ("layer", "q_proj", "v_proj")
    assert [cell.text for cell in sheet.lines[1]] == ["1", "40 % (1)", "97 % (2)"]
    assert "even use is 25 %" in sheet.caption
    (affinity,) = sheets.affinity_grids(inspection)
    assert [cell.text for cell in affinity.lines[3]] == ["3", "28 %", "28 %"]  # .19 of .68


def test_the_static_share_at_a_glance_is_at_the_first_rank_that_is_enough(inspection):
    def told(*held_out: float) -> str:
        static = replace(inspection.static, held_out=held_out)
        sheet = glance([replace(inspection, static=static)])
        return dict((a.text, b.text) for a, b in sheet.lines)["what a static LoRA does as well"]

    assert told(0.4, 0.6, 0.8, 0.9) == "90 % at rank 8"
    assert told(0.4, 0.898, 0.9, 0.9) == "90 % at rank 2"


def test_of_a_layer_with_one_expert_no_use_is_shown(inspection):
    layers = tuple(replace(x, num_experts=1, top_k=1) for x in inspection.layers)
    one = replace(inspection, layers=layers)
    assert sheets.usage_grid(one).lines == ()
    assert sheets.usage_by_part(one) == {}
    assert sheets.routing(one) is None


def test_sizes_of_experts_say_whether_they_started_at_zero(inspection):
    sheet = sheets.expert_sizes(inspection)
    assert [cell.text for cell in sheet.lines[0]] == [
        "0 q_proj", "0.30", "1.0 % (0.5 %)", "2.0 % (1.0 %)", "3.0 % (1.5 %)", "4.0 % (2.0 %)",
    ]  # fmt: skip
    layers = [
        replace(x, experts=replace(x.experts, drift=x.experts.norm)) for x in inspection.layers
    ]
    sheet = sheets.expert_sizes(replace(inspection, layers=tuple(layers)))
    assert sheet.lines[0][2].text == "1.0 %"
    assert sheet.caption.endswith("they started at zero")


def test_tokens_have_weight_and_angle_of_their_experts(inspection):
    mean, layer = passage(inspection)
    assert [line[0].text for line in mean.lines] == ["<b>", "·März", "⏎"]
    assert [cell.text for cell in layer.lines[1][1:]] == [
        "", "75 % at 0.50", "25 % at 0.50", "",
    ]  # fmt: skip
    assert layer.caption.endswith("model.layers.0.self_attn.q_proj")


def test_long_texts_many_layers_and_many_experts_are_cut_and_said(inspection):
    count, experts = 500, 40
    weight = tuple(tuple(0.5 * (e in (t % 40, 39)) for e in range(experts)) for t in range(count))
    routing = TokenRouting(weight, None)
    layers = {f"layer {n}": routing for n in range(30)}
    text = Passage(("a",) * count, routing, layers)
    found = passage(replace(inspection, passage=text))
    assert len(found) == sheets.MOST_LAYERS
    assert {len(sheet.lines) for sheet in found} == {100}
    assert "400 further tokens are in inspect.json" in found[0].caption
    assert found[-1].caption.endswith("19 further layers are in inspect.json")
    assert [cell.text for cell in found[0].lines[3]][:4] == ["a", "3: 50 %", "39: 50 %", ""]
    cosine = [[float(i == j) for i in range(experts)] for j in range(experts)]
    cosine[30][7] = cosine[7][30] = -0.9
    layer = inspection.layers[0]
    wide = replace(layer.experts, cosine=tuple(map(tuple, cosine)), norm=(1.0,) * experts)
    wide = replace(layer, num_experts=experts, experts=wide)
    sheet = sheets.similarity(replace(inspection, layers=(wide,)))
    assert len(sheet.lines) == sheets.MOST_EXPERTS
    assert {"expert 7", "expert 30"} <= set(sheet.head)
    assert sheet.caption.endswith("16 of 40 experts")


def test_runs_stand_side_by_side_and_names_are_text_and_no_markup(inspection):
    tasks = ("<i>a</i>", "b & c")
    other = made_inspection(layers=2, target="<u>run</u>", rotation="none", tasks=tasks)
    sheet = glance([inspection, other])
    assert sheet.head == ("", "runs/made", "<u>run</u>")
    found = {line[0].text: [cell.text for cell in line[1:]] for line in sheet.lines}
    assert found["adapted layers"] == ["8", "4"]
    assert found["most used expert of any layer"] == ["40 % (even use 25 %, at most 50 %)"] * 2
    assert found["more with rotation off"] == ["+0.020 nats", "-"]
    assert found["more with uniform routing"] == ["+0.110 nats"] * 2
    text = html(other, [inspection])
    for tag in ("<i>", "<u>", "<b>"):
        assert tag not in text
    assert "&lt;u&gt;run" in text
    assert "b &amp; c" in text
    page = Page(text)
    assert page.open == []
    assert page.words.count("runs/made") >= 4  # in the glance and in three tables of losses


@pytest.mark.slow
def test_120_layers_with_many_experts_and_tasks_stay_below_half_a_megabyte(tmp_path):
    large = made_inspection(
        layers=120, modules=("q_proj", "k_proj", "v_proj", "o_proj"), experts=8,
        tasks=("a", "b", "c", "d"),
    )  # fmt: skip
    file = write_report(large, tmp_path)
    assert file.stat().st_size < 500_000
    text = file.read_text(encoding="utf-8")
    assert f"show {sheets.MOST_LAYERS} of 480 layers" in text
    assert "1 q_proj" in [line[0].text for line in sheets.usage_by_part(large)["a"].lines]


def bare(inspection: Inspection) -> Inspection:
    """A record of which almost nothing is known."""
    layer = replace(inspection.layers[0], usage={}, affinity={}, experts=None, static=None,
                    effects={}, depth=None)  # fmt: skip
    source = replace(inspection.source, curves={}, tokens={}, versions={})
    return Inspection(source, (), (layer,))


def test_a_bare_record_has_a_page(inspection):
    page = Page(html(bare(inspection)))
    assert page.open == []
    assert page.all("svg") == []
    assert {a["href"] for a in page.all("a")} == {"#verdict", "#made"}


@pytest.mark.slow
def test_pages_and_figures_come_from_the_record_alone(inspection, tmp_path):
    record = Inspection.read(inspection.write(tmp_path))
    few = replace(bare(record), layers=(replace(record.layers[0], usage={}, static=None),))
    file = write_report(few, tmp_path / "page")
    assert file == tmp_path / "page" / PAGE
    assert file.read_text(encoding="utf-8") == html(few)
    made = write_figures(few, tmp_path / "figures")
    names = ["reach", "similarity", "effects", "similarity-matrix"]
    assert [path.name for path in made] == [
        f"{name}.{ending}" for name in names for ending in ("svg", "pdf")
    ]
    for name in names:
        ElementTree.parse(tmp_path / "figures" / f"{name}.svg")
        assert (tmp_path / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
