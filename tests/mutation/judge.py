"""A pytest plugin that judges mutants: pytest collects once, each mutant runs in a fork of that.

mutmut's own loop starts pytest anew for every mutant, which takes longer than the tests that kill
most mutants. Here a mutant meets the tests that reach it in this order: tests that killed others of
its function, tests in the file named after its module, one case of each other test of its room, one
case of each other test, then second cases, and so on. Among equals the tests that killed most in
the least time come first, then the quickest. When one fails, the mutant is killed; when they have
taken `budget` seconds of processor time, it counts as a survivor. A test that takes ten times as
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
        fixtures = item._fixtureinfo.name2fixturedefs.values()  # type: ignore[attr-defined] # pytest keeps it private
        return any(definitions[-1].scope == "module" for definitions in fixtures)

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
        """Return the tests in the order in which a mutant meets them.

        A kill of the same function counts as twenty others.
        """
        same_function = self.kills_of[function_of(mutant)]
        room, module = mutant.split(".")[-3:-1]

        def rate(item: pytest.Item) -> float:
            kills = self.kills[item.nodeid] + 20 * same_function[item.nodeid]
            return kills / (self.seconds.get(item.nodeid, 1.0) + 0.02)

        fastest = sorted(items, key=rate, reverse=True)
        before: Counter[str] = Counter()
        turn = {}
        for item in fastest:
            name = item.nodeid.partition("[")[0]
            turn[item.nodeid] = before[name]
            before[name] += 1

        def distance(item: pytest.Item) -> int:
            if same_function[item.nodeid]:
                return 0
            same_room = item.path.parent.name == room
            if same_room and module.startswith(item.path.stem.removeprefix("test_")):
                return 1
            return 3 - same_room + turn[item.nodeid]

        return sorted(fastest, key=distance)


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
    """Start one mutant's process; return its number and the pipe for the name of a failed test."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    code = 1
    try:
        os.environ["MUTANT_UNDER_TEST"] = mutant
        quiet = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(quiet, stream)
        failed = verdict(session, items, limits)
        os.write(writer, failed.encode())
        code = int(bool(failed))
    finally:
        os._exit(code)


def waited() -> tuple[int, int]:
    pid, status = os.wait()
    code = os.waitstatus_to_exitcode(status)
    return pid, TIMEOUT if code in SIGNALS else code


class Records:
    """The verdicts, in the files that mutmut keeps next to the mutated sources."""

    def __init__(self) -> None:
        self.metas = {p: json.loads(p.read_text()) for p in Path("src").rglob("*.py.meta")}
        self.paths = {m: p for p, meta in self.metas.items() for m in meta["exit_code_by_key"]}

    def save(self, mutant: str, code: int) -> None:
        path = self.paths[mutant]
        self.metas[path]["exit_code_by_key"][mutant] = code
        new = path.with_suffix(".new")
        new.write_text(json.dumps(self.metas[path]))
        new.replace(path)


def sanity(session: pytest.Session, items: list[pytest.Item]) -> None:
    """Check that the tests pass without a mutant, and fail if every mutated function raises."""
    for mutant, expected in (("", 0), ("fail", 1)):
        _, reader = forked(mutant, session, items, Limits(1e5, 1e5, {}))
        _, code = waited()
        os.close(reader)
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
    # in a random order, so that the mutants judged when time is up are a sample of all
    waiting = random.Random(0).sample(order["mutants"], len(order["mutants"]))
    while running or (waiting and time.monotonic() < end):
        if waiting and len(running) < order["children"] and time.monotonic() < end:
            mutant = waiting.pop()
            reaching = [item for name, item in items.items() if name in tests[mutant]]
            if reaching:
                pid, reader = forked(mutant, session, killers.first(mutant, reaching), limits)
                running[pid] = mutant, reader
            else:
                records.save(mutant, 33)  # mutmut's code for no tests
            continue
        pid, code = waited()
        mutant, reader = running.pop(pid)
        with os.fdopen(reader) as stream:
            if test := stream.read():
                killers.add(mutant, test)
        records.save(mutant, code)
    return True
