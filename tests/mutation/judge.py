"""A pytest plugin that judges mutants: pytest collects once, each mutant runs in a fork of that.

mutmut's own loop starts pytest anew for every mutant, which costs more than most mutants take to
die. Here a mutant meets the tests that reach it, those first that killed others of its function,
then those of the module's own file, then one case of each test, then the second ones (each time
those first that killed the most in the least time, or the quickest), until one fails or they cost
`budget` seconds of processor time: then it counts as a survivor. A test that takes ten times as
long as it did unchanged, and `patience` seconds more, ends as a timeout.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import signal
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest

ORDER = "ROTMOLE_MUTANTS"  # names the file that run.py writes
TIMEOUT = 36  # mutmut's code for it
SIGNALS = (-signal.SIGPROF, -signal.SIGALRM)


@dataclass(frozen=True)
class Limits:
    """How long a mutant may take, and how long each test took without one."""

    budget: float
    patience: float
    seconds: dict[str, float]


def in_order(items: list[pytest.Item], seconds: dict[str, float]) -> list[pytest.Item]:
    """The quickest first; tests that share a fixture of their module last, and together."""

    def shares(item: pytest.Item) -> bool:
        found = item._fixtureinfo.name2fixturedefs.values()  # type: ignore[attr-defined]
        return any(definition[-1].scope == "module" for definition in found)

    alone = [item for item in items if not shares(item)]
    alone.sort(key=lambda item: seconds.get(item.nodeid, 0.0))
    return [*alone, *(item for item in items if shares(item))]


class Killers:
    """Which tests killed how many mutants so far."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self.kills: Counter[str] = Counter()
        self.kills_of: dict[str, Counter[str]] = defaultdict(Counter)

    def add(self, mutant: str, test: str) -> None:
        self.kills[test] += 1
        self.kills_of[function_of(mutant)][test] += 1

    def first(self, mutant: str, items: list[pytest.Item]) -> list[pytest.Item]:
        """Put those of the module's own file first, then of each test one case before a second.

        Among equals those that kill fastest; a kill of the same function counts as twenty others.
        """
        own, module = self.kills_of[function_of(mutant)], mutant.split(".")[-2]

        def rate(item: pytest.Item) -> float:
            kills = self.kills[item.nodeid] + 20 * own[item.nodeid]
            return kills / (self.seconds.get(item.nodeid, 1.0) + 0.02)

        fastest = sorted(items, key=rate, reverse=True)
        before: Counter[str] = Counter()
        turn = {}
        for item in fastest:
            name = item.nodeid.partition("[")[0]
            turn[item.nodeid] = before[name]
            before[name] += 1

        def far(item: pytest.Item) -> int:
            named = module.startswith(item.path.stem.removeprefix("test_"))
            return 0 if own[item.nodeid] else 1 if named else 2 + turn[item.nodeid]

        return sorted(fastest, key=far)


def function_of(mutant: str) -> str:
    return mutant.partition("__mutmut_")[0]


def limit(seconds: float) -> None:
    """End this process when it has computed for so long, or has waited a hundred times as long."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 100 * seconds)


def verdict(session: pytest.Session, items: list[pytest.Item], limits: Limits) -> str:
    """Run the tests; return the first that fails, or nothing if none does within the budget."""
    end = time.process_time() + limits.budget
    for item, after in zip(items, [*items[1:], None], strict=True):
        limit(limits.patience + 10 * limits.seconds.get(item.nodeid, 0.0))
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
        if session.testsfailed:
            return item.nodeid
        if time.process_time() > end:
            break
    return ""


def forked(
    mutant: str, session: pytest.Session, items: list[pytest.Item], limits: Limits
) -> tuple[int, int]:
    """Start one mutant's process; return its number and where it will name the test that failed."""
    said, say = os.pipe()
    pid = os.fork()
    if pid:
        os.close(say)
        return pid, said
    code = 1
    try:
        os.environ["MUTANT_UNDER_TEST"] = mutant
        quiet = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(quiet, stream)
        failed = verdict(session, items, limits)
        os.write(say, failed.encode())
        code = int(bool(failed))
    finally:
        os._exit(code)


def waited() -> tuple[int, int]:
    pid, status = os.wait()
    code = os.waitstatus_to_exitcode(status)
    return pid, TIMEOUT if code in SIGNALS else code


class Records:
    """The verdicts, in mutmut's own files beside the mutated sources."""

    def __init__(self) -> None:
        self.known = {p: json.loads(p.read_text()) for p in Path("src").rglob("*.py.meta")}
        self.paths = {m: p for p, known in self.known.items() for m in known["exit_code_by_key"]}

    def save(self, mutant: str, code: int) -> None:
        path = self.paths[mutant]
        self.known[path]["exit_code_by_key"][mutant] = code
        new = path.with_suffix(".new")
        new.write_text(json.dumps(self.known[path]))
        new.replace(path)


def sanity(session: pytest.Session, items: list[pytest.Item]) -> None:
    """The tests must pass without a mutant, and fail where every mutated function raises."""
    for mutant, expected in (("", 0), ("fail", 1)):
        _, said = forked(mutant, session, items, Limits(1e5, 1e5, {}))
        _, code = waited()
        os.close(said)
        if code != expected:
            raise pytest.UsageError(f"with the mutant {mutant!r} the tests ended with {code}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool:
    order = json.loads(Path(os.environ[ORDER]).read_text(encoding="utf-8"))
    stats = json.loads(Path("mutmut-stats.json").read_text(encoding="utf-8"))
    limits = Limits(order["budget"], order["patience"], stats["duration_by_test"])
    reach = stats["tests_by_mangled_function_name"]
    items = {item.nodeid: item for item in in_order(session.items, limits.seconds)}
    tests = {m: set(reach.get(function_of(m), ())) for m in order["mutants"]}
    records, killers, running = Records(), Killers(limits.seconds), {}
    importlib.import_module("libcst.matchers")  # else every failing fork does, in a second
    gc.freeze()
    needed = set().union(*tests.values())
    sanity(session, [item for name, item in items.items() if name in needed])
    end = time.monotonic() + (order["seconds"] or 1e9)
    # in a random order: what is judged when the clock ends it is a sample of all
    left = random.Random(0).sample(order["mutants"], len(order["mutants"]))
    while running or (left and time.monotonic() < end):
        if left and len(running) < order["children"] and time.monotonic() < end:
            mutant = left.pop()
            mine = [item for name, item in items.items() if name in tests[mutant]]
            if mine:
                pid, said = forked(mutant, session, killers.first(mutant, mine), limits)
                running[pid] = mutant, said
            else:
                records.save(mutant, 33)  # mutmut's code for no tests
            continue
        pid, code = waited()
        mutant, said = running.pop(pid)
        with os.fdopen(said) as stream:
            if test := stream.read():
                killers.add(mutant, test)
        records.save(mutant, code)
    return True
