"""The guards of conftest.py hold: no network but loopback, no skip without a reason."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from pytest_socket import SocketConnectBlockedError

HERE = Path(__file__).parent


def test_sockets_are_closed_but_loopback_and_unix() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for address in ("192.0.2.1", "2001:db8::1", "example.com"):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            with socket.socket(family) as client, pytest.raises(SocketConnectBlockedError):
                client.connect((address, 80))
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
        client.connect(server.getsockname())
    with socket.socket(socket.AF_UNIX) as client, pytest.raises(FileNotFoundError):
        client.connect("/nowhere/at/all.sock")


def test_one_torch_thread() -> None:
    assert torch.get_num_threads() == 1


def test_a_skip_without_a_reason_fails_the_run(tmp_path: Path) -> None:
    shutil.copy(HERE / "conftest.py", tmp_path)
    (tmp_path / "allowed_skips.txt").write_text(
        "test_it.py::test_listed # the reason\ntest_it.py::test_no_reason\n", encoding="utf-8"
    )
    skips = [f"@pytest.mark.skip\ndef test_{n}(): pass\n" for n in ("listed", "no_reason", "new")]
    source = "import pytest\ndef test_fine(): pass\n" + "".join(skips)
    (tmp_path / "test_it.py").write_text(source, encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    told = [line for line in run.stdout.splitlines() if line.startswith("SKIPPED WITHOUT")]
    assert run.returncode == 1, run.stdout + run.stderr
    assert [line.rsplit("::")[-1] for line in told] == ["test_new", "test_no_reason"]
