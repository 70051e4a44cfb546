"""What a command is aimed at: a run folder, a run file, or an adapter folder."""

from __future__ import annotations

import difflib
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rotmole.config.load import load_run
from rotmole.config.schema import ModelSection, RunFile
from rotmole.data import data_problems
from rotmole.errors import AdapterError, ConfigError, InputError
from rotmole.models.adapter import CONFIG, check_adapter_folder
from rotmole.models.load import LoadedModel, load_model
from rotmole.training.folder.layout import ADAPTER, is_finished

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """What to load, and where results belong.

    Attributes:
        model: which base model.
        adapter: the adapter's folder; None is the base model alone.
        run: the run file; None where only an adapter was given.
        folder: where results are written.
    """

    model: ModelSection
    adapter: Path | None
    run: RunFile | None
    folder: Path


def find_target(
    path: str | Path, *, overrides: Sequence[str] = (), config: str | Path | None = None
) -> Target:
    """Say what a path means; nothing of model or data is loaded.

    A run file means the adapter of its output_dir, or the base model where nothing was trained
    yet. A run folder means its adapter and its own run.yaml. An adapter folder (any PEFT method)
    means that adapter with the run file of --config, else of the run folder it lies in, else with
    the base model it names.

    Args:
        config: run file for an adapter folder; also takes the place of a run folder's own.

    Raises:
        InputError: the path is none of these.
        ConfigError: the run file is wrong, or overrides were given without one.
        AdapterError: the adapter is missing or incomplete.
    """
    path = Path(path).expanduser()
    if path.is_file():
        if config is not None:
            raise ConfigError(
                f"--config {config} has no effect with the run file {path}; leave one of them out."
            )
        return _of_run_file(path, overrides)
    if (path / CONFIG).is_file():
        return _of_adapter(path, overrides, config)
    if (path / "run.yaml").is_file():
        run = _load(config or path / "run.yaml", overrides)
        return Target(run.model, _checked(path / ADAPTER), run, path)
    raise InputError(_unknown(path))


def _of_run_file(path: Path, overrides: Sequence[str]) -> Target:
    run = _load(path, overrides)
    folder = Path(run.output_dir).expanduser()
    adapter = folder / ADAPTER
    trained = _checked(adapter) if adapter.is_dir() else None
    return Target(run.model, trained, run, folder)


def _of_adapter(path: Path, overrides: Sequence[str], config: str | Path | None) -> Target:
    settings = check_adapter_folder(path)
    near = path.resolve().parent / "run.yaml"
    if config is None and near.is_file() and (near.parent / "manifest.json").is_file():
        folder = path.parent if path.resolve().name == ADAPTER else path
        run = _load(near, overrides)
        return Target(run.model, path, run, folder)
    if config is not None:
        run = _load(config, overrides)
        return Target(run.model, path, run, path)
    if overrides:
        raise ConfigError(
            f"{overrides[0]!r} needs a run file to change, and {path} lies in no run folder; "
            "give --config RUN.yaml."
        )
    return Target(ModelSection(name=_base_name(path, settings)), path, None, path)


def _load(path: str | Path, overrides: Sequence[str]) -> RunFile:
    return load_run(path, overrides, data_problems=data_problems)


def _checked(folder: Path) -> Path:
    """Check the adapter of a run folder."""
    if not (folder / CONFIG).is_file():
        raise AdapterError(
            f"{folder} holds no adapter ({CONFIG} is missing); the run may not have finished: "
            "train it again, or go on with --resume auto."
        )
    check_adapter_folder(folder)
    if not is_finished(folder.parent):
        warnings.warn(
            f"the run in {folder.parent} goes on beyond its adapter, which is of the training "
            "before; `rotmole train ... --resume auto` ends it.",
            stacklevel=2,
        )
    return folder


def _base_name(folder: Path, settings: dict[str, Any]) -> str:
    name = settings.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise AdapterError(
            f"{folder / CONFIG} does not name its base model; give --config RUN.yaml, whose model "
            "section does."
        )
    return name


def _unknown(path: Path) -> str:
    rule = "give a run folder, a run file, or a folder with an adapter"
    if path.is_dir():
        return f"{path} holds neither run.yaml nor {CONFIG}; {rule}."
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    hint = f"; did you mean {path.parent / near[0]}?" if near else ""
    return f"there is no {path}{hint or f'; {rule}.'}"


def load_target(
    target: Target,
    *,
    say: Callable[[str], None] = logger.info,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load the base model and put the adapter on it.

    Returns:
        The model (a PeftModel where there is an adapter) and its tokenizer, ready to answer.

    Raises:
        ModelError: the base model cannot be loaded.
        AdapterError: the adapter is broken or does not fit the model.
    """
    loaded = load_model(target.model, trust_remote_code=trust_remote_code, say=say)
    if target.adapter is not None:
        loaded.model = with_adapter(loaded.model, target.adapter)
    loaded.model.eval()
    return loaded


def with_adapter(model: Any, folder: Path) -> Any:
    """Put a saved PEFT adapter on a model; nothing is left at random.

    Args:
        model: the base model; it is changed in place.

    Raises:
        AdapterError: the adapter is broken or does not fit the model.
    """
    from peft import PeftModel
    from torch import OutOfMemoryError

    import rotmole  # noqa: F401  registers the method

    try:
        with warnings.catch_warnings():
            # PEFT only warns, and answers with the random start of what is missing.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, str(folder))
    except (InputError, MemoryError, OutOfMemoryError):
        raise
    except Exception as error:  # PEFT and safetensors raise whatever their parsers raise
        short = " ".join(str(error).split())[:300]
        raise AdapterError(
            f"the adapter in {folder} cannot be put on {model.config.name_or_path or 'the model'}: "
            f"{short} ({type(error).__name__}). Check that it was trained on this base model and "
            "that its files are complete."
        ) from error
