"""Mutation testing: change the source a little, many times, and see whether the tests notice.

    python tests/mutation/run.py [ops] [sample] [--children N] [--seconds N] [--again] [--only NAME]

mutmut makes the mutants and finds which tests reach them; judge.py runs those tests. `ops` takes
every mutant of src/rotmole/ops, `sample` a seeded 200 of tuner/ and of
training/checkpoints/seal.py. Results lie in .cache/mutation/, and a later call continues from them.
--seconds stops a call, and --again judges the survivors again after tests were added. --only takes
the mutants of one module or room, as in `--only modes`, `--only routing` or
`--only reference/block` (more than once for more). Exit code 1 if less than 85 % of the mutants of
ops are killed, not counting timeouts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".cache" / "mutation"
NEEDED = 0.85
SEED, SAMPLE = 5, 200
# nobody reads how a mutant's test failed, and pytest's own tracebacks cost most of a mutant's time
OPTIONS = ["--hypothesis-profile=mutation", "--tb=native", "--assert=plain"]
COPIED = ("src", "tests", "docs", "README.md", "CHANGELOG.md", "pyproject.toml", "Makefile")
# mutmut's exit codes of a mutant's tests
OUTCOMES = {0: "survived", 1: "killed", 3: "killed", 5: "no tests", 33: "no tests", 34: "skipped"}
OUTCOMES |= {-6: "killed", -11: "killed"}  # the process died of it, and the tests with it
TIMEOUTS = (24, 36, 152, 255, -24)


@dataclass(frozen=True)
class Scope:
    """What is mutated, and the tests that must notice."""

    files: tuple[str, ...]
    tests: tuple[str, ...]
    sample: int | None = None
    budget: float = 4.0  # seconds of tests after which a mutant has survived
    patience: float = 5.0  # seconds that a test may take above ten times what it took unchanged


# A mutant is chosen by an environment variable, which torch.compile does not follow, and called
# through a wrapper, which is one more level of the stack for warnings.
NOT_WRAPPED = ("-k", "not compile and not points_at")
SCOPES = {
    "ops": Scope(
        files=("src/rotmole/ops/**",),
        # whole feed-forward blocks and the starts of experts are tested in models;
        # test_twins.py lists the functions of the source, and would list the mutants
        tests=(
            "tests/ops", "tests/tuner/experts/test_blocks.py",
            "tests/tuner/experts/test_experts.py", "--ignore=tests/ops/reference/test_twins.py",
            *NOT_WRAPPED,
        ),
    ),
    "sample": Scope(
        files=("src/rotmole/tuner/**", "src/rotmole/training/checkpoints/seal.py"),
        tests=(
            "tests/tuner", "tests/golden", "tests/training",
            "--ignore=tests/tuner/test_compile.py", "--ignore=tests/tuner/test_trainers.py",
            *NOT_WRAPPED,
        ),
        sample=SAMPLE,
        budget=20.0,
        patience=60.0,  # the first test of a module may train a model
    ),
}  # fmt: skip


def prepare(name: str) -> Path:
    """Copy the tree as it is; earlier results for unchanged functions stay."""
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
        "pytest_add_cli_args": OPTIONS,
        "pytest_add_cli_args_test_selection": list(scope.tests),
        "also_copy": [part for part in COPIED if part not in ("src", "tests", "pyproject.toml")],
        "use_git_change_detection": False,
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    with (folder / "pyproject.toml").open("a", encoding="utf-8") as stream:
        stream.write("\n[tool.mutmut]\n" + "\n".join(lines) + "\n")
    return folder


NO_MUTANT = "make-the-mutants-and-run-none"


def started(folder: Path, arguments: list[str], log: str, **variables: str) -> int:
    """Run a Python module over the mutants, its output into the log; return its exit code."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    } | variables  # fmt: skip
    with (FOLDER / log).open("w", encoding="utf-8") as stream:
        return subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=folder, env=environment, stdout=stream, stderr=stream, check=False,
        ).returncode  # fmt: skip


def ended_badly(what: str, code: int, log: str) -> NoReturn:
    tail = (FOLDER / log).read_text(encoding="utf-8", errors="replace")[-3000:]
    sys.exit(f"{what} ended with {code}:\n{tail}")


def make(name: str, folder: Path) -> None:
    """Let mutmut make the mutants and see which tests reach which function."""
    log = f"{name}-made.log"
    # mutmut does both before it looks for the mutant, which does not exist
    code = started(folder, ["mutmut", "run", NO_MUTANT], log, PYTHONPATH=str(folder / "src"))
    if not outcomes(folder) or not (folder / "mutants" / "mutmut-stats.json").exists():
        ended_badly("mutmut", code, log)


def judge(
    name: str, folder: Path, mutants: list[str], children: int, seconds: float | None
) -> None:
    """Judge the named mutants, for so many seconds at most; verdicts are kept."""
    order, log = FOLDER / f"{name}.json", f"{name}-judged.log"
    scope = SCOPES[name]
    settings = {"mutants": mutants, "children": children, "seconds": seconds}
    settings |= {"budget": scope.budget, "patience": scope.patience}
    order.write_text(json.dumps(settings), encoding="utf-8")
    paths = (folder / "mutants" / "src", folder / "tests" / "mutation")
    code = started(
        folder / "mutants",
        ["pytest", "-q", "--rootdir=.", "-p", "judge", *OPTIONS, *scope.tests], log,
        PYTHONPATH=os.pathsep.join(map(str, paths)), ROTMOLE_MUTANTS=str(order),
    )  # fmt: skip
    if code:
        ended_badly("pytest", code, log)


def outcomes(folder: Path) -> dict[str, str]:
    """Return {mutant: killed, survived, no tests, timeout or not run}."""
    results = {}
    for meta in sorted((folder / "mutants").rglob("*.meta")):
        codes = json.loads(meta.read_text(encoding="utf-8"))["exit_code_by_key"]
        for mutant, code in codes.items():
            outcome = "timeout" if code in TIMEOUTS else OUTCOMES.get(code, f"exit {code}")
            results[mutant] = "not run" if code is None else outcome
    return results


def is_in(mutant: str, place: str) -> bool:
    """Say whether a mutant is of the module or room, such as "modes" or "reference/block".

    A mutant is named rotmole.ops.rotation.modes.x_tangent__mutmut_1.
    """
    module = mutant.split(".")[:-1]
    wanted = place.split("/")
    return any(module[i : i + len(wanted)] == wanted for i in range(len(module)))


def drawn(folder: Path, count: int) -> list[str]:
    """Draw the sample: the same mutants for the same source."""
    mutants = sorted(outcomes(folder))
    return sorted(random.Random(SEED).sample(mutants, min(count, len(mutants))))


def run(name: str, arguments: argparse.Namespace) -> float | None:
    """Run one scope and write its report; return the share killed, None until all are judged."""
    scope, folder = SCOPES[name], prepare(name)
    make(name, folder)
    results = outcomes(folder)
    chosen = drawn(folder, scope.sample) if scope.sample else sorted(results)
    wanted = ("survived", "no tests") if arguments.again else ("not run",)
    names = [m for m in chosen if results[m] in wanted]
    if arguments.only:
        names = [m for m in names if any(is_in(m, place) for place in arguments.only)]
    if names:
        judge(name, folder, names, arguments.children, arguments.seconds)
    results = outcomes(folder)
    results = {m: results[m] for m in chosen}
    counts = Counter(results.values())
    judged = {m: r for m, r in results.items() if r not in ("timeout", "not run", "skipped")}
    killed = sum(r == "killed" for r in judged.values())
    share = killed / max(len(judged), 1)
    lines = [f"{name}: {killed} of {len(judged)} killed, {100 * share:.1f} %; {dict(counts)}"]
    by_file: dict[str, list[str]] = {}
    for mutant, result in judged.items():
        by_file.setdefault(mutant.rpartition(".")[0], []).append(result)
    for file, verdicts in sorted(by_file.items()):
        lines.append(f"  {file}: {verdicts.count('killed')} of {len(verdicts)}")
    survivors = sorted(m for m, r in judged.items() if r != "killed")
    (FOLDER / f"{name}.txt").write_text("\n".join([*lines, *survivors]) + "\n", encoding="utf-8")
    print("\n".join(lines))
    print(f"  survivors: {FOLDER / name}.txt; look at one: cd {folder} && mutmut show NAME")
    return None if counts["not run"] else share


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scopes", nargs="*", default=list(SCOPES), help=", ".join(SCOPES))
    parser.add_argument("--children", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=None)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--only", action="append", help="the mutants of this module or room")
    arguments = parser.parse_args()
    shares = {name: run(name, arguments) for name in arguments.scopes}
    if None in shares.values() and not arguments.only:
        print("not all mutants were judged; another call continues where this one stopped")
        return 1
    ops = shares.get("ops")
    return int(ops is not None and ops < NEEDED)


if __name__ == "__main__":
    sys.exit(main())
