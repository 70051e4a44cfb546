"""The report of an inspection: one HTML page without scripts, and its figures as files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rotmole.drawing import THEME
from rotmole.files import atomic_write_text, make_folder
from rotmole.inspection.inspection import ALL, Inspection
from rotmole.inspection.pages import figures, sheets
from rotmole.inspection.pages.sheets import Cell, Sheet

PAGE = "report.html"
_TEMPLATE = Path(__file__).parent / "templates" / "report.html.j2"


def write_report(inspection: Inspection, folder: Path, beside: Sequence[Inspection] = ()) -> Path:
    """Write report.html.

    Args:
        inspection: what it is about.
        folder: to write into; it is made.
        beside: inspections of other runs, whose losses and numbers stand beside this one's.

    Returns:
        The page.

    Raises:
        StorageError: it cannot be written.
    """
    return atomic_write_text(make_folder(folder) / PAGE, html(inspection, beside))


def write_figures(
    inspection: Inspection, folder: Path, beside: Sequence[Inspection] = ()
) -> list[Path]:
    """Write every figure as SVG and as PDF, for papers and slides.

    Args:
        inspection: what is drawn.
        folder: to write into; it is made.
        beside: inspections of other runs, whose losses are drawn too.

    Returns:
        The files.

    Raises:
        StorageError: one cannot be written.
    """
    drawn = figures.plots(inspection) + figures.convergence([inspection, *beside])
    return [file for plot in drawn + figures.maps(inspection) for file in plot.write(folder)]


def html(inspection: Inspection, beside: Sequence[Inspection] = ()) -> str:
    """Return the page: readable at any width, light and dark, printed, and read aloud.

    Args:
        inspection: what it is about.
        beside: inspections of other runs.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    plots = {plot.name: plot for plot in figures.plots(inspection)}
    source = inspection.source
    return template.render(
        theme=THEME,
        shades=range(1, sheets.SHADES + 1),
        source=source,
        headline=headline(inspection),
        verdicts=inspection.verdicts,
        glance=glance([inspection, *beside]),
        settings=", ".join(f"{key} {value}" for key, value in source.settings.items()),
        tokens=", ".join(f"{task} {count:,}" for task, count in source.tokens.items()),
        versions=", ".join(f"{name} {version}" for name, version in source.versions.items()),
        usage=_usage(inspection),
        shown=len(sheets.chosen_layers(inspection)),
        routed=len(sheets.routed_layers(inspection)),
        plots=plots,
        similarity=sheets.similarity(inspection),
        sizes=sheets.expert_sizes(inspection),
        answers=answers(inspection),
        convergence=figures.convergence([inspection, *beside]),
        passage=passage(inspection),
        notes=inspection.notes,
    )


def headline(inspection: Inspection) -> str:
    """Return the verdict in one sentence."""
    faults = [verdict for verdict in inspection.verdicts if verdict.is_fault]
    if not faults:
        return "Nothing to mend: no rule found a fault."
    things = "1 thing" if len(faults) == 1 else f"{len(faults)} things"
    return f"{things} to mend: {', '.join(dict.fromkeys(fault.name for fault in faults))}."


def glance(inspections: Sequence[Inspection]) -> Sheet:
    """Return what matters most about one or several adapters, a column for each."""
    rows: dict[str, list[str]] = {}
    for x in inspections:
        column = _glance(x)
        for name, text in column.items():
            rows.setdefault(name, []).append(text)
    lines = tuple((Cell(name), *map(Cell, texts)) for name, texts in rows.items())
    return Sheet("At a glance", ("", *(x.source.target for x in inspections)), lines)


def _glance(x: Inspection) -> dict[str, str]:
    use = [layer.usage[ALL] for layer in x.layers if ALL in layer.usage]
    answer = x.answers.get(ALL)
    static = "-"
    if x.static is not None and x.static.ranks:
        pairs = list(zip(x.static.ranks, x.static.held_out, strict=True))
        enough = (pair for pair in pairs if pair[1] >= 0.99 * pairs[-1][1])
        rank, share = next(enough, pairs[-1])
        static = f"{sheets.percent(share)} at rank {rank}"
    unused = sum(count == 0 for usage in use for count in usage.choices)
    experts = sum(len(usage.choices) for usage in use)
    routed = sheets.routed_layers(x)
    tops = [(max(share), layer) for layer in routed if (share := sheets.used(layer)) is not None]
    share, where = max(tops, key=lambda top: top[0], default=(None, None))
    top = sheets.percent(share)
    if where is not None:
        top += f" (even use {sheets.percent(1 / where.num_experts)}"
        most = 1 / where.top_k if where.top_k < where.num_experts else 1.0
        top += f", at most {sheets.percent(most)})"
    angles = [a for u in use if u.angles for a in u.angles.mean if a is not None]
    mean = sum(angles) / len(angles) if angles else None

    def more(changed: float | None) -> str:
        if answer is None or changed is None:
            return "-"
        return f"{changed - answer.trained:+.3f} nats"

    return {
        "adapted layers": str(len(x.layers)),
        "experts that no token selected": f"{unused} of {experts}" if experts else "-",
        "most used expert of any layer": top,
        "mean angle of rotation": "-" if mean is None else f"{mean:.3f} radians",
        "what a static LoRA does as well": static,
        "loss of the answers": "-" if answer is None else f"{answer.trained:.3f} nats",
        "more with rotation off": more(answer.rotation_off if answer else None),
        "more with uniform routing": more(answer.uniform if answer else None),
        "more without the adapter": more(answer.base if answer else None),
    }


def _usage(inspection: Inspection) -> list[Sheet]:
    """Return the tables of usage that have lines."""
    grids: list[Sheet | None] = [sheets.usage_grid(inspection), *sheets.affinity_grids(inspection)]
    grids += [*sheets.usage_by_part(inspection).values(), sheets.routing(inspection)]
    return [sheet for sheet in grids if sheet is not None and sheet.lines]


def answers(inspection: Inspection) -> Sheet | None:
    """Return what answers cost with parts of the adapter switched off, task by task."""
    if not inspection.answers:
        return None
    lines = tuple(
        (Cell("all tasks" if task == ALL else task), Cell(f"{a.tokens:,}"),
         *sheets.numbers((a.trained, a.rotation_off, a.uniform, a.base), digits=3))
        for task, a in inspection.answers.items()
    )  # fmt: skip
    head = ("task", "tokens", "as trained", "rotation off", "routing uniform", "no adapter")
    return Sheet("Negative log-likelihood of the answers' tokens in nats", head, lines)


def passage(inspection: Inspection) -> list[Sheet]:
    """Return the tokens of the text that was asked for: averaged, then by layer."""
    text = inspection.passage
    if text is None:
        return []
    tables = {"Weights and |angles| averaged over layers": text.mean}
    tables |= {f"Weights and angles in {path}": each for path, each in text.layers.items()}
    some = dict(list(tables.items())[: sheets.MOST_LAYERS])
    most = sheets.MOST_LINES // len(some)
    result = [sheets.tokens(text.tokens, each, name, most) for name, each in some.items()]
    if len(some) < len(tables):
        more = f"{result[-1].caption}; {len(tables) - len(some)} further layers are in inspect.json"
        result[-1] = replace(result[-1], caption=more)
    return result
