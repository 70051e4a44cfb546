"""One cell of a study: trained, scored, and described by a file that is written last."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from transformers import TrainerCallback

from rotmole.comparison.cost import flops_per_token
from rotmole.comparison.plan import Cell
from rotmole.comparison.results import CELL, FINAL, NLL, TUNING
from rotmole.comparison.shared import SharedSources
from rotmole.comparison.study import Study
from rotmole.config.load import resolved_yaml, sft_arguments
from rotmole.config.schema import RunFile
from rotmole.data import fingerprint, repeated
from rotmole.errors import ConfigError, InputError, NonFiniteError, RotMoleError, one_of
from rotmole.evaluation.evaluate import evaluate
from rotmole.evaluation.files import RESULT, origin, write_files
from rotmole.evaluation.metrics import METRICS, default_metrics
from rotmole.evaluation.target import with_adapter
from rotmole.files import atomic_write_text, make_folder
from rotmole.models.endings import take_endings
from rotmole.models.load import load_tokenizer
from rotmole.training.callbacks.metrics import read_metrics
from rotmole.training.checkpoints.find import checkpoints
from rotmole.training.checkpoints.seal import is_sealed
from rotmole.training.folder.layout import ADAPTER, MANIFEST, is_finished
from rotmole.training.folder.layout import METRICS as CURVE
from rotmole.training.folder.manifest import run_date
from rotmole.training.run import train

TRAINING, FAILED = "training.json", "failed.json"
LOCKS = "locks"
_PLACES = ("output_dir", "data.root", "model.name")
"""Settings that may differ between machines, or after a folder was moved."""


class Stopped(RotMoleError):
    """A signal stopped the cell at hand, after a checkpoint was saved."""

    def __init__(self, signum: int) -> None:
        super().__init__("stopped; a checkpoint is saved")
        self.exit_code = 128 + signum


@contextmanager
def cell_lock(study: Study, cell: Cell) -> Iterator[bool]:
    """Try to take a cell; another process may have it.

    Yields:
        Whether it is this process's until the block ends, however the process ends.
    """
    name = cell.name.removeprefix("cells/").replace("/", "+")
    lock = FileLock(make_folder(study.folder / LOCKS) / f"{name}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def is_done(study: Study, cell: Cell) -> bool:
    """Tell whether a cell is finished, and scored by all metrics that the study asks for by now."""
    there = _there(study, cell)
    if there is None or cell.stage != FINAL:
        return there is not None
    scored = there.get("metrics")
    if scored is None:  # made before cells said what they were scored by
        scored = [NLL, *_metrics_in(study.folder / cell.name / RESULT)]
    return {*study.file.metrics} <= {*scored}


def _metrics_in(result: Path) -> set[str]:
    """Return the names of the metrics in an eval.json."""
    tasks = json.loads(result.read_text(encoding="utf-8"))["systems"]["after"]["tasks"]
    return {name for task in tasks.values() for name in task["metrics"]}


def _there(study: Study, cell: Cell) -> dict[str, Any] | None:
    """Return cell.json, None where the cell was never finished."""
    path = study.folder / cell.name / CELL
    if not path.is_file():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def failure(study: Study, cell: Cell) -> dict[str, Any] | None:
    """Return what went wrong in a cell, None if nothing did."""
    try:
        content = json.loads((study.folder / cell.name / FAILED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def note_failure(study: Study, cell: Cell, error: BaseException) -> None:
    """Write failed.json."""
    content = {
        "message": " ".join(str(error).split()) or type(error).__name__,
        "kind": type(error).__name__,
        "exit_code": getattr(error, "exit_code", 1),
        "time": time.time(),
    }
    path = make_folder(study.folder / cell.name) / FAILED
    atomic_write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def run_of(
    study: Study, cell: Cell, machine: Mapping[str, Any], *, held_out: bool = False
) -> RunFile:
    """Return the run of a cell, or the same with the tasks that no cell trains on."""
    section = {"dtype": machine["dtype"], "device": machine["device"]}
    return study.run_of(
        cell.method,
        seed=cell.seed,
        settings=dict(cell.settings),
        folder=study.folder / cell.name,
        machine=section,
        held_out=held_out,
    )


def changes(study: Study, cell: Cell, machine: Mapping[str, Any]) -> list[str]:
    """Say in what a cell's folder differs from the study, one sentence each."""
    try:
        text = (study.folder / cell.name / "run.yaml").read_text(encoding="utf-8")
        there = _flat(yaml.safe_load(text))
    except (OSError, yaml.YAMLError, AttributeError):
        return []
    now = _flat(yaml.safe_load(resolved_yaml(run_of(study, cell, machine))))
    names = [n for n in {**there, **now} if not n.startswith(_PLACES)]
    if cell.stage == FINAL and (content := _there(study, cell)) is not None:
        there["held_out"], now["held_out"] = content.get("held_out", {}), study.file.held_out
        names.append("held_out")
    return [
        f"{cell.name}: {name} is {there.get(name)!r} there and {now.get(name)!r} in the study"
        for name in names
        if there.get(name) != now.get(name)
    ]


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def run_cell(
    study: Study,
    cell: Cell,
    machine: Mapping[str, Any],
    sources: SharedSources,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """Do what is left of a cell: train, score, describe. Call it under `cell_lock`.

    A finished cell that lacks a metric of the study is scored again, not trained. A cell of tuning
    whose loss is not finite is finished too, with an infinite loss.

    Args:
        study: the study.
        cell: one of its plan's.
        machine: dtype, device, threads and what else is written into the cell.
        sources: of the process.
        callbacks: of the trainer.

    Raises:
        Stopped: by a signal; the next call goes on.
        RotMoleError: the cell cannot be made.
    """
    started = time.monotonic()
    earlier = (_there(study, cell) or {}).get("seconds", 0.0)
    folder = study.folder / cell.name
    run = run_of(study, cell, machine)
    make_folder(folder)
    (folder / FAILED).unlink(missing_ok=True)
    if differing := changes(study, cell, machine):
        raise ConfigError(differing)
    scored = [run]
    if study.file.held_out:
        scored.append(run_of(study, cell, machine, held_out=True))
    if study.file.seeds:  # before training, which takes long
        tokenizer = load_tokenizer(run.model, trust_remote_code=study.trust_remote_code)
        *_, rows = [_rows(part, tokenizer, folder, sources) for part in reversed(scored)]
        check_metrics(study, run, rows)
    try:
        trained = _trained(study, run, folder, sources, callbacks)
    except NonFiniteError as error:
        if cell.stage != TUNING:
            raise
        trained = _diverged(study, cell, folder, error)
    if cell.stage == FINAL:
        trained = {**trained, **_score(study, scored, folder, sources, trained)}
    seconds = round(time.monotonic() - started + earlier, 3)
    content = _described(study, cell, run, trained) | {
        "seconds": seconds,
        "facts": dict(machine) | _papers(folder),
    }
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    atomic_write_text(folder / CELL, text)


def _described(
    study: Study, cell: Cell, run: RunFile, trained: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what cell.json says of a cell beside its machine and its time."""
    sized = study.sized[cell.method]
    scored = {"held_out": study.file.held_out, "metrics": study.file.metrics}
    return {
        "method": cell.method,
        "stage": cell.stage,
        "seed": cell.seed,
        "settings": dict(cell.settings),
        "rate": sft_arguments(run)["learning_rate"],
        "gate_parameters": sized.gates,
        "difference": sized.difference,
        "equal": sized.equal,
        **(scored if cell.stage == FINAL else {}),
        **trained,
    }


def _trained(
    study: Study,
    run: RunFile,
    folder: Path,
    sources: SharedSources,
    callbacks: Sequence[TrainerCallback],
) -> dict[str, Any]:
    """Train, or go on, and return the figures of the training."""
    notes = folder / TRAINING
    if notes.is_file() and is_finished(folder):
        content: dict[str, Any] = json.loads(notes.read_text(encoding="utf-8"))
        return content
    if not any(is_sealed(path) for path in checkpoints(folder)):
        # killed before its first checkpoint: what is there is no run yet
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    result = train(run, resume="auto", sources=sources, progress=False, callbacks=callbacks)
    if result.interrupted is not None:
        raise Stopped(result.interrupted)
    rows = read_metrics(folder / CURVE)
    ends = [row for row in rows if "train_loss" in row]
    tokens = int(result.metrics.get("num_input_tokens_seen", 0))
    nll = result.metrics.get("eval_loss")
    each = flops_per_token(run, result.built.trainer.train_dataset)
    content = {
        "parameters": result.trainable_parameters,
        "updates": result.steps,
        "weights_step": result.weights_step,
        "stopped_early": result.stopped_early,
        "tokens": tokens,
        "train_seconds": ends[-1].get("train_seconds", 0.0) if ends else 0.0,
        "peak_memory_bytes": result.metrics.get("peak_memory_bytes"),
        "flops": None if each is None else each * tokens,
        "nll": nll if nll is not None and math.isfinite(nll) else None,
        "base_weights": sources.base_weights,
    }
    atomic_write_text(notes, json.dumps(content, indent=1) + "\n")
    return content


def _diverged(study: Study, cell: Cell, folder: Path, error: NonFiniteError) -> dict[str, Any]:
    rows = read_metrics(folder / CURVE)
    last = rows[-1] if rows else {}
    return {
        "parameters": study.sized[cell.method].parameters,
        "updates": last.get("step", 0),
        "tokens": int(last.get("num_input_tokens_seen", 0)),
        "train_seconds": last.get("train_seconds", 0.0),
        "flops": 0.0,
        "nll": None,
        "diverged": " ".join(str(error).split()),
    }


def _score(
    study: Study,
    runs: Sequence[RunFile],
    folder: Path,
    sources: SharedSources,
    trained: Mapping[str, Any],
) -> dict[str, Any]:
    """Score the split that the study names, once.

    Args:
        runs: the cell's, and the same with the tasks that it did not train on, if there are some.
        trained: what `_trained` says.

    Returns:
        "repeated": task -> how many of its rows are training rows too, if any; "left_out": tasks
        that have no row to score; "held_out_rows": a checksum of the rows of tasks that it did not
        train on, None where there are none.
    """
    run, *_ = runs
    loaded = sources.model(run.model, lambda text: None)
    if trained.get("base_weights") not in (None, sources.base_weights):
        raise InputError(
            f"the weights of the base model have changed since {folder} was trained; bring them "
            "back, or delete that folder, which is then made anew"
        )
    train = sources.examples(run, loaded.tokenizer, run_date(folder))["train"]
    _check_rows(run, _rows(run, loaded.tokenizer, folder, sources), folder)
    rows, metrics = {}, {}
    for part in runs:
        for task, examples in _rows(part, loaded.tokenizer, folder, sources).items():
            rows[task], metrics[task] = examples, _metrics(study, part, task, examples)
    section = run.evaluation.model_copy(update={"before": False})
    shown = train if section.examples_in_prompt else {}
    model = with_adapter(loaded.model, folder / ADAPTER)
    take_endings(model, folder / ADAPTER)
    model.eval()
    report = evaluate(
        model, loaded.tokenizer, rows, section,
        metrics_by_task=metrics, demonstrations=shown, seed=run.seed,
        max_length=sft_arguments(run)["max_length"],
    )  # fmt: skip
    write_files(report, origin(run, folder / ADAPTER, loaded.name, loaded.note), folder)
    left_out = [task for part in runs for task in part.data.tasks if task not in rows]
    unseen = {task: examples for task, examples in rows.items() if task not in run.data.tasks}
    return {
        "repeated": repeated(rows, train),
        "left_out": left_out,
        "held_out_rows": fingerprint(unseen)[:12] if unseen else None,
    }


def _rows(
    run: RunFile, tokenizer: Any, folder: Path, sources: SharedSources
) -> dict[str, Sequence[Any]]:
    """Return the rows to score, task by task."""
    rows = sources.examples(run, tokenizer, run_date(folder))[run.evaluation.split]
    rows = {task: examples for task, examples in rows.items() if examples}
    if not rows:
        raise ConfigError(
            f"no task has rows in split {run.evaluation.split!r}; give the tasks files for it, or "
            "write another split in the study file"
        )
    return rows


def _check_rows(run: RunFile, rows: Mapping[str, Sequence[Any]], folder: Path) -> None:
    """Refuse to score other rows than those that were there when a cell was trained."""
    split = run.evaluation.split
    content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    there = content["data"]["splits"].get(split, {})
    now = {task: fingerprint({task: examples}) for task, examples in rows.items()}
    if changed := [task for task in now if now[task] != there.get(task, {}).get("sha256")]:
        raise InputError(
            f"the {split} rows of {', '.join(changed)} have changed since {folder} was trained; "
            "bring them back, or delete that folder, which is then made anew"
        )


def check_metrics(study: Study, run: RunFile, rows: Mapping[str, Sequence[Any]]) -> None:
    """Refuse a study that asks for a metric which no task has.

    Args:
        study: the study.
        run: of any of its cells.
        rows: task -> the rows that are scored.

    Raises:
        ConfigError: with the metrics that the tasks have.
    """
    known = dict.fromkeys(name for task in rows for name in _own_metrics(run, task, rows[task]))
    had = list(dict.fromkeys([NLL, *(m for m in METRICS if _fits_every_row(m)), *known]))
    if unknown := [name for name in study.file.metrics if name not in had]:
        raise ConfigError([f"{one_of('metrics', name, had)}; no task has it" for name in unknown])


def _fits_every_row(metric: str) -> bool:
    return METRICS[metric].needs == "loss"


def _own_metrics(run: RunFile, task: str, rows: Sequence[Any]) -> Sequence[str]:
    return run.data.tasks[task].metrics or default_metrics(rows)


def _metrics(study: Study, run: RunFile, task: str, rows: Sequence[Any]) -> list[str]:
    """Return the metrics of a task that the study judges; perplexity has every row's loss."""
    own = _own_metrics(run, task, rows)
    wanted = [
        name
        for name in study.file.metrics
        if name in own or (name != NLL and _fits_every_row(name))
    ]
    return list(dict.fromkeys([*wanted, "perplexity"]))


def _papers(folder: Path) -> dict[str, Any]:
    """Return versions, commit and processor, as the run's manifest has them."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {
        "versions": manifest["versions"],
        "commit": manifest["git_commit"],
        "platform": manifest["machine"]["platform"],
    }
