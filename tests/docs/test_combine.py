"""docs/combine.md: its tables are those of the committed figures, its run file is right."""

from __future__ import annotations

import textwrap
from pathlib import Path

from peft import get_peft_model

import tiny
from docs_scripts import script
from rotmole import RotMoleConfig
from rotmole.config.load import load_run

PAGE = Path(__file__).parents[2] / "docs" / "combine.md"


def test_the_tables_are_those_of_the_committed_figures() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == script("combine_tables").page(text), "run `make pages`"


def test_every_table_has_its_place_and_its_figures() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for group in ("A+B", "de+es+pl"):
        before, _, rest = text.partition(f"<!-- combine {group} -->")
        assert before
        assert "| `rotmole combine`, 360 rows a part |" in rest.partition("<!-- end of")[0]


def test_the_run_file_is_right_where_its_adapters_are(tmp_path: Path) -> None:
    """It is no block that runs by itself, because it needs adapters."""
    lines = PAGE.read_text(encoding="utf-8").split("\n")
    text = textwrap.dedent("\n".join(line for line in lines if line.startswith("    ")))
    config = RotMoleConfig(num_experts=1, rotation="none", target_modules=["q_proj"])
    for name in ("units", "dates"):
        model = get_peft_model(tiny.llama(), config)
        model.save_pretrained(tmp_path / "runs" / name / "adapter")
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    run = load_run(tmp_path / "run.yaml")
    assert run.adapter_config.expert_names == ["units", "dates"]
    assert run.adapter_config.frozen == "none"
