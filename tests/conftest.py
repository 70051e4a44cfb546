"""What every test runs under: one torch thread, sockets closed but loopback, no unlisted skip."""

from __future__ import annotations

import gc
import logging
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow],  # machines are shared; slow is not wrong
)
# fewer examples where every mutant pays for them, and nobody asks for the smallest that fails
settings.register_profile(
    "mutation",
    settings.get_profile("ci"),
    max_examples=10,
    phases=(Phase.explicit, Phase.generate),
)
settings.load_profile("ci")
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # a shell that starts the tests in the background ignores it, and their processes would too
    signal.signal(signal.SIGINT, signal.default_int_handler)

ALLOWED_SKIPS = Path(__file__).with_name("allowed_skips.txt")
skipped: set[str] = set()


@pytest.hookimpl(tryfirst=True)  # before pytest-socket reads its options
def pytest_configure(config: pytest.Config) -> None:
    config.option.allow_hosts = "127.0.0.1,localhost"
    config.option.allow_unix_socket = True


def pytest_collection_finish() -> None:
    # pytest hands its handlers, three times a test, to each logger that passes nothing on
    for name, logger in logging.root.manager.loggerDict.items():
        if name.split(".")[0] == "torch" and isinstance(logger, logging.Logger):
            logger.propagate = True
    gc.freeze()  # every trainer collects garbage: not in all the modules that are imported by now


def unlisted_skips() -> list[str]:
    """Return the tests that were skipped without a line `node id # reason` in the list."""
    lines = ALLOWED_SKIPS.read_text(encoding="utf-8").splitlines()
    pairs = [line.partition(" # ") for line in lines if not line.startswith("#")]
    allowed = {node.strip() for node, _, reason in pairs if reason.strip()}
    return sorted(skipped - allowed)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped:
        skipped.add(report.nodeid)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        skipped.add(report.nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if unlisted_skips() and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for node in unlisted_skips():
        terminalreporter.write_line(f"SKIPPED WITHOUT A REASON IN {ALLOWED_SKIPS.name}: {node}")
