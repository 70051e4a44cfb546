"""The documentation site: README as its start page, and the pages of docs/ as they are.

`make site` builds it with Sphinx into .cache/site. Every warning is an error: a broken link, a page
without a title, a heading that is out of order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]

project = "rotmole"
author = "The rotmole developers"
copyright = author

extensions = ["myst_parser"]
root_doc = "README"
include_patterns = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "docs/*.md"]
include_patterns += ["experiments/LOG.md"]
myst_heading_anchors = 4  # links to headings are those of GitHub
smartquotes = False  # -- in the text of a command stays as it is
html_theme = "furo"
html_title = "rotmole"
html_extra_path = ["root"]  # index.html leads to README.html
html_use_index = False
html_copy_source = False
html_show_search_summary = False  # it reads other pages, which a page opened from disk may not
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {"light_css_variables": {"font-stack": "system-ui, sans-serif"}}

# The sidebar: what a reader wants, and the pages that help. A page that is in no group comes last.
GROUPS = {
    "Start": ("guide", "data", "answers", "python", "reference"),
    "Compare and look inside": ("compare", "judging", "inspect", "family"),
    "Change an adapter": ("combine", "grow", "prune"),
    "Use an adapter": ("use", "serving"),
    "Run on large machines": ("scale", "performance", "checkpoints", "failures", "compatibility"),
    "The method and the source": ("method", "tour", "files", "testing"),
}
PROJECT = ("CONTRIBUTING", "SECURITY", "CHANGELOG", "experiments/LOG")


def sidebar() -> str:
    """Return the tables of contents, which are added to the start page and shown at the side."""
    there = {file.stem for file in (ROOT / "docs").glob("*.md")}
    groups = {
        name: [f"docs/{page}" for page in pages if page in there] for name, pages in GROUPS.items()
    }
    placed = {page for pages in GROUPS.values() for page in pages}
    groups["Project"] = [f"docs/{page}" for page in sorted(there - placed)] + [*PROJECT]
    return "\n".join(
        "\n".join(["", "```{toctree}", ":hidden:", f":caption: {name}", "", *pages, "```"])
        for name, pages in groups.items()
    )


def add_sidebar(app: Sphinx, name: str, source: list[str]) -> None:
    """Add the tables of contents behind the text of the start page."""
    if name == root_doc:
        source[0] += sidebar()


def for_keys_and_readers(
    app: Sphinx, name: str, template: str, context: dict[str, Any], doctree: object
) -> None:
    """Let a key scroll what scrolls sideways, and give the sidebar's headings their level."""
    body = context.get("body", "").replace("<pre>", '<pre tabindex="0">')
    context["body"] = body.replace('class="table-wrapper', 'tabindex="0" class="table-wrapper')
    headings = context["furo_navigation_tree"].replace(
        'role="heading"', 'role="heading" aria-level="2"'
    )
    context["furo_navigation_tree"] = headings


def setup(app: Sphinx) -> None:
    """Add the sidebar, and what the theme leaves out for keyboards and screen readers."""
    app.connect("source-read", add_sidebar)
    app.connect("html-page-context", for_keys_and_readers, priority=900)  # behind the theme's own
