"""docs/combine.md: its tables are those of the committed figures."""

from __future__ import annotations

from pathlib import Path

from docs_scripts import script

PAGE = Path(__file__).parents[2] / "docs" / "combine.md"


def test_the_tables_are_those_of_the_committed_figures() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == script("combine_tables").page(text), "run `make pages`"


def test_every_table_has_its_place_and_its_figures() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for group in ("A+B", "de+es+pl"):
        before, _, rest = text.partition(f"<!-- combine {group} -->")
        assert before
        assert "| gates, 360 rows a part |" in rest.partition("<!-- end of")[0]
