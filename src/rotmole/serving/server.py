"""From targets to a server that runs: engines, the socket, and who may reach it."""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rotmole.errors import InputError, ModelError
from rotmole.models.room import token_bytes
from rotmole.serving.engine import Batched, Engine, OneByOne, can_batch
from rotmole.serving.limits import Limits
from rotmole.serving.memory import BLOCK, cache_tokens
from rotmole.serving.models import Served

logger = logging.getLogger(__name__)

GRACE = 5
"""Seconds that answers have to end when the server is asked to stop."""

_SHORTEST_KEY = 16


def read_key(file: Path) -> str:
    """Return the key in a file, without blanks around it.

    Raises:
        InputError: the file cannot be read, or is no key of at least 16 printable characters.
    """
    try:
        key = file.expanduser().read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not ASCII text"
        raise InputError(f"--api-key-file {file} cannot be read: {reason}.") from error
    if len(key) < _SHORTEST_KEY or not key.isprintable() or " " in key:
        raise InputError(
            f"--api-key-file {file} must hold one key of at least {_SHORTEST_KEY} printable "
            "characters and nothing else; `openssl rand -hex 32` makes one."
        )
    return key


def is_loopback(host: str) -> bool:
    """Tell whether an address is reached from this computer alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def open_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address; port 0 takes a free one.

    Raises:
        InputError: the address is taken, not this computer's, or not allowed.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise InputError(
            f"cannot listen at {host} port {port}: {error.strerror or error}; choose another "
            "--port or --host."
        ) from error


def make_engines(
    models: Sequence[Served],
    limits: Limits,
    *,
    batching: bool = True,
    tokens: int | None = None,
    say: Callable[[str], None] = logger.info,
) -> list[Engine]:
    """Return what generates the answers of each model.

    Args:
        batching: False generates one answer after the other.
        tokens: what the key-value cache of each model holds; None is sized by the free memory.
        say: called with a line for each model that does without batching, and one for the cache.

    Raises:
        InputError: the cache is too small for one answer.
    """
    if tokens is not None and tokens < 2 * BLOCK:
        raise InputError(f"--cache-tokens is {tokens}; it must be at least {2 * BLOCK}.")
    engines: list[Engine] = []
    try:
        for served in models:
            engines.append(_engine(served, limits, len(models), batching, tokens, say))
    except BaseException:
        for engine in engines:
            engine.stop()
        raise
    return engines


def _engine(
    served: Served,
    limits: Limits,
    models: int,
    batching: bool,
    tokens: int | None,
    say: Callable[[str], None],
) -> Engine:
    reason = can_batch(served) if batching else "--no-batching"
    if reason is None:
        held = tokens or cache_tokens(
            served.model, window=served.window, parallel=limits.parallel, models=models
        )
        held = BLOCK * (held // BLOCK)
        try:
            engine = Batched(served, held)
        except ModelError as error:
            reason = str(error)
        else:
            size = held * token_bytes(served.model) / 1e9
            say(f"{served.name}: a cache of {held} tokens ({size:.1f} GB)")
            return engine
    if batching:
        say(f"{served.name}: one answer after the other ({reason})")
    return OneByOne(served)


def run_server(app: Any, listening: socket.socket) -> None:
    """Serve until Ctrl-C or SIGTERM; answers at work have `GRACE` seconds to end.

    Args:
        app: from `rotmole.serving.app.build_app`.
        listening: from `open_socket`.
    """
    import uvicorn

    settings = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False,
        timeout_graceful_shutdown=GRACE,
    )  # fmt: skip
    uvicorn.Server(settings).run(sockets=[listening])
