"""How near a static LoRA comes to a mixture: by rank, and with or without general text.

python experiments/static_lora.py RUN --csv FILE
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from pathlib import Path

from rotmole.evaluation.target import find_target, with_adapter
from rotmole.export.lora import HELD_OUT, OTHER, ROWS, TEXT, Settings, prepare, shared_copy
from rotmole.export.static_lora import active_experts, nearest_layer, total_share
from rotmole.inspection.sums import added_sums

RANKS = (4, 8, 16)
FITS = {"rows": (ROWS,), "rows and text": (ROWS, TEXT)}


def main() -> None:
    """Measure every rank on both fits, and write one line for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--csv", type=Path, required=True, help="the file to write")
    options = parser.parse_args()
    ready = prepare(find_target(options.run), Settings(), say=lambda text: None)
    experts = active_experts(ready.model)
    sums = {
        part: added_sums(ready.model, experts, batches) for part, batches in ready.batches().items()
    }
    lines = []
    for name, parts in FITS.items():
        for rank in RANKS:
            layers = {
                path: nearest_layer(
                    {part: found[path] for part, found in sums.items()}, parts, rank
                )
                for path in experts
            }
            with tempfile.TemporaryDirectory() as folder:
                ready.write(layers, Path(folder))
                static = with_adapter(shared_copy(ready.base), Path(folder)).eval()
            near = ready.agreements(static)
            line: dict[str, object] = {"fitted_on": name, "rank": rank}
            for part, key in ((HELD_OUT, "held_out"), (OTHER, "other")):
                share = total_share(layers, part)
                line[f"{key}_share"] = round(share.static, 4)
                line[f"{key}_linear_share"] = round(share.linear, 4)
                line[f"{key}_kl"] = round(near[part].kl, 5)
                line[f"{key}_same"] = round(near[part].same, 4)
            lines.append(line)
            sys.stderr.write(f"{line}\n")
    with options.csv.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    main()
