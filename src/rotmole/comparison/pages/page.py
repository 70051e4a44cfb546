"""What a study writes for readers: one HTML page without scripts, Markdown, figures as files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rotmole.comparison.judgement import Judgement
from rotmole.comparison.pages import tables
from rotmole.comparison.pages.figures import Drawing, clock_drawings, drawings
from rotmole.drawing import THEME, standalone
from rotmole.files import atomic_write_text, make_folder

PAGE, TEXT, FIGURES = "study.html", "study.md", "figures"
_TEMPLATE = Path(__file__).parent / "templates" / "study.html.j2"
_BUDGET_NOTE = (
    "Validation NLL where the cheaper of both methods has ended, on a straight line between two "
    "validations. The dearer one is not at the end of its schedule there, which counts against it."
)


@dataclass(frozen=True)
class Drawn:
    """The figures of a study; those that depend on the clock stand apart."""

    plain: list[Drawing]
    clock: list[Drawing]


def drawn(judgement: Judgement) -> Drawn:
    """Draw every figure that has data."""
    return Drawn(drawings(judgement), clock_drawings(judgement))


def html(judgement: Judgement, title: str, figures: Drawn) -> str:
    """Return the page: tables and figures, readable at any width, light and dark.

    Args:
        judgement: of the study.
        title: of the page.
        figures: of the judgement.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    columns = len(judgement.methods)
    return template.render(
        **_tables(judgement),
        title=title,
        theme=THEME,
        drawings=figures.plain,
        clock_drawings=figures.clock,
        wide=160 + 75 * columns,
    )


def _tables(judgement: Judgement) -> dict[str, Any]:
    clock = judgement.clock
    return {
        "headline": judgement.headline,
        "methods": tables.methods(judgement),
        "overview": tables.overview(judgement),
        "differences": [(m.label, tables.differences(judgement, m)) for m in judgement.measures],
        "remarks": tables.remarks(judgement),
        "budget_note": _BUDGET_NOTE,
        "operations": tables.at_budget(judgement, judgement.at_equal_flops, "operations"),
        "equal_seconds": tables.at_budget(judgement, clock.at_equal_seconds, "seconds"),
        "seconds": tables.seconds(judgement),
        "trials": tables.trials(judgement),
        "facts": tables.facts(judgement.facts),
    }


def markdown(judgement: Judgement, title: str, figures: Drawn) -> str:
    """Return the same tables as Markdown, with links to the figures' files.

    Args:
        judgement: of the study.
        title: above the text.
        figures: of the judgement.
    """
    parts = _tables(judgement)
    text = [f"# {title}", parts["headline"], tables.markdown(parts["overview"])]
    for measure, lines in parts["differences"]:
        text += [f"## Differences: {measure}", tables.markdown(lines)]
    text += ["## How to read this", "\n".join(f"- {line}" for line in parts["remarks"])]
    for measure in judgement.measures:
        if by_task := tables.by_task(judgement, measure):
            text += [f"## {measure.label} by task", tables.markdown(by_task)]
    if parts["methods"]:
        text += ["## The methods", tables.markdown(parts["methods"])]
    text += ["## Figures", *map(_linked, figures.plain)]
    text += ["## At equal operations", _BUDGET_NOTE, tables.markdown(parts["operations"])]
    if parts["trials"]:
        note = "Validation NLL, the mean over the tuning seeds; * marks what was chosen."
        text += ["## Tuning", note, tables.markdown(parts["trials"])]
    text += ["## What depends on the clock", tables.markdown(parts["seconds"])]
    text += [tables.markdown(parts["equal_seconds"]), *map(_linked, figures.clock)]
    return "\n\n".join([*text, "## Made with", parts["facts"]]) + "\n"


def _linked(drawing: Drawing) -> str:
    return f"![{drawing.name}]({FIGURES}/{drawing.name}.svg)\n\n{drawing.caption}"


def write_text(judgement: Judgement, folder: Path, title: str, figures: Drawn) -> Path:
    """Write study.md and figures/*.svg.

    Args:
        folder: of the study.
        title: above the text.
        figures: of the judgement.

    Returns:
        The text.

    Raises:
        StorageError: a file cannot be written.
    """
    place = make_folder(folder / FIGURES)
    for drawing in [*figures.plain, *figures.clock]:
        atomic_write_text(place / f"{drawing.name}.svg", standalone(drawing.svg) + "\n")
    return atomic_write_text(folder / TEXT, markdown(judgement, title, figures))


def write_pages(judgement: Judgement, folder: Path, title: str) -> list[Path]:
    """Write study.html, study.md and figures/*.svg; all come from study.json alone.

    Args:
        folder: of the study.
        title: of the pages.

    Returns:
        The page and the text.

    Raises:
        StorageError: a file cannot be written.
    """
    figures = drawn(judgement)
    text = write_text(judgement, folder, title, figures)
    return [atomic_write_text(folder / PAGE, html(judgement, title, figures)), text]
