"""Look at the HTML pages as people do: headless Chromium, wide and narrow, light and dark.

    python tests/browser.py [PAGE ...]

Without pages, those of `pages()` are written and looked at. A page fails if it scrolls sideways,
says anything on the console, asks for anything but itself, or if axe-core finds something serious.
Screenshots lie in .cache/pages/.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SHOTS = ROOT / ".cache" / "pages"
WIDTHS = (1280, 390)
SCHEMES = ("light", "dark")
SERIOUS = ("serious", "critical")


def pages(folder: Path) -> list[Path]:
    """Write a study's page and reports of inspections: small, large, and of two runs."""
    from inspected_cases import made_inspection
    from judged_cases import made_results
    from rotmole.comparison.judge import judge
    from rotmole.comparison.pages.page import PAGE, write_pages
    from rotmole.inspection.pages.report import write_report

    study = folder / "study"
    shifts = {"lora": 0.0, "moe_lora": 0.05, "rotmole": -0.05}
    write_pages(judge(made_results(shifts)), study, "A study")
    small = write_report(made_inspection(), folder / "small")
    large = write_report(made_inspection(layers=120), folder / "large")
    other = made_inspection(layers=2, target="runs/other", rotation="none")
    two = write_report(made_inspection(), folder / "two", [other])
    return [study / PAGE, small, large, two]


@contextmanager
def chromium() -> Iterator[Any]:
    """Start the headless browser for a block."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium")
    if program is None:
        raise SystemExit("missing: chromium (Debian: apt-get install chromium)")
    SHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


def faults(
    browser: Any, page: Path, width: int, scheme: str, site: Path | None = None
) -> list[str]:
    """Open a page, take a screenshot, and return what is wrong with it, in words.

    Args:
        browser: of `chromium`.
        page: HTML file.
        width: in pixels.
        scheme: light or dark.
        site: folder of which the page may load files; None: it may load nothing.
    """
    from axe_playwright_python.sync_playwright import Axe

    found: list[str] = []
    size = {"width": width, "height": 900}
    context = browser.new_context(viewport=size, color_scheme=scheme)
    context.set_default_timeout(120_000)  # a long page on a busy machine
    tab = context.new_page()
    tab.on("console", lambda message: found.append(f"console: {message.text}"))
    tab.on("pageerror", lambda error: found.append(f"error: {error}"))
    address = page.resolve().as_uri()
    own = f"{site.resolve().as_uri()}/" if site else address
    tab.on("request", lambda r: r.url.startswith(own) or found.append(f"asks for {r.url[:100]}"))
    tab.goto(address)
    shot = SHOTS / f"{page.parent.name}-{page.stem}-{width}-{scheme}.png"
    tab.screenshot(path=shot, full_page=site is None)  # some pages of a site take half a minute
    wide = tab.evaluate("document.documentElement.scrollWidth")
    if wide > width:
        found.append(f"{wide} pixels wide, scrolls sideways")
    # preload would read the style sheets again, which a page opened from disk may not
    for rule in Axe().run(tab, options={"preload": False}).response["violations"]:
        if rule["impact"] in SERIOUS:
            nodes = [node["html"][:120] for node in rule["nodes"][:3]]
            found.append(f"{rule['impact']}: {rule['help']}, {len(rule['nodes'])} times: {nodes}")
    context.close()
    return found


def main() -> int:
    """Look at each page and print what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("pages", nargs="*", type=Path, help="HTML files")
    chosen = parser.parse_args().pages
    bad = 0
    with chromium() as browser:
        for page in chosen or pages(SHOTS):
            for width, scheme in product(WIDTHS, SCHEMES):
                for fault in faults(browser, page, width, scheme):
                    print(f"{page.parent.name}, {width} pixels, {scheme}: {fault}")
                    bad += 1
    print(f"{bad} faults; screenshots in {SHOTS}")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
