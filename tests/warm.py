"""Processes that start warm: one interpreter imports everything once, then forks each of them.

`run(jobs, folder)` starts that interpreter and waits. A job is {"call": "module:function",
"arguments": {...}, "processes": 2}: so many forks, each a rank of one gloo group, call the
function; what a rank prints goes to files, and its exit code is what the function returns.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMPORTS = (
    "datasets", "matplotlib.backends.backend_svg", "matplotlib.figure", "peft",
    "rotmole.cli.check", "rotmole.cli.doctor", "rotmole.cli.eval.command",
    "rotmole.cli.generate.command",
    "rotmole.cli.train", "rotmole.training.run", "rotmole_cli.run", "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama",
)  # fmt: skip


@dataclass(frozen=True)
class Rank:
    """What one process did."""

    code: int
    out: str
    err: str


def run(jobs: Sequence[dict[str, Any]], folder: Path, timeout: float = 900) -> list[list[Rank]]:
    """Run jobs one after the other; return for each its ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, __file__, json.dumps(list(jobs)), str(folder)]
    done = subprocess.run(words, timeout=timeout, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [
        [_rank(folder, job, rank, code) for rank, code in enumerate(codes)]
        for job, codes in enumerate(json.loads(done.stdout))
    ]


def command(words: list[str]) -> int:
    """Run a command of rotmole."""
    from rotmole_cli import main

    return main(words)


def stopped_command(words: list[str]) -> int:
    """Run a command; the second rank alone is sent SIGTERM, when its second update ends."""
    return _struck(words, "on_optimizer_step", 1)


def cut_command(words: list[str]) -> int:
    """Run a command; the second rank alone is sent SIGTERM, in the validation of update 3."""
    return _struck(words, "on_prediction_step", 3)


def _struck(words: list[str], moment: str, step: int) -> int:
    from transformers import TrainerCallback

    from rotmole.training import build

    def strike(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)

    stop = type("Stop", (TrainerCallback,), {moment: strike})()
    wire = build.build_trainer
    build.build_trainer = lambda *args, **kwargs: _with(wire(*args, **kwargs), stop)
    return command(words)


def counted_command(words: list[str], file: str) -> int:
    """Run a command; write how many rows this rank gave to the model, scored and answered."""
    from rotmole.evaluation import generation, scoring

    rows = {"scored": 0, "answered": 0}
    forward, tree, decode = scoring._logits, scoring.tree_of, generation.decoded

    def scores(model: Any, inputs: Any, *more: Any) -> Any:
        rows["scored"] += len(inputs)
        return forward(model, inputs, *more)

    def grows(inputs: Any) -> Any:
        rows["scored"] += len(inputs)
        return tree(inputs)

    def decodes(model: Any, tokenizer: Any, prompts: Any, **options: Any) -> Any:
        rows["answered"] += len(prompts)
        return decode(model, tokenizer, prompts, **options)

    scoring._logits, scoring.tree_of, generation.decoded = scores, grows, decodes
    generation.TOGETHER = 1  # so that few rows make several parts
    code = command(words)
    Path(f"{file}.{os.environ.get('RANK', '0')}").write_text(json.dumps(rows), encoding="utf-8")
    return code


STAMP = 0o005
"""Umask of a watched rank: whatever it creates, others may write (2) but neither read nor enter."""

_TOUCHES = (
    "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate",
    "shutil.rmtree",
)  # fmt: skip


def watched_command(words: list[str], folder: str, file: str) -> int:
    """Run a command; the second rank lists what it opened to write, made or removed in a folder.

    What is not written by Python (torch's and safetensors' files) is known by the umask.
    """
    if os.environ["RANK"] != "1":
        return command(words)
    touched: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
            paths = [path]
        elif event in _TOUCHES:
            paths = [given for given in arguments[:2] if isinstance(given, (str, bytes, Path))]
        else:
            return
        for path in map(os.fsdecode, paths):
            inside = path.startswith(folder + os.sep)
            if inside and not (event == "os.mkdir" and os.path.isdir(path)):  # exist_ok
                touched.append(f"{event} {path[len(folder) + 1 :]}")

    os.umask(STAMP)
    sys.addaudithook(watch)
    code = command(words)
    Path(file).write_text(json.dumps(touched), encoding="utf-8")
    return code


def divided_command(words: list[str]) -> int:
    """Run a command whose second rank finds bfloat16 the faster one."""
    from rotmole.models import precision

    precision.bfloat16_is_faster = lambda: os.environ["RANK"] == "1"
    return command(words)


def _with(trainer: Any, callback: Any) -> Any:
    trainer.add_callback(callback)
    return trainer


def _rank(folder: Path, job: int, rank: int, code: int) -> Rank:
    texts = [(folder / f"{job}.{rank}.{name}").read_text(encoding="utf-8") for name in _STREAMS]
    return Rank(code, *texts)


_STREAMS = ("out", "err")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _run_job(number: int, job: dict[str, Any], folder: Path) -> list[int]:
    world, port = job.get("processes", 1), str(free_port())
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            if world > 1:
                os.environ |= {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                    "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                }  # fmt: skip
            _be_rank(job, [folder / f"{number}.{rank}.{name}" for name in _STREAMS])
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def _be_rank(job: dict[str, Any], files: list[Path]) -> None:
    """Become one rank; never returns."""
    for stream, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
    code = 1
    try:
        module, _, name = job["call"].partition(":")
        code = getattr(importlib.import_module(module), name)(**job.get("arguments", {})) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # gloo's own tear-down may abort after all went well


def become_warm() -> None:
    """Import all that a command may need, and spare the forks from collecting it as garbage."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # as the command line does, before imports
    for name in IMPORTS:
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)
    gc.freeze()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    become_warm()
    jobs, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    print(json.dumps([_run_job(number, job, folder) for number, job in enumerate(jobs)]))
