"""Does a whole training step cost what LoRA's costs? Time, and peak memory of a fresh process.

    python benchmarks/step.py [--full] [--quick] [--csv FILE]

SmolLM2-135M's architecture with random weights (neither time nor memory depends on their values),
batch 4 x 128, bfloat16 base with float32 adapters (on a machine without fast bfloat16 products, a
float32 base), forward, backward, AdamW; ours with kernels: compiled too. Peak memory is the largest
resident memory of a fresh process that makes a small step and then a whole one, median of three.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from common import (
    SHAPES,
    Row,
    adapter_config,
    alternate,
    finish,
    lora_like,
    lora_name,
    model_type,
    parser,
    ratio,
    run,
    show,
    start,
)

TARGETS = {"q,k,v,o": ["q_proj", "k_proj", "v_proj", "o_proj"], "all-linear": "all-linear"}
MODES = ("none", "tangent")
AS_KERNELS = "kernels compiled"


def smollm2(quick: bool = False) -> Any:
    """Return the architecture of SmolLM2-135M with random weights; two layers if quick.

    It is made in its type at once: a float32 copy would be the peak of memory.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from rotmole.models.builtin import SMOLLM2

    settings = dict(SMOLLM2.architecture)
    settings.pop("model_type")
    if quick:
        settings |= {"num_hidden_layers": 2, "vocab_size": 512}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        LlamaConfig(**settings), dtype=getattr(torch, model_type())
    )


def ours_on(
    base: Any, mode: str, shape: tuple[int, int, int], targets: Any, **settings: Any
) -> Any:
    """Return ours on a copy of the base."""
    from peft import get_peft_model

    config = adapter_config(mode, shape, targets, **settings)
    return get_peft_model(copy.deepcopy(base), config)


def pair(base: Any, mode: str, shape: tuple[int, int, int], targets: Any) -> tuple[Any, Any]:
    """Return ours and equal-parameter LoRA, each on a copy of the base."""
    ours = ours_on(base, mode, shape, targets)
    return ours, lora_like(ours, targets, copy.deepcopy(base))


def stepper(model: Any, batch: tuple[int, int]) -> Callable[..., None]:
    """Return one whole training step of a model, of the whole batch or a corner of it."""
    import torch

    ids = torch.randint(3, 500, batch, generator=torch.Generator().manual_seed(0)).to(model.device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    model.train()

    def step(rows: int = batch[0], length: int = batch[1]) -> None:
        some = ids[:rows, :length]
        model(input_ids=some, labels=some, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def alone(words: str, given: argparse.Namespace) -> int:
    """Make a small and a whole step in this process and print its peak memory in MiB."""
    from peft import get_peft_model

    kind, mode, shape, targets = json.loads(words)
    base = smollm2(given.quick)
    if kind == "ours":
        model = get_peft_model(base, adapter_config(mode, shape, TARGETS[targets]))
    else:
        from peft import LoraConfig

        config = LoraConfig(r=int(kind), lora_alpha=int(kind), target_modules=TARGETS[targets])
        model = get_peft_model(base, config)
    step = stepper(model, (4, 128))
    step(1, 8)  # makes the optimiser's state
    step()
    print(json.dumps(peak_mib()))
    return 0


def peak_mib() -> float:
    """Return this process's largest resident memory in MiB."""
    from rotmole.models.memory import peak_rss_bytes

    return peak_rss_bytes() / 2**20


def peaks(
    kinds: tuple[str, str], mode: str, shape: tuple, targets: str, given: argparse.Namespace
) -> tuple[list[float], ...]:
    """Return the peak memory in MiB of fresh processes, three (one if quick) of each kind.

    One of each kind runs at a time, with one thread: beside each other they take half as long.
    """
    found: tuple[list[float], ...] = ([], [])
    for _ in range(1 if given.quick else 3):
        running = []
        for kind in kinds:
            words = json.dumps([kind, mode, shape, targets])
            command = [sys.executable, __file__, "--alone", words, "--threads", "1"]
            command += ["--quick"] if given.quick else []
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        for process, values in zip(running, found, strict=True):
            said, _ = process.communicate()
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, process.args)
            values.append(float(said.splitlines()[-1]))
    return found


def memory(row: tuple, mode: str, shape: tuple, targets: str, rank: int, given: Any) -> Row:
    """Compare peak memory of ours and of LoRA with the given rank."""
    ours, theirs = peaks(("ours", str(rank)), mode, shape, targets, given)
    middle = statistics.median(theirs)
    ratios = sorted(value / middle for value in ours)
    return Row(
        *row, "peak memory of a process", f"PEFT LoRA r={rank}", statistics.median(ratios),
        ratios[0], ratios[-1], "x", statistics.median(ours), middle, len(ours),
    )  # fmt: skip


def main() -> int:
    """Measure the small mixture on q,k,v,o in mode tangent, or every case (--full)."""
    options = parser(__doc__)
    options.add_argument("--alone", help=argparse.SUPPRESS)
    given = options.parse_args()
    start(given)
    if given.alone:
        return alone(given.alone, given)
    base = smollm2(given.quick)
    rows = []
    for targets, names in TARGETS.items():
        for shape in SHAPES[:1] if given.quick else SHAPES[::2]:
            for mode in MODES[1:] if given.quick else MODES:
                usual = (mode, shape, targets) == ("tangent", SHAPES[0], "q,k,v,o")
                if not (usual or given.full or given.quick):
                    continue
                ours, lora = pair(base, mode, shape, names)
                E, R, K = shape
                row = ("step", f"{targets} 4 x 128 {model_type()} E={E} R={R} K={K}", mode)
                models = {"ours": ours, "lora": lora}
                models[AS_KERNELS] = ours_on(base, mode, shape, names, kernels="compiled")
                steps = {name: stepper(model, (4, 128)) for name, model in models.items()}
                times = alternate(steps, given.rounds, warm_up=1)
                for name, kind in (("ours", mode), (AS_KERNELS, f"{mode}, {AS_KERNELS}")):
                    figures = ratio(times, name, "lora")
                    where = (*row[:2], kind, "training step", lora_name(lora))
                    rows.append(show(Row(*where, **figures)))
                rank = lora.peft_config["default"].r
                del ours, lora, models, steps
                rows.append(show(memory(row, mode, shape, targets, rank, given)))
    return finish(rows, given)


if __name__ == "__main__":
    run(main)
