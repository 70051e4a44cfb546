"""Check the documentation site as it was built: links, clicks to each page, looks in a browser.

    python tests/site.py FOLDER [--browser]

Every link inside the site leads to a file and an anchor that exist, every page is at most two
clicks away from the start page, and no page loads anything from elsewhere. With --browser, headless
Chromium opens each page wide and narrow, light and dark, and searches without a server. A page
fails if it scrolls sideways, says anything on the console, or if axe-core finds something serious.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from browser import SCHEMES, WIDTHS, chromium, faults

CLICKS = 2
LINKED = {"a": "href", "form": "action"}
LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}
SEARCHED = "rotation"


class Page(HTMLParser):
    """What an HTML file links to, loads, and which anchors it has."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the tag's address and its name."""
        names = dict(attrs)
        self.anchors |= {names["id"] or ""} if "id" in names else set()
        if tag in LINKED and names.get(LINKED[tag]):
            self.links.append(names[LINKED[tag]] or "")
        if tag in LOADED and names.get(LOADED[tag]):
            self.loads.append(names[LOADED[tag]] or "")

    def target(self, link: str) -> tuple[Path, str] | None:
        """Return the file and the anchor that a link leads to; None if it leads away."""
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            return None
        file = (self.file.parent / unquote(parts.path)).resolve() if parts.path else self.file
        return file, unquote(parts.fragment)


def link_faults(pages: dict[Path, Page]) -> Iterator[str]:
    """Yield every link that leads nowhere, and everything that is loaded from elsewhere."""
    for page in pages.values():
        for link in page.links:
            target = page.target(link)
            if target is None:
                continue
            file, anchor = target
            if not file.is_file():
                yield f"{page.file.name} links to {link}, which does not exist"
            elif anchor and file in pages and anchor not in pages[file].anchors:
                yield f"{page.file.name} links to {link}, and that page has no such anchor"
        for address in page.loads:
            target = page.target(address)
            if not address.startswith("data:") and (target is None or not target[0].is_file()):
                yield f"{page.file.name} loads {address}, which is not part of the site"


def click_faults(pages: dict[Path, Page], folder: Path) -> Iterator[str]:
    """Yield every page further than CLICKS from README, to which index.html leads by itself."""
    reached = near = {folder / "index.html", folder / "README.html"}
    for _ in range(CLICKS):
        targets = (pages[file].target(link) for file in near for link in pages[file].links)
        near = {target[0] for target in targets if target and target[0] in pages} - reached
        reached = reached | near
    for file in sorted(pages.keys() - reached):
        yield f"{file.name} is more than {CLICKS} clicks away from the start page"


def search_faults(browser: Any, folder: Path) -> Iterator[str]:
    """Yield what is wrong with the search, which runs in the page, without a server."""
    tab = browser.new_page()
    said: list[str] = []
    tab.on("console", lambda message: said.append(f"search: {message.text}"))
    tab.goto(f"{(folder / 'search.html').as_uri()}?q={SEARCHED}")
    tab.wait_for_timeout(3000)  # results arrive one after another
    found = tab.evaluate("document.querySelectorAll('#search-results li a').length")
    if found < 3:
        yield f"the search for {SEARCHED!r} finds {found} pages in 3 seconds"
    yield from said
    tab.close()


def browser_faults(folder: Path, files: list[Path]) -> Iterator[str]:
    """Yield what headless Chromium finds on each page, and in the search."""
    with chromium() as browser:
        for file, width, scheme in product(files, WIDTHS, SCHEMES):
            for fault in faults(browser, file, width, scheme, folder):
                yield f"{file.name}, {width} pixels, {scheme}: {fault}"
        yield from search_faults(browser, folder)


def main() -> int:
    """Check the site and print what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--browser", action="store_true", help="look at each page in Chromium")
    options = parser.parse_args()
    folder = options.folder.resolve()
    pages = {file: Page(file) for file in sorted(folder.rglob("*.html"))}
    found = [*link_faults(pages), *click_faults(pages, folder)]
    if options.browser:
        found += browser_faults(folder, [file for file in pages if file.name != "index.html"])
    print("\n".join([*found, f"{len(pages)} pages, {len(found)} faults"]))
    return bool(found) or len(pages) < 2


if __name__ == "__main__":
    sys.exit(main())
