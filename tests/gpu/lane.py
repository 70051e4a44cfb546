"""Run what can only be seen on a GPU, on as many cards as there are; keep what was measured.

    python tests/gpu/lane.py [--dry] [--into FOLDER] [--only PART ...] [-- pytest arguments]

Three parts, each in processes of its own: the checks of device_checks.py (laws, ways to compute,
compiler, attention), DDP and FSDP2 with one rank a card (ranks.py), and times, launches and peak
memory (benchmarks/gpu.py). The result is one file, gpu-NAME.json, NAME that of the card; nothing
but a card writes one. Without a card a sentence says so and the status is 0. --dry runs the same
code on the CPU, with two ranks over gloo and small shapes: it shows that the lane starts. The
variable LONGEST is the seconds after which a part is stopped; what it measured until then is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
FOLDERS = ("src", "tests", "tests/ops", "tests/ops/mixture", "tests/ops/rotation", "benchmarks")
LONGEST = int(os.environ.get("LONGEST", "3600"))  # seconds of a part; ranks might wait forever
NONE = "no GPU here: nothing was measured on one (make gpu DRY=1 runs the lane on the CPU)"
Command = Sequence[str | Path]


def cards() -> list[str]:
    """Name the cards of this machine."""
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def start(command: Command, device: str) -> int:
    """Run a part's processes with the sources of this checkout; return the exit status."""
    variables = os.environ | {"ROTMOLE_DEVICE": device, "HF_HUB_OFFLINE": "1"}
    before = filter(None, [os.environ.get("PYTHONPATH")])
    variables["PYTHONPATH"] = os.pathsep.join([*(str(ROOT / f) for f in FOLDERS), *before])
    if device == "cpu":
        variables["OMP_NUM_THREADS"] = "1"
    try:
        return subprocess.run(
            command, cwd=ROOT, env=variables, check=False, timeout=LONGEST
        ).returncode
    except subprocess.TimeoutExpired:
        print(f"stopped after {LONGEST} s")
        return 124


def run_checks(
    device: str, ranks: int, folder: Path, more: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """Run device_checks.py; return the fault of each check, "" for none, and what failed."""
    report = folder / "checks.xml"
    words = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider",
             "--junitxml", report, HERE / "device_checks.py", *more]  # fmt: skip
    status = start(words, device)
    said = {}
    if report.exists():
        for case in ElementTree.parse(report).iter("testcase"):
            wrong = [each for each in case if each.tag in ("failure", "error", "skipped")]
            said[case.get("name", "")] = (
                (wrong[0].get("message") or wrong[0].tag).splitlines()[0] if wrong else ""
            )
    return said, _failures(said, status)


def run_ranks(
    device: str, ranks: int, folder: Path, more: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """Run ranks.py with one process a card; return its checks and failures as `run_checks`."""
    report = folder / "ranks.json"
    words = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone",
             "--nproc-per-node", str(ranks), HERE / "ranks.py", report]  # fmt: skip
    status = start(words, device)
    checks = json.loads(report.read_text())["checks"] if report.exists() else {}
    said = {f"{ranks} ranks: {name}": wrong for name, wrong in checks.items()}
    return said, _failures(said, status)


def run_bench(
    device: str, ranks: int, folder: Path, more: Sequence[str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Run benchmarks/gpu.py; return its rows up to where it ended, and whether that was early."""
    report = folder / "rows.json"
    words = [sys.executable, "-W", "ignore", ROOT / "benchmarks" / "gpu.py", "--device", device,
             "--threads", "1", "--json", report]  # fmt: skip
    status = start([*words, *(["--quick"] if device == "cpu" else [])], device)
    rows: list[dict[str, Any]] = json.loads(report.read_text()) if report.exists() else []
    ended = [f"bench: exit status {status} after {len(rows)} figures"] if status else []
    return rows, ended or ([] if rows else ["bench: no figure"])


def _failures(said: dict[str, str], status: int) -> list[str]:
    """Name the checks that failed; the processes, if they failed and no check did."""
    failed = [f"{name}: {wrong}" for name, wrong in said.items() if wrong]
    if not failed and (status or not said):
        return [f"exit status {status} after {len(said)} checks"]
    return failed


PARTS: dict[str, Callable[[str, int, Path, Sequence[str]], tuple[Any, list[str]]]] = {
    "checks": run_checks, "ranks": run_ranks, "bench": run_bench,
}  # fmt: skip


def write(into: Path, names: list[str], results: dict[str, Any]) -> Path:
    """Keep what was found on cards, with what it was made with."""
    import torch

    sys.path.insert(0, str(ROOT / "benchmarks"))
    from common import about

    from rotmole.files import atomic_write_text

    made = about(torch.get_num_threads()) | {
        "cuda": torch.version.cuda or "",
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "memory": torch.cuda.get_device_properties(0).total_memory,
    }
    slug = re.sub("[^a-z0-9]+", "-", names[0].lower()).strip("-")
    content = {"cards": names, "made": made, **results}
    into.mkdir(parents=True, exist_ok=True)
    return atomic_write_text(into / f"gpu-{slug}.json", json.dumps(content, indent=1) + "\n")


def main(arguments: Sequence[str]) -> int:
    """Run the parts; 1 if a check failed or a part gave nothing."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--dry", action="store_true", help="the CPU in place of a card")
    options.add_argument("--into", type=Path, default=ROOT / "benchmarks" / "results")
    options.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    given, more = options.parse_args(arguments[:cut]), arguments[cut + 1 :]
    names = [] if given.dry else cards()
    if not names and not given.dry:
        print(NONE)
        return 0
    device, ranks = ("cpu", 2) if given.dry else ("cuda", len(names))
    results: dict[str, Any] = {}
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for part in given.only:
            print(f"gpu: {part} on {', '.join(names) or 'the CPU'}", flush=True)
            began = time.monotonic()
            results[part], wrong = PARTS[part](device, ranks, Path(folder), more)
            failed += wrong
            print(f"gpu: {part}: {len(results[part])} in {time.monotonic() - began:.0f} s, "
                  f"{len(wrong)} failed", flush=True)  # fmt: skip
    print("\n".join(failed))
    if given.dry:
        print("dry run on the CPU: nothing was measured on a GPU, and no result is kept")
    else:
        print(f"kept in {write(given.into, names, results)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
