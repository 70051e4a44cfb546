"""``rotmole serve``: OpenAI's interface to a base model and its adapters."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from rotmole.cli.screen import note
from rotmole.errors import ConfigError, InputError
from rotmole.serving.models import load_models, named_targets

_PACKAGES = ("fastapi", "openai", "uvicorn")


def serve(
    targets: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: Path | None = None,
    parallel: int = 16,
    waiting: int = 64,
    cache_tokens: int | None = None,
    batching: bool = True,
    trust_remote_code: bool = False,
) -> int:
    """Serve models until Ctrl-C or SIGTERM.

    Args:
        targets: run folders, run files or adapter folders of one base model, or NAME=PATH.
        host: address to listen at; any but this computer's own needs a key.
        port: 0 takes a free one.
        api_key_file: file with the key that clients must send.
        parallel: answers that are generated at the same time.
        waiting: requests that wait; others are refused.
        cache_tokens: what the key-value cache of each model holds; None is by the free memory.
        batching: generate answers together.

    Raises:
        InputError: the address cannot be used, or needs a key; or a target is none.
        ConfigError: a package is missing.
    """
    missing = [package for package in _PACKAGES if find_spec(package) is None]
    if missing:
        raise ConfigError(f"serve needs {', '.join(missing)}: pip install 'rotmole[serve]'.")
    from rotmole.serving.server import is_loopback, open_socket, read_key

    key = None if api_key_file is None else read_key(api_key_file)
    if key is None and not is_loopback(host):
        raise InputError(
            f"--host {host} can be reached from other computers, so it needs a key; add "
            "--api-key-file FILE, or leave --host out."
        )
    places = named_targets(targets)
    listening = open_socket(host, port)  # before the model is loaded, which takes long
    with listening:
        from rotmole.serving.app import build_app
        from rotmole.serving.limits import Limits
        from rotmole.serving.server import make_engines, run_server

        # they report every request, and every request that ends
        logging.getLogger("transformers.cli.serving").setLevel(logging.ERROR)
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
        models = load_models(places, say=note, trust_remote_code=trust_remote_code)
        limits = Limits(parallel=parallel, waiting=waiting)
        engines = make_engines(models, limits, batching=batching, tokens=cache_tokens, say=note)
        hosts = ["*"] if key is not None else ["localhost", "127.0.0.1", "::1", host]
        app = build_app(engines, limits=limits, key=key, hosts=hosts)
        shown = f"[{host}]" if ":" in host else host
        note(f"models: {', '.join(served.name for served in models)}")
        note(f"listening: http://{shown}:{listening.getsockname()[1]}/v1 (Ctrl-C stops)")
        run_server(app, listening)
    return 0
