"""How much of the static share is lost if a linear map may read a part of a layer's input only.

python experiments/static_share.py RUN --csv FILE
"""

from __future__ import annotations

import argparse
import csv
from contextlib import ExitStack
from pathlib import Path

from rotmole.data import load_splits
from rotmole.evaluation.target import find_target, load_target
from rotmole.inspection.probe import ENOUGH, Probes, adapted_layers
from rotmole.inspection.sample import batches, sample_of
from rotmole.inspection.static_share import CALIBRATION, HELD_OUT, static_share, total

WIDTHS = (1, 128, 256, 10_000)
"""Numbers that the map reads: at least those that the adapter reads, at most the whole input."""
RANK = 16


def main() -> None:
    """Fit on training rows, judge on test rows, and write one line for each width."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--csv", type=Path, required=True, help="the file to write")
    parser.add_argument("--tokens", type=int, default=4000, help="of each of both")
    parser.add_argument("--every", type=int, default=1, help="measure every n-th layer")
    options = parser.parse_args()
    place = find_target(options.run)
    assert place.run is not None
    loaded = load_target(place)
    model, tokenizer = loaded.model, loaded.tokenizer
    splits = load_splits(place.run.data, seed=place.run.seed, tokenizer=tokenizer, date=place.date)
    sample = sample_of(place.run, splits | {"validation": {}}, tokenizer, options.tokens)
    found = adapted_layers(model, model.active_adapter)
    layers = {path: found[path] for path in list(found)[options.every - 1 :: options.every]}
    probes = {
        width: Probes(layers, tokens=width * ENOUGH, memory=1 << 33, parts=2) for width in WIDTHS
    }
    for part, rows in ((CALIBRATION, sample.calibration), (HELD_OUT, sample.held_out)):
        for task, each in rows.items():
            with ExitStack() as stack:
                for probe in probes.values():
                    stack.enter_context(probe.listening(task, part, effects=False))
                # one pass for all; each forgets the last tensor by itself
                for batch in batches(each, model):
                    probes[WIDTHS[0]].run(model, [batch])
                    for probe in probes.values():
                        for running in probe.running.values():
                            running.drop()
    lines = []
    for probe in probes.values():
        shares = [static_share(probe.sums(path), (RANK,)) for path in layers]
        whole = total([share for share in shares if share is not None])
        assert whole is not None
        read = [
            probe.reads[path].shape[1] if path in probe.reads else found.layer.in_features
            for path, found in layers.items()
        ]
        lines.append(
            {
                "numbers_read": max(read),
                "layers": len(layers),
                "rank": RANK,
                "fitted_tokens": whole.tokens[0],
                "held_out_tokens": whole.tokens[1],
                "fitted_share": round(whole.calibration[0], 4),
                "held_out_share": round(whole.held_out[0], 4),
            }
        )
    with options.csv.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    main()
