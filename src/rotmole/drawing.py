"""Figures as SVG that fits any page, light or dark, and as PDF for papers; text stays text.

matplotlib paints with stand-ins for colours. The SVG has CSS variables in their place, so the page
(`THEME`), or the reader's own light or dark setting (`standalone`), decides what they look like. A
PDF has the light colours.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from html import escape
from typing import Any

WIDTH = 4.8
"""Inches. Small, so that text stays readable when a page is as narrow as a telephone."""
INK, FAINT, BETTER, WORSE = "#010101", "#020202", "#030303", "#040404"
"""Stand-ins: text and axes, grid and zero lines, what is better, what is worse."""

_LIGHT = ("#0072b2", "#c74600", "#007a57", "#a8387f", "#8a6a00", "#5b4bb5", "#6b4f3f", "#4d6472",
          "#b3123f", "#2b7fa0")  # fmt: skip
_DARK = ("#5fb4f5", "#ff9a5c", "#45d3a2", "#f09acb", "#e6c34d", "#b4a5ff", "#cfae9a", "#a9bcc8",
         "#ff7d9c", "#7fd6f0")  # fmt: skip
_MARKERS = "osD^vPX<>*"
_NAMES = {INK: "ink", FAINT: "faint", BETTER: "better", WORSE: "worse"} | {
    f"#{0x050505 + index:06x}": f"series-{index}" for index in range(len(_LIGHT))
}
_SERIES = list(_NAMES)[4:]
_COMMON = {
    "light": ("#1b1f24", "#c9ced6", "#00695c", "#b33c00"),
    "dark": ("#e8eaed", "#4a515c", "#4fd1b8", "#ff9a5c"),
}


def _variables(name: str, series: tuple[str, ...]) -> str:
    values = zip(_NAMES.values(), (*_COMMON[name], *series), strict=True)
    return " ".join(f"--{variable}: {value};" for variable, value in values)


THEME = (
    f":root {{ {_variables('light', _LIGHT)} }}\n"
    f"@media (prefers-color-scheme: dark) {{ :root {{ {_variables('dark', _DARK)} }} }}"
)
"""Style sheet with the colours of the figures."""

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none", "font.size": 9.0, "axes.titlesize": 10.0, "axes.titleweight": "bold",
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT, "xtick.color": INK,
    "ytick.color": INK, "grid.color": FAINT, "grid.linewidth": 0.6, "axes.grid": True,
    "axes.axisbelow": True, "axes.facecolor": "none", "figure.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.6,
    "lines.markersize": 4.5, "legend.frameon": False, "legend.fontsize": 8.5,
    "text.parse_math": False,
}  # fmt: skip


_HASHED = re.compile(r"[a-zA-Z]+?[0-9a-f]{10}")
_PDF: dict[str, Any] = {"pdf.fonttype": 42}  # TrueType, which publishers ask for
_LIGHT_OF = dict(zip(_NAMES, (*_COMMON["light"], *_LIGHT), strict=True))


def draw(
    paint: Callable[[Any], None],
    *,
    name: str,
    label: str,
    height: float,
    width: float = WIDTH,
    description: str = "",
) -> str:
    """Draw a figure for a page.

    Args:
        paint: called with an empty matplotlib figure, on which it draws.
        name: of the figure, the beginning of every id in it; unique on the page.
        label: what the figure shows, for readers who cannot see it.
        height, width: inches.
        description: what there is to see in it, for the same readers.

    Returns:
        An svg element without fixed size: it takes the width of what is around it.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.BytesIO()
    with _painted(paint, height, width, {}) as figure:
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return _for_page(buffer.getvalue().decode("utf-8"), name, label, description)


def pdf(paint: Callable[[Any], None], *, height: float, width: float = WIDTH) -> bytes:
    """Draw a figure as a PDF file: light colours, letters that can be searched and edited.

    Args:
        paint: called with an empty matplotlib figure, on which it draws.
        height, width: inches.
    """
    from matplotlib.backends.backend_pdf import FigureCanvasPdf

    buffer = io.BytesIO()
    with _painted(paint, height, width, _PDF) as figure:
        figure.draw_without_rendering()  # makes the ticks, which need colours too
        for artist in figure.findobj():
            _take_light_colors(artist)
        FigureCanvasPdf(figure).print_pdf(buffer, metadata={"CreationDate": None})
    return buffer.getvalue()


@contextmanager
def _painted(
    paint: Callable[[Any], None], height: float, width: float, settings: Mapping[str, Any]
) -> Iterator[Any]:
    """Yield the figure that `paint` has painted, under the settings that it is written with."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**_STYLE, **settings}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a browser has letters of its own
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure)
        yield figure


def _take_light_colors(artist: Any) -> None:
    """Replace the stand-ins among the colours of one artist."""
    from matplotlib.colors import to_hex, to_rgba, to_rgba_array

    for part in ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor"):
        get, put = (getattr(artist, f"{verb}_{part}", None) for verb in ("get", "set"))
        if get is None or put is None:
            continue
        colors = to_rgba_array(get())
        light = [to_rgba(_LIGHT_OF.get(to_hex(c), to_hex(c)), c[3]) for c in colors]
        if light and (colors != light).any():
            alpha = artist.get_alpha()
            artist.set_alpha(None)  # it is in the colours now
            put(light[0] if len(light) == 1 else light)
            artist.set_alpha(alpha)


def _for_page(text: str, name: str, label: str, description: str) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = _named(text, name)
    text = re.sub(r"'DejaVu Sans'.*?sans-serif", "system-ui, sans-serif", text)
    for color, variable in _NAMES.items():
        text = text.replace(color, f"var(--{variable})")
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:width|height)="[0-9.]+pt"', "", text, count=2)
    words = f'<title id="{name}-title">{escape(label)}</title>'
    names = f"{name}-title"
    if description:
        words += f'\n<desc id="{name}-desc">{escape(description)}</desc>'
        names += f" {name}-desc"
    end = text.index(">") + 1
    head = f'<svg role="img" aria-labelledby="{names}" style="stroke-linejoin: round"'
    return f"{head}{text[len('<svg') : end]}\n{words}{text[end:]}".strip()


def _named(text: str, name: str) -> str:
    """Begin every id with a name, and number those that matplotlib makes by hashing coordinates.

    Processors round coordinates differently, and one digit changes a whole hash.
    """
    numbered: dict[str, str] = {}

    def named(match: re.Match[str]) -> str:
        old = match[2]
        if _HASHED.fullmatch(old):
            old = numbered.setdefault(old, f"{old[:-10]}{len(numbered)}")
        return f"{match[1]}{name}-{old}"

    return re.sub(r'(\sid="|url\(#|xlink:href="#)([^")]+)', named, text)


def standalone(svg: str) -> str:
    """Return a drawn figure as a file of its own, with the colours of THEME and a size in it."""
    start = svg.index(">") + 1
    width, height = svg[:start].partition('viewBox="0 0 ')[2].partition('"')[0].split()
    head = '<?xml version="1.0" encoding="utf-8"?>\n<svg'
    size = f' width="{width}pt" height="{height}pt"'
    return f"{head}{size}{svg[len('<svg') : start]}\n<style>\n{THEME}\n</style>{svg[start:]}"


def series(index: int) -> dict[str, Any]:
    """Return how to draw the index-th series; 40 differ, points without lines too."""
    count = len(_SERIES)
    return {
        "color": _SERIES[index % count],
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": ("-", "--", ":", "-.")[index // count % 4],
        "fillstyle": ("full", "none", "left", "top")[index // count % 4],
    }


def legend(figure: Any, *panels: Any, columns: int = 2) -> None:
    """Put one legend below the figure, where it hides nothing; lines of one name stand in it once.

    Args:
        figure: that gets the legend.
        panels: axes whose lines are named.
        columns: of the legend.
    """
    found = {
        name: handle
        for panel in panels
        for handle, name in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    if found:
        figure.legend(found.values(), found, loc="outside lower left", ncols=columns)


def short(text: str, letters: int = 24) -> str:
    """Cut a text for a label.

    >>> short("a_very_long_name", 8)
    'a_very_…'
    """
    return text if len(text) <= letters else text[: letters - 1] + "…"
