"""``rotmole compare``: read the study, show what will be done, do it, name what failed."""

from __future__ import annotations

import multiprocessing
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from rotmole.cli.compare.table import (
    Progress,
    console,
    finished_line,
    look,
    method_lines,
    progress_table,
    rounding_lines,
    stage_lines,
    summary,
)
from rotmole.cli.compare.worker import do_cells, log_of
from rotmole.cli.screen import note
from rotmole.comparison.pages.tables import remarks, screen
from rotmole.comparison.plan import make_plan
from rotmole.comparison.report import write_report
from rotmole.comparison.results import read_results
from rotmole.comparison.share import check_cells, failures, fix_machine, short, todo
from rotmole.comparison.study import Study, load_study
from rotmole.errors import InputError
from rotmole.evaluation.render import print_lines, print_table
from rotmole.models.builtin import built_in_named
from rotmole.models.load import load_tokenizer

INTERVAL = 4.0
"""Seconds between two looks at the folder."""


def compare(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    jobs: int = 1,
    dry_run: bool = False,
    output: Path | None = None,
    cell: str | None = None,
    print_cells: bool = False,
    trust_remote_code: bool = False,
) -> int:
    """Do a study, or what is left of it.

    Args:
        path: the study file.
        overrides: key=value settings over it.
        jobs: processes that work at the same time.
        dry_run: show methods, sizes and cells, and write nothing.
        output: folder of the study; None means its output_dir.
        cell: name of the one cell to do.
        print_cells: print one command for each cell that is left, and do none.
        trust_remote_code: let transformers run code that came with the model.

    Returns:
        0; 1 if a cell failed; 128 + the signal that stopped it.

    Raises:
        ConfigError: the study file is wrong, or its folder is of another study.
    """
    study = load_study(
        path, overrides, output=output, trust_remote_code=trust_remote_code, say=note
    )
    words = ["rotmole", "compare", str(path), *overrides, "--output", str(study.folder)]
    if trust_remote_code:
        words.append("--trust-remote-code")
    if print_cells:
        for left in todo(study, make_plan(study), time.time()):
            print(shlex.join([*words, "--cell", short(left)]))
        return 0
    if cell is None:
        _show_study(study)
    if dry_run:
        print(f"nothing was done; rotmole compare {shlex.quote(str(path))} does it")
        return 0
    machine = fix_machine(study, jobs)
    plan = make_plan(study)
    check_cells(study, plan.cells, machine)
    since = time.time()
    left = todo(study, plan, since, cell)
    print(
        f"cells       {machine['dtype']} on {machine['device']}, {machine['threads']} threads; in "
        f"{study.folder}",
        flush=True,
    )
    code = 0
    if left:
        if built_in_named(study.model.name):
            load_tokenizer(study.model)  # downloads the built-in model once, not in every process
        code = _run(study, machine, jobs if cell is None else 1, since, cell)
    return _close(study, words, code, cell)


def _show_study(study: Study) -> None:
    print(f"base        {study.model.name}")
    print_table(method_lines(study))
    print_lines(rounding_lines(study))
    for line in stage_lines(study, make_plan(study)):
        print(line)
    unequal = [name for name, sized in study.sized.items() if not sized.equal]
    if unequal and study.file.equal == "parameters":
        words = f"not equal   {', '.join(unequal)}: more than 2 % from the target, part of no claim"
        print_lines([words])
    sys.stdout.flush()


def _run(
    study: Study, machine: Mapping[str, Any], jobs: int, since: float, only: str | None
) -> int:
    """Start the processes and show their progress; return 0, or the exit code that ended them."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    workers = [
        context.Process(target=do_cells, args=(study, machine, since, only), name=f"cells-{n}")
        for n in range(jobs)
    ]
    for worker in workers:
        worker.start()
    try:
        with _shown(study, jobs, since) as show:
            while alive := [worker.sentinel for worker in workers if worker.is_alive()]:
                wait(alive, INTERVAL)
                show()
    except BaseException as error:
        for worker in workers:
            worker.terminate()  # no harm where a Ctrl-C has reached it already
        for worker in workers:
            worker.join()
        if isinstance(error, KeyboardInterrupt):
            return 130
        raise
    return _end_of(study, workers)


def _end_of(study: Study, workers: Sequence[Any]) -> int:
    """Say how processes ended that did not end well, and return the worst exit code."""
    code = 0
    for worker in workers:
        if worker.exitcode in (0, None):
            continue
        code = 128 - worker.exitcode if worker.exitcode < 0 else worker.exitcode
        if code in (130, 143):
            continue
        log = log_of(study, worker.pid)
        tail = (
            log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
        )
        said = next((line for line in reversed(tail) if line.strip()), "it said nothing")
        reason = "was killed, perhaps for its memory" if worker.exitcode == -9 else said
        note(f"a process ended with exit code {worker.exitcode}: {reason} ({log})")
    return code


@contextmanager
def _shown(study: Study, jobs: int, since: float) -> Iterator[Any]:
    """Yield show(): a live table on a terminal, otherwise a line when a cell is finished."""
    started = time.monotonic()
    if not sys.stderr.isatty():
        yield _lines(study, jobs, since, started)
        return
    from rich.live import Live

    with Live(console=console(), auto_refresh=False) as live:

        def show() -> None:
            progress = look(study, jobs, since)
            live.update(progress_table(study, progress, started), refresh=True)

        yield show


def _lines(study: Study, jobs: int, since: float, started: float) -> Any:
    told = {c for c, state in look(study, jobs, since).states.items() if state == "done"}

    def show() -> None:
        progress: Progress = look(study, jobs, since)
        for cell, state in progress.states.items():
            if state == "done" and cell not in told:
                told.add(cell)
                note(f"{finished_line(study, cell)} ({summary(progress, started)})")

    return show


def _close(study: Study, words: Sequence[str], code: int, only: str | None) -> int:
    """Name what failed and what is left, or show the results."""
    plan = make_plan(study)
    failed = failures(study, plan)
    if only is not None:
        failed = {c: said for c, said in failed.items() if short(c) == only.removeprefix("cells/")}
    for cell, message in failed.items():
        note(f"failed: {short(cell)}: {message}")
        note(f"  repeat it with: {shlex.join([*words, '--cell', short(cell)])}")
    if code in (130, 143):
        print("stopped; finished cells and checkpoints stay.")
        print(f"go on with: {shlex.join(words)}")
        return code
    if only is not None:
        done = not failed and not code
        print(f"{only}: {'finished' if done else 'not finished'}")
        return code or int(bool(failed))
    if plan.open and failed:
        note("the final cells follow from tuning; they wait for the cells that failed")
    try:
        results = read_results(study.folder)
    except InputError:
        return code or 1
    try:
        judgement, files = write_report(results, study.folder, Path(study.where).stem)
    except InputError as error:
        note(str(error))
        return code or 1
    for title, lines in screen(judgement):
        print_table(lines, title=title)
        print()
    print_lines(remarks(judgement))
    print(f"written: {', '.join(map(str, files))}")
    return code or int(bool(failed))
