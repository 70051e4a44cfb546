"""What `make pages` writes is what is committed: list of files, table of the demo, picture."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from docs_scripts import script

ROOT = Path(__file__).parents[2]


def test_files_md_lists_every_source_file_by_its_first_line() -> None:
    page = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    assert page == script("files").text(), "run `make pages`"


def test_every_source_file_has_a_first_line() -> None:
    files = script("files")
    empty = [file for file in (ROOT / "src").rglob("*.py") if not files.first_line(file)]
    assert not empty


def test_the_readmes_table_is_that_of_the_committed_demo() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == script("demo_table").with_table(readme), "run `make pages`"


def test_the_table_of_the_gates_parameters_is_computed() -> None:
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    assert page == script("gate_table").page(page), "run `make pages`"


def test_the_table_of_growing_is_that_of_the_committed_figures() -> None:
    page = (ROOT / "docs" / "grow.md").read_text(encoding="utf-8")
    assert page == script("grow_table").page(page), "run `make pages`"


def test_the_table_of_the_load_test_is_that_of_the_committed_figures() -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    assert page == script("load_table").page(page), "run `make pages`"


def test_the_tables_of_the_static_lora_are_those_of_the_committed_export() -> None:
    page = (ROOT / "docs" / "use.md").read_text(encoding="utf-8")
    assert page == script("static_table").page(page), "run `make pages`"


def test_the_price_of_the_published_studies_is_that_of_the_committed_figures() -> None:
    page = (ROOT / "docs" / "compare.md").read_text(encoding="utf-8")
    assert page == script("published_table").page(page), "run `make pages`"


def test_the_picture_is_what_its_script_draws(tmp_path: Path) -> None:
    """Numbers are compared to 0.01 point: another matplotlib may write a digit more or less."""
    turn = script("turn")
    turn.draw(tmp_path / "turn.svg")
    number = r"-?\d+\.?\d*(?:e-?\d+)?"
    texts = [
        re.sub(r"<metadata>.*?</metadata>", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
        for file in (tmp_path / "turn.svg", ROOT / "docs" / "pictures" / "turn.svg")
    ]
    new, committed = ([float(n) for n in re.findall(number, text)] for text in texts)
    assert len(new) == len(committed) > 1000
    assert all(math.isclose(a, b, abs_tol=0.01) for a, b in zip(new, committed, strict=True)), (
        "run `make pages`"
    )


def test_the_pictures_rotation_keeps_the_length() -> None:
    assert [math.hypot(*end) for end in script("turn").turned()] == pytest.approx([1, 1, 1])


LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


@pytest.mark.parametrize(
    "document",
    [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))],
    ids=lambda document: document.name,
)
def test_every_link_to_a_file_leads_to_one(document: Path) -> None:
    links = LINK.findall(document.read_text(encoding="utf-8"))
    assert not [link for link in links if not (document.parent / link).exists()]
