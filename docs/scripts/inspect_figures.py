"""Draw the figures of README and docs/inspect.md from experiments/results/inspect_demo.json.gz.

    python docs/scripts/inspect_figures.py [--new RUN_FOLDER ...] [--into FOLDER]

--new first replaces the record by that of inspected runs: of the first one what the figures need,
of the others their losses. These commands make the two folders:

    rotmole demo
    rotmole inspect runs/demo/rotmole runs/demo/moe-lora
"""

from __future__ import annotations

import argparse
import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rotmole.drawing import standalone
from rotmole.inspection.inspection import ALL, FILE, Inspection
from rotmole.inspection.pages.curves import curves_of
from rotmole.inspection.pages.figures import convergence, plots
from rotmole.inspection.pages.plot import Plot
from rotmole.inspection.pages.turning import most_turned

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "experiments" / "results" / "inspect_demo.json.gz"
PICTURES = ROOT / "docs" / "pictures"


def shortened(inspection: Inspection) -> Inspection:
    """Return a record without what no figure shows: usage by task, but in the drawn module."""
    turned = most_turned(inspection)
    layers = [
        layer
        if turned is not None and layer.module == turned.module
        else replace(layer, usage={ALL: layer.usage[ALL]}, effects={ALL: layer.effects[ALL]})
        for layer in inspection.layers
    ]
    return replace(inspection, layers=tuple(layers), passage=None)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return value


def store(folders: list[Path], file: Path) -> None:
    """Write the record of inspected runs: the first one's, and the losses of the others."""
    first = shortened(Inspection.read(folders[0] / FILE))
    records = [first.to_dict()]
    for folder in folders[1:]:
        source = replace(first.source, target=str(folder), curves=curves_of(folder), settings={})
        records.append(Inspection(source, (), ()).to_dict())
    text = json.dumps(_rounded(records), separators=(",", ":"))
    file.write_bytes(gzip.compress(text.encode(), mtime=0))


def drawn(file: Path) -> list[Plot]:
    """Return the figures of the record."""
    records = json.loads(gzip.decompress(file.read_bytes()))
    first, *others = map(Inspection.from_dict, records)
    return [*plots(first), *convergence([first, *others])[:1]]


def main() -> None:
    """Store a new record if there is one, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--new", type=Path, nargs="+", help="run folders with inspect.json")
    parser.add_argument("--into", type=Path, default=PICTURES, help="folder for the figures")
    options = parser.parse_args()
    if options.new:
        store(options.new, RECORD)
    for plot in drawn(RECORD):
        (options.into / f"inspect-{plot.name}.svg").write_text(
            standalone(plot.svg) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
