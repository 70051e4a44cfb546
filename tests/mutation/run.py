"""Mutation testing: change the source a little, many times, and see whether the tests notice.

    python tests/mutation/run.py [ops] [sample] [--children N] [--seconds N] [--again]

mutmut makes the mutants and forks one process for each from a parent that has imported everything.
`ops` takes every mutant of src/rotmole/ops, `sample` a seeded 200 of tuner/ and of
training/checkpoint.py. Work lies in .cache/mutation/ and is taken up where it stopped; --seconds
stops it, and --again tries the survivors anew after tests were added. Exit code 1 if less than 85 %
of the mutants of ops are killed, timeouts left out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".cache" / "mutation"
NEEDED = 0.85
SEED, SAMPLE = 5, 200
COPIED = ("src", "tests", "docs", "README.md", "CHANGELOG.md", "pyproject.toml", "Makefile")
# mutmut's exit codes of a mutant's tests
OUTCOMES = {0: "survived", 1: "killed", 3: "killed", 5: "no tests", 33: "no tests", 34: "skipped"}
TIMEOUTS = (24, 36, 152, 255, -24)


@dataclass(frozen=True)
class Scope:
    """What is mutated, and the tests that must notice."""

    files: tuple[str, ...]
    tests: tuple[str, ...]
    sample: int | None = None


SCOPES = {
    "ops": Scope(files=("src/rotmole/ops/*",), tests=("tests/ops",)),
    "sample": Scope(
        files=("src/rotmole/tuner/*", "src/rotmole/training/checkpoint.py"),
        # not tests/tuner/test_compile.py: a mutant is chosen by a look at the environment, which
        # breaks a compiled graph
        tests=(
            "tests/tuner", "tests/golden", "tests/training",
            "--ignore=tests/tuner/test_compile.py", "--ignore=tests/tuner/test_trainers.py",
        ),
        sample=SAMPLE,
    ),
}  # fmt: skip


def prepare(name: str) -> Path:
    """Copy the tree as it is; what earlier runs found of unchanged functions stays."""
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    for part in COPIED:
        target = folder / part
        if target.is_dir():
            shutil.rmtree(target)
        ignore = shutil.ignore_patterns("__pycache__")
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, target, ignore=ignore)
        else:
            shutil.copy(ROOT / part, target)
    scope = SCOPES[name]
    settings = {
        "source_paths": ["src/"],
        "only_mutate": list(scope.files),
        "pytest_add_cli_args": ["--hypothesis-profile=mutation"],
        "pytest_add_cli_args_test_selection": list(scope.tests),
        "also_copy": [part for part in COPIED if part not in ("src", "tests", "pyproject.toml")],
        "use_git_change_detection": False,
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    with (folder / "pyproject.toml").open("a", encoding="utf-8") as stream:
        stream.write("\n[tool.mutmut]\n" + "\n".join(lines) + "\n")
    return folder


def mutmut(folder: Path, arguments: list[str], seconds: float | None = None) -> None:
    """Run a command of mutmut; the clock may stop it, and what was found stays."""
    environment = os.environ | {
        "PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    with (folder / "mutmut.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mutmut", *arguments],
            cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return
    if code:
        tail = (folder / "mutmut.log").read_text(encoding="utf-8", errors="replace")[-3000:]
        sys.exit(f"mutmut ended with {code}:\n{tail}")


def outcomes(folder: Path) -> dict[str, str]:
    """Return {mutant: killed, survived, no tests, timeout or not run}."""
    found = {}
    for meta in sorted((folder / "mutants").rglob("*.meta")):
        codes = json.loads(meta.read_text(encoding="utf-8"))["exit_code_by_key"]
        for mutant, code in codes.items():
            known = "timeout" if code in TIMEOUTS else OUTCOMES.get(code, f"exit {code}")
            found[mutant] = "not run" if code is None else known
    return found


def drawn(folder: Path, count: int) -> list[str]:
    """Draw the sample: the same mutants for the same source."""
    mutants = sorted(outcomes(folder))
    return sorted(random.Random(SEED).sample(mutants, min(count, len(mutants))))


def run(name: str, children: int, seconds: float | None, again: bool) -> float | None:
    """Run one scope and write its report; None while mutants are left, else the share killed."""
    scope, folder = SCOPES[name], prepare(name)
    chosen: list[str] = []
    if scope.sample is not None:
        mutmut(folder, ["print-time-estimates"])  # makes the mutants, runs none
        chosen = drawn(folder, scope.sample)
    known = outcomes(folder)
    retry = [m for m in chosen or known if known.get(m) in ("survived", "no tests")]
    names = retry if again else [m for m in chosen if known[m] == "not run"]
    if not chosen or names:
        mutmut(folder, ["run", "--max-children", str(children), *names], seconds)
    results = outcomes(folder)
    results = {m: results[m] for m in chosen or results}
    counts = Counter(results.values())
    judged = {m: r for m, r in results.items() if r not in ("timeout", "not run", "skipped")}
    killed = sum(r == "killed" for r in judged.values())
    share = killed / max(len(judged), 1)
    lines = [f"{name}: {killed} of {len(judged)} killed, {100 * share:.1f} %; {dict(counts)}"]
    by_file: dict[str, list[str]] = {}
    for mutant, result in judged.items():
        by_file.setdefault(mutant.rpartition(".")[0], []).append(result)
    for file, all_of in sorted(by_file.items()):
        good = sum(r == "killed" for r in all_of)
        lines.append(f"  {file}: {good} of {len(all_of)}")
    left = sorted(m for m, r in judged.items() if r != "killed")
    (FOLDER / f"{name}.txt").write_text("\n".join([*lines, *left]) + "\n", encoding="utf-8")
    print("\n".join(lines))
    print(f"  survivors: {FOLDER / name}.txt; look at one: cd {folder} && mutmut show NAME")
    return None if counts["not run"] else share


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scopes", nargs="*", default=list(SCOPES), help=", ".join(SCOPES))
    parser.add_argument("--children", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=None)
    parser.add_argument("--again", action="store_true")
    asked = parser.parse_args()
    shares = {name: run(name, asked.children, asked.seconds, asked.again) for name in asked.scopes}
    ops = shares.get("ops")
    return int(ops is not None and ops < NEEDED)


if __name__ == "__main__":
    sys.exit(main())
