"""One process of a study: it does cells until none is left."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Mapping
from multiprocessing import parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import transformers

from rotmole.comparison.cells import Stopped
from rotmole.comparison.share import work
from rotmole.comparison.study import Study
from rotmole.errors import RotMoleError
from rotmole.files import make_folder

LOGS = "logs"


def do_cells(
    study: Study, machine: Mapping[str, Any], since: float, only: str | None = None
) -> None:
    """Do cells, in a process of its own; what libraries say goes to a file in the study's folder.

    Exits with 0 when nothing is left, else with the code of the error.

    Args:
        study: the study.
        machine: dtype, device and threads.
        since: as of `work`.
        only: the one cell to do.
    """
    _follow_parent()
    log = make_folder(study.folder / LOGS) / f"process-{os.getpid()}.log"
    with log.open("a", encoding="utf-8", buffering=1) as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        _quieten()
        torch.set_num_threads(machine["threads"])
        try:
            work(study, machine, only=only, since=since)
        except Stopped as error:
            sys.exit(error.exit_code)
        except RotMoleError as error:
            print(f"rotmole: {error}", file=sys.stderr)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception:
            traceback.print_exc()
            sys.exit(1)


def log_of(study: Study, pid: int | None) -> Path:
    """Return the file with what a process said."""
    return study.folder / LOGS / f"process-{pid}.log"


def _follow_parent() -> None:
    """Stop as by SIGTERM, a checkpoint saved, when the command that started this one was killed."""
    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _quieten() -> None:
    """Leave out what libraries repeat in every cell; warnings of users' settings were shown."""
    warnings.simplefilter("once")
    logging.getLogger("torchao").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
