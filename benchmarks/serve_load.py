"""How does `rotmole serve` hold out under load? Requests at once, some of which are cancelled.

    python benchmarks/serve_load.py [--requests 64] [--at-once 16] [--cancelled 0.05]

One server on loopback serves a base model and a RotMoLE adapter on its q, k, v and o projections,
whose weights are random. Every request is a streamed completion of a prompt of its own, greedy, for
the adapter and the base in turns. Clients that are to be cancelled leave after the first token. The
answers of all others are compared with those of the model alone. A second server, with
--no-batching, gets the first quarter of the requests. Seconds of the processor are counted beside
those of the clock, because other processes may use the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import io
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

HEADER = (
    "server", "requests", "at_once", "cancelled", "lost", "equal", "compared", "seconds",
    "processor_seconds", "tokens", "tokens_per_second", "tokens_per_processor_second",
    "first_token_median_s", "first_token_95_s", "start_s", "memory_before_mb", "memory_peak_mb",
    "memory_after_mb",
)  # fmt: skip
CITIES = (
    "Paris", "Rome", "Madrid", "Lisbon", "Vienna", "Prague", "Oslo", "Athens", "Dublin", "Cairo",
    "Lima", "Quito", "Tokyo", "Delhi", "Hanoi", "Seoul",
)  # fmt: skip


@dataclass
class Outcome:
    """What the clients saw."""

    texts: dict[int, str] = field(default_factory=dict)
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    cancelled: int = 0
    seconds: float = 0.0


def prompt(number: int) -> str:
    return f"{number}. The capital of the country where {CITIES[number % len(CITIES)]} lies is"


def write_run(folder: Path, model: str, dtype: str) -> Path:
    """Write a run file, and in its run folder an adapter whose gates and experts are random."""
    import yaml
    from peft import get_peft_model

    from rotmole import RotMoleConfig
    from rotmole.config.schema import ModelSection
    from rotmole.models.load import load_model

    base = load_model(ModelSection(name=model, dtype="float32")).model
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = RotMoleConfig(
        task_type="CAUSAL_LM", r=6, num_experts=4, top_k=2, target_modules=targets
    )
    adapted = get_peft_model(base, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.02)
    adapted.save_pretrained(folder / "tuned" / "adapter")
    run = {
        "model": {"name": model, "dtype": dtype},
        "output_dir": str(folder / "tuned"),
        "data": {"tasks": {"none": {"files": {"train": "none.jsonl"}}}},
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(run), encoding="utf-8")
    return file


@contextlib.contextmanager
def server(run: Path, *options: str) -> Iterator[tuple[str, psutil.Process, float]]:
    """Run a server; yield its address, its process, and the seconds of its start."""
    log = run.with_suffix(".log")
    command = [sys.executable, "-m", "rotmole_cli", "serve", str(run), "--port", "0", *options]
    begun = time.monotonic()
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
    try:
        while not (found := re.search(r"listening: (\S+)/v1", log.read_text(encoding="utf-8"))):
            if process.poll() is not None:
                raise SystemExit(log.read_text(encoding="utf-8"))
            time.sleep(0.1)
        yield found[1], psutil.Process(process.pid), time.monotonic() - begun
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(600)


async def load(url: str, names: list[str], arguments: argparse.Namespace, requests: int) -> Outcome:
    """Send the requests and return what came of them."""
    import openai

    outcome, turn = Outcome(), asyncio.Semaphore(arguments.at_once)
    leaving = (
        set(range(7, requests, max(1, round(1 / arguments.cancelled))))
        if arguments.cancelled
        else set()
    )

    async def one(number: int) -> None:
        async with turn:
            begun, text = time.monotonic(), ""
            stream = await client.completions.create(
                model=names[number % len(names)], prompt=prompt(number),
                max_tokens=arguments.tokens, stream=True,
            )  # fmt: skip
            async for chunk in stream:
                if not text:
                    outcome.first.append(time.monotonic() - begun)
                text += chunk.choices[0].text
                if number in leaving:
                    await stream.close()
                    outcome.cancelled += 1
                    return
                if chunk.usage is not None:
                    outcome.tokens += chunk.usage.completion_tokens
                    outcome.texts[number] = text

    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600
    ) as client:
        await client.completions.create(model=names[0], prompt="a", max_tokens=2)
        begun = time.monotonic()
        await asyncio.gather(*(one(number) for number in range(requests)), return_exceptions=True)
        outcome.seconds = time.monotonic() - begun
    return outcome


@contextlib.contextmanager
def peak(process: psutil.Process) -> Iterator[list[float]]:
    """Yield a list whose only number is the most MB that a process had in the block."""
    most, over = [process.memory_info().rss / 1e6], threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            most[0] = max(most[0], process.memory_info().rss / 1e6)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


def expected(run: Path, numbers: list[int], tokens: int) -> dict[int, str]:
    """Return the answers of the model alone; even numbers are the adapter's."""
    from rotmole.evaluation.generation import continuation, prompt_tokens
    from rotmole.evaluation.target import find_target, load_target

    loaded = load_target(find_target(run, needs_data=False))
    found = {}
    for number in numbers:
        off = loaded.model.disable_adapter() if number % 2 else contextlib.nullcontext()
        with off:
            row = prompt_tokens(prompt(number), loaded.tokenizer)
            answer = continuation(loaded.model, loaded.tokenizer, row, max_new_tokens=tokens)
        found[number] = answer.text
    return found


def main() -> int:
    """Measure both servers; 1 where a request was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--cancelled", type=float, default=0.05, help="share of the requests")
    parser.add_argument("--tokens", type=int, default=32, help="the most of each answer")
    parser.add_argument("--compare", type=int, default=16, help="answers to compare")
    parser.add_argument("--csv", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    lines, lost = [], 0
    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder), arguments.model, arguments.dtype)
        alone = expected(run, list(range(arguments.compare)), arguments.tokens)
        for name, options, requests in (
            ("batching", ["--cache-tokens", "16384"], arguments.requests),
            ("no batching", ["--no-batching"], arguments.requests // 4),
        ):
            with server(run, *options) as (url, process, start):
                names = _names(url)
                before = process.memory_info().rss / 1e6
                used = sum(process.cpu_times()[:2])
                with peak(process) as most:
                    outcome = asyncio.run(load(url, names, arguments, requests))
                after = process.memory_info().rss / 1e6
                used = sum(process.cpu_times()[:2]) - used
            missing = requests - len(outcome.texts) - outcome.cancelled
            lost += missing
            compared = sorted(set(alone) & set(outcome.texts))
            equal = sum(alone[number] == outcome.texts[number] for number in compared)
            figures = (
                outcome.seconds, used, outcome.tokens, outcome.tokens / outcome.seconds,
                outcome.tokens / used,
                statistics.median(outcome.first), statistics.quantiles(outcome.first, n=20)[-1],
                start, before, most[0], after,
            )  # fmt: skip
            lines.append([
                name, requests, arguments.at_once, outcome.cancelled, missing, equal, len(compared),
                *(f"{figure:.2f}" if figure < 100 else f"{figure:.0f}" for figure in figures),
            ])  # fmt: skip
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([HEADER, *lines])
    comment = (
        f"# {platform.machine()}, {os.cpu_count()} CPUs, torch {version('torch')} with "
        f"{torch.get_num_threads()} threads, transformers {version('transformers')}, "
        f"{arguments.model} {arguments.dtype}, {arguments.tokens} tokens an answer, "
        f"{_busy()} processes ran on the machine on average\n"
    )
    sys.stdout.write(comment + buffer.getvalue())
    if arguments.csv:
        arguments.csv.write_text(comment + buffer.getvalue(), encoding="utf-8")
    return int(lost > 0)


def _busy() -> str:
    """Return the load average of the last minutes, in which others may have used the machine."""
    return f"{os.getloadavg()[1]:.1f}" if hasattr(os, "getloadavg") else "an unknown number of"


def _names(url: str) -> list[str]:
    """Return the names of the adapter and of the base."""
    import openai

    return [model.id for model in openai.OpenAI(base_url=f"{url}/v1", api_key="none").models.list()]


if __name__ == "__main__":
    raise SystemExit(main())
