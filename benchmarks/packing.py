"""How much faster do rows of 20 to 400 tokens train if they are not padded?

    python benchmarks/packing.py [--quick] [--csv FILE]

SmolLM2-135M's architecture with random weights, 64 rows of lengths drawn evenly from 20 to 400
tokens, of which the last third is learnt; batches of 8 rows, or of as many packs of 512 tokens as
hold about 8 rows. Forward and backward of all rows, by the time of one token that is no padding.
The baseline is a padded batch in the order in which the rows come.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from common import (
    SHAPES,
    Row,
    adapter_config,
    alternate,
    finish,
    model_type,
    parser,
    ratio,
    run,
    show,
    start,
)
from step import TARGETS, smollm2

BATCH, PACK = 8, 512


class Words(NamedTuple):
    """The ids that a collator asks a tokenizer for."""

    pad_token_id: int = 0
    eos_token_id: int = 0


def rows_of(count: int) -> list[dict[str, Any]]:
    """Return rows of 20 to 400 tokens, of which the last third is learnt."""
    draw = random.Random(0)
    rows = []
    for _ in range(count):
        ids = [draw.randrange(3, 500) for _ in range(draw.randint(20, 400))]
        asked = len(ids) * 2 // 3
        rows.append({"input_ids": ids, "labels": [-100] * asked + ids[asked:]})
    return rows


def batches(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows as batches, by the way in which they are put together."""
    from rotmole.data import Collator, PackedCollator, pack
    from rotmole.training.order import EpochSampler

    def cut(items: Sequence[Any], size: int) -> list[Any]:
        return [items[i : i + size] for i in range(0, len(items), size)]

    lengths = [len(row["input_ids"]) for row in rows]
    packs = [[rows[i] for i in each] for each in pack(lengths, PACK, seed=0)]
    grouped = [rows[i] for i in EpochSampler(len(rows), 0, batch=BATCH, lengths=lengths).order(0)]
    size = max(round(BATCH * len(packs) / len(rows)), 1)
    padded, joined, flat = (
        Collator(Words()), PackedCollator(Words()), PackedCollator(Words(), flat=True)
    )  # fmt: skip
    return {
        "padded": [padded(each) for each in cut(rows, BATCH)],
        "group_by_length": [padded(each) for each in cut(grouped, BATCH)],
        "packing": [joined(each) for each in cut(packs, size)],
        "padding_free": [flat(each) for each in cut(rows, BATCH)],
        "packing, one pack a batch": [joined(each) for each in cut(packs, 1)],
    }


def walker(model: Any, given: Sequence[dict[str, Any]]) -> Callable[[], None]:
    """Return one pass forward and backward over batches."""
    from torch.nn.functional import cross_entropy

    from rotmole.data import model_inputs

    def walk() -> None:
        for batch in given:
            inputs = model_inputs(batch)
            labels = inputs.pop("labels")
            learnt = (labels[:, 1:] != -100).any(0).nonzero()[:, 0]
            logits = model(**inputs, logits_to_keep=learnt, use_cache=False).logits
            cross_entropy(logits.flatten(0, 1).float(), labels[:, learnt + 1].flatten()).backward()
        model.zero_grad()

    return walk


def main() -> int:
    """Measure all ways beside the padded batch."""
    given = parser(__doc__, rounds=5).parse_args()
    start(given)
    from peft import get_peft_model

    targets = "q,k,v,o"
    config = adapter_config("tangent", SHAPES[0], TARGETS[targets])
    model = get_peft_model(smollm2(given.quick), config).train()
    made = batches(rows_of(16 if given.quick else 64))
    steps = {name: walker(model, each) for name, each in made.items()}
    times = alternate(steps, given.rounds, warm_up=1)
    rows = []
    for name, each in made.items():
        tokens = sum(batch["input_ids"].numel() for batch in each)
        real = sum(int(batch["attention_mask"].sum()) for batch in each)
        print(f"{name}: {1 - real / tokens:.0%} padding")
        if name != "padded":
            case = f"rows of 20 to 400 tokens, {targets}, {model_type()}"
            figures = ratio(times, name, "padded")
            rows.append(
                show(Row("packing", case, name, "time of a token", "padded", unit="x", **figures))
            )
    return finish(rows, given)


if __name__ == "__main__":
    run(main)
