"""The command in a process of its own, and the clients that people have."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest

from rotmole.cli.serve import serve
from rotmole.errors import InputError
from rotmole.serving.server import is_loopback, read_key

pytestmark = pytest.mark.slow

CHAT = [{"role": "user", "content": "the film"}]
LISTENING = re.compile(r"listening: (http://127\.0\.0\.1:\d+)/v1")


class Server:
    """`rotmole serve` in a process; its log goes to a file."""

    def __init__(self, targets: list[Path], log: Path, *options: str) -> None:
        self.log = log
        command = [sys.executable, "-m", "rotmole_cli", "serve", *map(str, targets), *options]
        with log.open("w", encoding="utf-8") as stream:
            self.process = subprocess.Popen(command, stdout=stream, stderr=stream)
        self.url = self._wait()

    def _wait(self) -> str:
        for _ in range(1200):
            found = LISTENING.search(self.log.read_text(encoding="utf-8"))
            if found:
                with contextlib.suppress(OSError):
                    socket.create_connection(found[1].removeprefix("http://").split(":"), 1).close()
                    return found[1]
            assert self.process.poll() is None, self.log.read_text(encoding="utf-8")
            time.sleep(0.1)
        raise AssertionError(self.log.read_text(encoding="utf-8"))

    @property
    def port(self) -> str:
        return self.url.rpartition(":")[2]

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)


@pytest.fixture(scope="module")
def server(targets, tmp_path_factory) -> Iterator[Server]:
    """A server that took the place of one that was killed."""
    folder = tmp_path_factory.mktemp("server")
    killed = Server(targets[:1], folder / "killed.txt", "--port", "0", "--no-batching")
    assert killed.stop(signal.SIGKILL) == -signal.SIGKILL
    log = folder / "log.txt"
    server = Server(targets, log, "--port", killed.port, "--cache-tokens", "512")
    assert server.port == killed.port
    yield server
    assert server.stop() == 143
    assert "Traceback" not in log.read_text(encoding="utf-8")


def test_openais_client_gets_the_answers_of_generate(server, alone):
    client = server.client()
    assert [model.id for model in client.models.list()] == ["red", "blue", "base"]
    assert client.models.retrieve("blue").owned_by == "rotmole"
    for name, model in alone.items():
        expected = model.text("user: the film\nassistant: ", max_new_tokens=12)
        answer = client.chat.completions.create(model=name, messages=CHAT, max_tokens=12)
        assert answer.choices[0].message.content == expected
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 12
        raw = model.text("the film", max_new_tokens=12, temperature=1.2, top_p=0.8, seed=5)
        options = {"temperature": 1.2, "top_p": 0.8, "seed": 5, "max_tokens": 12}
        text = client.completions.create(model=name, prompt="the film", **options)
        assert text.choices[0].text == raw
        chunks = list(
            client.completions.create(model=name, prompt="the film", stream=True, **options)
        )
        assert "".join(chunk.choices[0].text for chunk in chunks) == raw
        assert chunks[-1].usage.completion_tokens == 12


def test_openais_client_streams_chats_and_sends_answers_back(server, alone):
    client = server.client()
    options = {"model": "red", "max_tokens": 8}
    stream = client.chat.completions.create(
        messages=CHAT, stream=True, stream_options={"include_usage": True}, **options
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    first = client.chat.completions.create(messages=CHAT, **options).choices[0].message
    assert text == first.content
    chat = [*CHAT, first, {"role": "user", "content": "is it good"}]
    second = client.chat.completions.create(messages=chat, **options).choices[0].message.content
    prompt = f"user: the film\nassistant: {text}\nuser: is it good\nassistant: "
    assert second == alone["red"].text(prompt, max_new_tokens=8)


def test_openais_client_raises_its_own_errors(server):
    client = server.client()
    with pytest.raises(openai.NotFoundError, match="no model 'green'"):
        client.completions.create(model="green", prompt="a")
    with pytest.raises(openai.BadRequestError, match="shorten the prompt"):
        client.completions.create(model="red", prompt="a", max_tokens=9999)


def test_transformers_chat(server, alone, tmp_path):
    """Its console script, which refuses to speak to any server if the hub is to be left alone."""
    command = [sys.executable, "-m", "rotmole_cli.exec", "transformers", "chat"]
    done = subprocess.run(
        [*command, "red", server.url, "max_new_tokens=12", "do_sample=False"],
        input="the film\nn\n!exit\n", capture_output=True, text=True, cwd=tmp_path, timeout=120,
        env=os.environ | {"COLUMNS": "200", "HF_HUB_OFFLINE": "0"}, check=False,
    )  # fmt: skip
    expected = alone["red"].text("user: the film\nassistant: ", max_new_tokens=12)
    words = re.findall(r"\w+", expected)  # it shows no control characters
    assert words
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(word in done.stdout for word in words), (words, done.stdout)


@pytest.mark.heavy
def test_schemathesis_finds_no_fault(server, tmp_path):
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,"
    checks += "response_schema_conformance,negative_data_rejection"
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json",
         "--max-examples", "5", "--seed", "1", "--checks", checks, "--no-color",
         "--phases", "examples,coverage,fuzzing", "--request-timeout", "20", "--workers", "4"],
        capture_output=True, text=True, cwd=tmp_path, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr


def test_many_clients_at_once_and_some_that_go_away(server, alone):
    """64 requests, 16 at once, of two adapters; each 20th client leaves after its first token."""
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    expected = {name: alone[name].text("the film", max_new_tokens=24) for name in ("red", "blue")}
    process = psutil.Process(server.process.pid)

    async def one(number: int, turn: asyncio.Semaphore) -> bool:
        name = ("red", "blue")[number % 2]
        options = {"model": name, "prompt": "the film"}
        async with turn:
            if number % 20 == 7:
                stream = await client.completions.create(stream=True, max_tokens=200, **options)
                async for _ in stream:
                    break
                await stream.close()
                return True
            answer = await client.completions.create(max_tokens=24, **options)
            return answer.choices[0].text == expected[name]

    async def all_of_them() -> list[bool]:
        turn = asyncio.Semaphore(16)
        async with client:
            return await asyncio.gather(*(one(number, turn) for number in range(64)))

    before = process.memory_info().rss
    assert asyncio.run(all_of_them()) == [True] * 64
    assert process.memory_info().rss - before < 200e6
    again = server.client().completions.create(model="red", prompt="the film", max_tokens=24)
    assert again.choices[0].text == expected["red"]


def test_a_port_that_is_taken(server, targets):
    with pytest.raises(InputError, match=f"cannot listen at 127.0.0.1 port {server.port}"):
        serve([str(targets[0])], port=int(server.port))


def test_other_computers_need_a_key(targets, tmp_path):
    with pytest.raises(InputError, match=r"--host 0\.0\.0\.0 can be reached"):
        serve([str(targets[0])], host="0.0.0.0")
    assert [is_loopback(host) for host in ("localhost", "127.0.0.9", "::1")] == [True] * 3
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "192.168.0.1", "a.b")] == [False] * 4
    file = tmp_path / "key"
    for text in ("", "short", "two words of some length", "x" * 20 + "\ny"):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match="one key of at least 16"):
            read_key(file)
    file.write_text("0123456789abcdef\n", encoding="utf-8")
    assert read_key(file) == "0123456789abcdef"
    with pytest.raises(InputError, match="cannot be read"):
        read_key(tmp_path / "none")
