"""A pytest plug-in that aims PEFT's own tests at RotMoLE and checks what was left out.

It changes four things and no more: the parameters of the tests (`aims.AIMS`), where the models
come from (`tiny_models`, folders in place of hub ids), the skip of merging, which upstream
keeps as a list of its own methods, and the skip of what we refuse (`listed.REFUSED`). What carries
no parameter of ours is deselected. Every skip and
every deselection must stand in `listed.py`; one that does not, or a listed one that did not happen,
fails the run.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections import Counter
from fnmatch import fnmatchcase
from functools import wraps
from typing import Any

import peft
import pytest
from aims import AIMS, ALREADY_AIMED
from listed import REFUSED, problems
from sabotage import SABOTAGES

from rotmole import RotMoleConfig

MINIMUM_PASSED = 650
MERGE_REASON = "RotMoLE does not support merging: its update depends on the token."


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the two switches that run.py passes on, to the workers too."""
    parser.addoption("--sabotage", choices=sorted(SABOTAGES), help="break our layer on purpose")
    parser.addoption("--reduced", action="store_true", help="do not compare with the lists")


def pytest_configure(config: pytest.Config) -> None:
    """Register the counter and break the layer if asked to."""
    if config.option.sabotage:
        config.add_cleanup(SABOTAGES[config.option.sabotage]())
    config.pluginmanager.register(Conformance(complete=not config.option.reduced))


def _test_name(item: Any) -> str:
    """`Class.function`, or `function` for a test outside any class."""
    function = item.originalname if hasattr(item, "originalname") else item.name
    return f"{item.cls.__name__}.{function}" if item.cls else function


def _where(item: Any) -> str:
    return f"{item.module.__name__.rpartition('.')[2]}::{_test_name(item)}"


class Conformance:
    """Aims the collection, counts outcomes and compares them with the committed lists."""

    def __init__(self, *, complete: bool) -> None:
        self.complete = complete  # a reduced selection cannot be compared with the lists
        self.aimed: set[str] = set(ALREADY_AIMED)
        self.deselected: Counter[str] = Counter()
        self.skipped: Counter[tuple[str, str]] = Counter()
        self.passed: Counter[str] = Counter()
        self.failed = 0
        self.baseless: list[str] = []
        self.problems: list[str] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Put our values in place of upstream's, mark by mark, before pytest reads them."""
        definition = metafunc.definition
        module = metafunc.module.__name__.rpartition(".")[2]
        test = _test_name(definition)
        for index, mark in enumerate(definition.own_markers):
            if mark.name != "parametrize":
                continue
            names = mark.args[0] if isinstance(mark.args[0], str) else ",".join(mark.args[0])
            for aim in AIMS:
                if aim.hits(module, test, names):
                    kwargs = {key: value for key, value in mark.kwargs.items() if key != "ids"}
                    new = pytest.mark.parametrize(mark.args[0], aim.values, **kwargs)
                    definition.own_markers[index] = new.mark
                    self.aimed.add(f"{module}::{test}")

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[Any]) -> None:
        """Keep the aimed tests; skip merging where upstream would, by its own function."""
        kept = [item for item in items if _where(item) in self.aimed]
        dropped = [item for item in items if _where(item) not in self.aimed]
        self.deselected.update(_where(item) for item in dropped)
        self.baseless = sorted({_where(item) for item in dropped if not _belongs_elsewhere(item)})
        for name in {item.module.__package__ for item in items}:
            for module in ("testing_common", "test_custom_models"):
                skip_merging(sys.modules.get(f"{name}.{module}"))
        for item in kept:
            for pattern, reason in REFUSED.items():
                if fnmatchcase(_test_name(item), pattern):
                    item.add_marker(pytest.mark.skip(reason=reason))
        if dropped:
            config.hook.pytest_deselected(items=dropped)
        items[:] = kept

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count every outcome by upstream test."""
        module, *scopes = report.nodeid.partition("[")[0].split("::")
        where = f"{module.rpartition('/')[2].removesuffix('.py')}::{'.'.join(scopes)}"
        if report.failed:
            self.failed += 1
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            self.skipped[where, reason.removeprefix("Skipped: ")] += 1
        elif report.when == "call":
            self.passed[where] += 1

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """In a worker, hand the deselections over; in the controller, compare with the lists."""
        output = getattr(session.config, "workeroutput", None)
        if output is not None:
            output["deselected"] = dict(self.deselected)
            output["baseless"] = self.baseless
            return
        if self.complete and not session.config.option.collectonly:
            self.problems = problems(self.deselected, self.skipped)
            self.problems += [f"deselected without ground: {where}" for where in self.baseless]
            if (passed := sum(self.passed.values())) < MINIMUM_PASSED:
                self.problems.append(f"{passed} items passed, fewer than {MINIMUM_PASSED}")
            if self.problems and session.exitstatus == pytest.ExitCode.OK:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take over a worker's deselections (every worker collects the same)."""
        output = getattr(node, "workeroutput", {})
        self.deselected = Counter(output.get("deselected", {}))
        self.baseless = output.get("baseless", [])

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print the figures and what the lists do not cover."""
        if not self.complete:
            return
        line = terminalreporter.write_line
        terminalreporter.section("PEFT's own tests, aimed at RotMoLE")
        line(f"passed items: {sum(self.passed.values())}")
        line(f"distinct upstream test functions that passed: {len(self.passed)}")
        line(f"failed items: {self.failed}")
        line(f"skipped items: {sum(self.skipped.values())}")
        line(f"deselected items: {sum(self.deselected.values())}")
        for problem in self.problems:
            line(f"NOT AS LISTED: {problem}")
        if not self.problems:
            line("every skip and deselection stands in listed.py, with its reason")


def _belongs_elsewhere(item: Any) -> bool:
    """Say whether a test names another method's config or a model of the hub.

    Looks into its body, its fixtures, the helpers of its class and its parameters.
    """
    fixtures = (name for name in item.fixturenames if name in item._fixtureinfo.name2fixturedefs)
    functions = [item._fixtureinfo.name2fixturedefs[name][-1].func for name in fixtures]
    methods = vars(item.cls).items() if item.cls else ()
    helpers = [
        method
        for name, method in methods
        if inspect.isfunction(method) and not name.startswith("test_")
    ]
    sources = [inspect.getsource(thing) for thing in (item.function, *functions, *helpers)]
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    text = "".join([*sources, repr(parameters)])
    configs = {name for name in vars(peft) if name.endswith("Config")} - {"PeftConfig"}
    named = configs.intersection(re.findall(r"\w+Config\b", text))
    return bool(named or re.search(r"""from_pretrained\(|['"][\w-]+/[\w.-]+['"]""", text))


def skip_merging(module: Any) -> None:
    """Let upstream's own merge skip know RotMoLE: it names the methods that cannot merge."""
    original = getattr(module, "_skip_if_merging_not_supported", None)
    if original is None or hasattr(original, "knows_rotmole"):
        return

    @wraps(original)
    def skip(model_id: str, config_cls: type, config_kwargs: dict[str, Any]) -> None:
        if config_cls is RotMoleConfig:
            pytest.skip(MERGE_REASON)
        original(model_id, config_cls, config_kwargs)

    skip.knows_rotmole = True  # type: ignore[attr-defined]  # marks a function already wrapped
    module._skip_if_merging_not_supported = skip
