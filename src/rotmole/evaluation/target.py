"""The TARGET of a command: a run folder, a run file or an adapter folder."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rotmole.config.load import load_run
from rotmole.config.schema import ModelSection, RunFile
from rotmole.data import data_problems
from rotmole.errors import AdapterError, ConfigError, InputError, did_you_mean
from rotmole.models.adapter import CONFIG, check_adapter_folder
from rotmole.models.builtin import built_in_for
from rotmole.models.endings import take_endings
from rotmole.models.load import LoadedModel, load_model
from rotmole.training.folder.layout import ADAPTER, MANIFEST, PREVIOUS, is_finished
from rotmole.training.folder.manifest import run_date

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """What a command loads, and the folder for its results.

    Attributes:
        model: settings of the base model.
        adapter: folder of the adapter; None means the base model alone.
        run: the run file; None if there is only an adapter.
        folder: for the results.
    """

    model: ModelSection
    adapter: Path | None
    run: RunFile | None
    folder: Path

    @property
    def date(self) -> str:
        """The date of the run as ISO text, which its chats were rendered on; else today's."""
        return run_date(self.folder if self.adapter is None else self.adapter.resolve().parent)


def find_target(
    path: str | Path,
    *,
    overrides: Sequence[str] = (),
    config: str | Path | None = None,
    needs_data: bool = True,
) -> Target:
    """Return the target that a path means; neither model nor data are loaded.

    A run file means the adapter in its output_dir, or the base model if nothing was trained yet.
    A run folder means its adapter and its run.yaml. An adapter folder (of any PEFT method) means
    this adapter with the run file of --config, else of the run folder around it, else with the
    base model that it names. So does a run folder without run.yaml.

    Args:
        config: run file for an adapter folder, or in place of a run folder's run.yaml.
        needs_data: whether it is an error if files of the run file's data are missing.

    Raises:
        InputError: the path is none of these.
        ConfigError: the run file is wrong, or there are overrides but no run file.
        AdapterError: the adapter is missing or incomplete.
    """
    path = Path(path).expanduser()
    if path.is_file():
        if config is not None:
            raise ConfigError(
                f"--config {config} has no effect with the run file {path}; leave one of them out."
            )
        run = _load(path, overrides, needs_data)
        folder = Path(run.output_dir).expanduser()
        is_trained = (folder / ADAPTER).is_dir()
        adapter = _checked_adapter(folder / ADAPTER) if is_trained else None
        return Target(run.model, adapter, run, folder)
    if (path / CONFIG).is_file():
        return _of_adapter(path, overrides, config, needs_data)
    if (path / "run.yaml").is_file():
        run = _load(config or path / "run.yaml", overrides, needs_data)
        return Target(run.model, _checked_adapter(path / ADAPTER), run, path)
    if (path / ADAPTER / CONFIG).is_file():
        return _of_adapter(path / ADAPTER, overrides, config, needs_data)
    raise InputError(_no_target(path))


def _of_adapter(
    path: Path, overrides: Sequence[str], config: str | Path | None, needs_data: bool
) -> Target:
    settings = check_adapter_folder(path)
    run_folder = path.resolve().parent
    if config is None and all((run_folder / name).is_file() for name in ("run.yaml", MANIFEST)):
        folder = path.parent if path.resolve().name == ADAPTER else path
        run = _load(run_folder / "run.yaml", overrides, needs_data)
        return Target(run.model, path, run, folder)
    if config is not None:
        run = _load(config, overrides, needs_data)
        return Target(run.model, path, run, path)
    if overrides:
        raise ConfigError(
            f"{overrides[0]!r} changes a run file, but {path} is not in a run folder; add "
            "--config RUN.yaml."
        )
    return Target(ModelSection(name=_base_name(path, settings)), path, None, path)


def _load(path: str | Path, overrides: Sequence[str], needs_data: bool) -> RunFile:
    is_result = (Path(path).parent / MANIFEST).is_file()  # a run folder's own, not a user's
    check = data_problems if needs_data else None
    # what rotmole wrote itself was checked before it was trained
    trains = not is_result or any(word.startswith("training.") for word in overrides)
    return load_run(
        path, overrides, data_problems=check, anchored=not is_result, check_trainer=trains
    )


def _checked_adapter(folder: Path) -> Path:
    """Return the adapter's folder in a run folder after checking it."""
    if not (folder / CONFIG).is_file():
        raise AdapterError(
            f"{folder} contains no adapter ({CONFIG} is missing), perhaps because training did "
            "not finish; train again, or continue with --resume auto"
            f"{_before(folder.parent)}."
        )
    check_adapter_folder(folder)
    if not is_finished(folder.parent):
        warnings.warn(
            f"the run in {folder.parent} was continued but did not finish, so its adapter is that "
            "of the earlier training; finish it with `rotmole train ... --resume auto`.",
            stacklevel=2,
        )
    return folder


def _base_name(folder: Path, settings: dict[str, Any]) -> str:
    name = settings.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise AdapterError(
            f"{folder / CONFIG} does not name its base model; add --config RUN.yaml, whose model "
            "section names it."
        )
    return built_in_for(name)


def _before(run_folder: Path) -> str:
    """Say where the finished run is whose successor did not finish."""
    place = run_folder / PREVIOUS
    return f". The finished run before it is {place}" if is_finished(place) else ""


def _no_target(path: Path) -> str:
    rule = "give a run folder, a run file, or a folder with an adapter"
    if path.is_dir():
        return f"{path} contains neither run.yaml nor {CONFIG}; {rule}{_before(path)}."
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = did_you_mean(path.name, names) or f"; {rule}."
    return f"there is no file or folder {path}{hint}"


def load_target(
    target: Target,
    *,
    say: Callable[[str], None] = logger.info,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load the base model of a target, put its adapter on it, and switch it to eval mode.

    Args:
        say: called with one line before each slow step.

    Raises:
        ModelError: the base model cannot be loaded.
        AdapterError: the adapter is broken or does not fit the model.
    """
    loaded = load_model(target.model, trust_remote_code=trust_remote_code, say=say)
    if target.adapter is not None:
        loaded.model = with_adapter(loaded.model, target.adapter)
        take_endings(loaded.model, target.adapter)
    loaded.model.eval()
    return loaded


def with_adapter(model: Any, folder: Path) -> Any:
    """Put a saved PEFT adapter on a model, in place, and return the PeftModel.

    Raises:
        AdapterError: the adapter is broken or does not fit the model, or a tensor is missing.
    """
    from peft import PeftModel
    from torch import OutOfMemoryError

    import rotmole  # noqa: F401  it registers the method with PEFT

    try:
        with warnings.catch_warnings():
            # PEFT only warns, and missing tensors keep their random initial values.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, str(folder))
    except (InputError, MemoryError, OutOfMemoryError):
        raise
    except Exception as error:  # PEFT and safetensors raise errors of many classes
        short = " ".join(str(error).split())[:300]
        raise AdapterError(
            f"the adapter in {folder} cannot be put on {model.config.name_or_path or 'the model'}: "
            f"{short} ({type(error).__name__}). Check that it was trained on this base model and "
            "that its files are complete."
        ) from error
