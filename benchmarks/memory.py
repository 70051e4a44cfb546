"""Is the formula of `rotmole check` right? Peak memory of a fresh training process beside it.

    python benchmarks/memory.py [--quick] [--csv FILE]

SmolLM2-135M in bfloat16, adapters on q,k,v,o, eight updates of 4 rows of 64 to 256 tokens: plain,
with gradient checkpointing, on a 4-bit base, and with 64 experts. Rows differ in length, as they do
in a real run: the allocator cannot use all freed memory again, which the formula counts. Each case
is a process of its own, which estimates before it loads anything and then trains; its peak is the
largest resident memory that Linux counted for it. A ratio of 1 means that the formula is right.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import Row, finish, parser, run, show, start

CASES: dict[str, dict[str, Any]] = {
    "E=4": {},
    "E=4, gradient checkpointing": {"checkpointing": True},
    "E=4, 4-bit base": {"quantization": "bnb-4bit-nf4"},
    "E=64": {"experts": 64},
    "E=64, gradient checkpointing": {"experts": 64, "checkpointing": True},
}  # fmt: skip
BATCH, TOKENS, ROWS = 4, 256, 32


def run_file(case: dict[str, Any], folder: Path, quick: bool) -> str:
    """Return the run file of a case; its rows are written beside it."""
    import yaml
    from ranks.memory import run_text

    given = argparse.Namespace(
        model="smollm2-135m", batch=BATCH, fsdp=False, offload=False,
        experts=case.get("experts", 4), rank=8,
    )  # fmt: skip
    content = yaml.safe_load(run_text(given, folder))
    content["model"] |= {"dtype": "bfloat16", "quantization": case.get("quantization", "none")}
    content["training"] |= {
        "gradient_checkpointing": case.get("checkpointing", False),
        "max_steps": 1 if quick else ROWS // BATCH,
    }
    longest = (20 if quick else TOKENS) - 4  # words; the answer and its ends are the others
    lengths = [longest * (5 + 15 * (i % 16) // 15) // 20 for i in range(ROWS)]
    rows = [{"prompt": "red " * words, "completion": "blue"} for words in lengths]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return yaml.safe_dump(content)


def alone(name: str, quick: bool) -> dict[str, int]:
    """Estimate, then train, in this process; return the bytes of every part and of the peak."""
    import torch
    from ranks.memory import peak_bytes

    from rotmole.config.load import load_run, sft_arguments
    from rotmole.models.memory import estimate_memory, resident_bytes
    from rotmole.models.preview import preview
    from rotmole.training.run import train

    with tempfile.TemporaryDirectory() as folder:
        chosen = load_run(None, text=run_file(CASES[name], Path(folder), quick))
        length = 20 if quick else TOKENS
        before = resident_bytes()
        guess = estimate_memory(
            preview(chosen.model, chosen.adapter_config, torch.bfloat16),
            batch=BATCH, length=length, settings=sft_arguments(chosen), process=before,
            quantization=chosen.model.quantization,
        )  # fmt: skip
        train(chosen, progress=False)
    parts = ("process", "weights", "adapter", "optimizer", "step", "total")
    return {part: getattr(guess, part) for part in parts} | {"peak": peak_bytes()}


def main() -> int:
    """Measure every case, one process after the other."""
    options = parser(__doc__)
    options.add_argument("--alone", help=argparse.SUPPRESS)
    given = options.parse_args()
    start(given)
    if given.alone:
        print(json.dumps(alone(given.alone, given.quick)))
        return 0
    rows = []
    for name in list(CASES)[:1] if given.quick else CASES:
        command = [sys.executable, "-W", "ignore", __file__, "--alone", name, "--threads", "1"]
        command += ["--quick"] if given.quick else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        bytes_of = json.loads(done.stdout.splitlines()[-1])
        mib = {part: size / 2**20 for part, size in bytes_of.items()}
        print(", ".join(f"{part} {size:.0f}" for part, size in mib.items()), flush=True)
        value = mib["peak"] / mib["total"]
        sides = {"ours": mib["peak"], "baseline": mib["total"]}
        case = f"q,k,v,o {BATCH} x 64 to {TOKENS} tokens, bfloat16, R=8 K=2 {name}"
        row = Row("memory", case, "tangent", "peak of training", "the formula of check",
                  value, value, value, **sides)  # fmt: skip
        rows.append(show(row))
        finish(rows, given)  # a case takes a minute: what is measured is kept
    return 0


if __name__ == "__main__":
    run(main)
