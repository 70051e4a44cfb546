"""The warm parent of the fault tests: imports the command line once, forks a child a command.

A request is one line of JSON on standard input, the answer one line on standard output:

    {"words": [...], "folder": cwd, "out": file, "err": file, "env": {...}, "before": "code"}
    -> {"code": 2}            the exit code; negative is the signal that ended the child
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).parents[1]))

from warm import become_warm


def child(request: dict[str, Any]) -> NoReturn:
    """Be the command: its own folder, streams, environment and exit code."""
    code = 70
    try:
        for number, name, flags in (
            (0, os.devnull, os.O_RDONLY),
            (1, request["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
            (2, request["err"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        ):
            os.dup2(os.open(name, flags, 0o600), number)
        os.environ.update(request["env"])
        os.chdir(request["folder"])
        exec(request["before"], {})
        from rotmole_cli import main

        code = main(request["words"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    """Answer requests until standard input ends."""
    become_warm()
    print(json.dumps({"ready": os.getpid()}), flush=True)
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            child(json.loads(line))
        _, status = os.waitpid(process, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    serve()
