"""Export a trained mixture as a static LoRA: fit it, write it, load it again, and judge it."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import GENERATION_CONFIG_NAME

from rotmole.config.load import sft_arguments
from rotmole.config.schema import RunFile
from rotmole.data import Example, encode_all, load_splits
from rotmole.data.encode import Row
from rotmole.errors import AdapterError, ConfigError
from rotmole.evaluation import Report, compare, limit_rows, measure
from rotmole.evaluation.evaluate import task_metrics
from rotmole.evaluation.target import Target, with_adapter
from rotmole.export.agreement import Agreement, agreement
from rotmole.export.peft_folder import trained_beside, write_lora
from rotmole.export.static_lora import (
    Share,
    StaticLayer,
    needed_rank,
    static_lora,
    total_share,
)
from rotmole.export.text import divided, general_passages, read_passages, tokenised
from rotmole.inspection.sample import batches
from rotmole.models.adapter import check_adapter_folder
from rotmole.models.endings import take_endings
from rotmole.models.load import load_model, load_tokenizer

RANK = 16
"""Of a mixture's static LoRA if none is given."""
MAX_KL = 0.1
"""Nats for each token: a static LoRA that is farther from its mixture is refused."""
ROWS, TEXT, HELD_OUT, OTHER = "training rows", "text", "held-out rows", "other text"

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]
Tasks = dict[str, list[Example]]


@dataclass(frozen=True)
class Settings:
    """What the user decides about a static LoRA.

    Attributes:
        rank: None takes the adapter's own if it is a LoRA already, else RANK.
        text: file of other text, passages with a blank line between them; None: rotmole's own.
        limit: rows of each task and group to fit on, and again to judge by.
    """

    rank: int | None = None
    text: Path | None = None
    limit: int = 50


@dataclass(frozen=True)
class Verdict:
    """How near a static LoRA, loaded from its files, is to the mixture.

    Attributes:
        layers: path of a layer -> its static LoRA and shares.
        rank: of every layer.
        exact: whether it adds exactly what the adapter adds.
        shares: name of a part of the tokens -> shares over all layers.
        agreements: HELD_OUT and OTHER -> against the mixture.
        without: the same for the base model without any adapter.
        report: metrics of the tasks' held-out rows: systems "mixture" and "static"; None if there
            are no rows or nothing is lost.
        split: of the held-out rows; "" without rows.
    """

    layers: Mapping[str, StaticLayer]
    rank: int
    exact: bool
    shares: Mapping[str, Share]
    agreements: Mapping[str, Agreement]
    without: Mapping[str, Agreement]
    report: Report | None
    split: str

    @property
    def worst(self) -> tuple[str, float]:
        """The part on which the static LoRA is farthest from the mixture, and its divergence."""
        part = max(self.agreements, key=lambda name: self.agreements[name].kl)
        return part, self.agreements[part].kl


@dataclass(frozen=True)
class Prepared:
    """A mixture, its base model once more, and tokens to fit and judge a static LoRA by.

    Attributes:
        place: the target.
        adapter: its folder.
        model: with the mixture.
        base: a second copy of the base model that shares its tensors.
        tokenizer: the model's.
        rows: name of a part -> rows of token ids; labels where not every token counts.
        judged: the held-out rows of the tasks.
        split: of these.
        own_rank: the rank at which the LoRA is the adapter itself, None for a mixture.
    """

    place: Target
    adapter: Path
    model: Any
    base: Any
    tokenizer: Any
    rows: Mapping[str, Sequence[Row]]
    judged: Tasks
    split: str
    own_rank: int | None

    def batches(self) -> dict[str, list[dict[str, Any]]]:
        """Return the rows of each part as arguments of the model, without padding."""
        return {name: batches(rows, self.model) for name, rows in self.rows.items()}

    def write(self, layers: Mapping[str, StaticLayer], folder: Path) -> None:
        """Write a static LoRA as a PEFT folder, with what else belongs to the adapter."""
        config = self.model.peft_config[self.model.active_adapter]
        write_lora(folder, layers, config, trained_beside(self.adapter))
        endings = self.adapter / GENERATION_CONFIG_NAME
        if endings.is_file():
            shutil.copyfile(endings, folder / GENERATION_CONFIG_NAME)

    def agreements(self, second: Any) -> dict[str, Agreement]:
        """Compare a second model with the mixture on the parts that judge."""
        return {
            name: agreement(self.model, second, rows)
            for name, rows in self.rows.items()
            if name in (HELD_OUT, OTHER)
        }


def prepare(
    place: Target, settings: Settings, *, say: Say, trust_remote_code: bool = False
) -> Prepared:
    """Read the rows and load the models for a static LoRA.

    Args:
        place: its run gives the rows; without one the adapter must be a LoRA already.
        say: called with one line before each slow step.

    Raises:
        AdapterError: the target has no adapter, or one of another method.
        ConfigError: there are no rows to fit a mixture on.
        ModelError: the adapter has no layers for which a linear map can stand.
    """
    adapter = _mixture_of(place)
    passages = general_passages() if settings.text is None else read_passages(settings.text)
    tokenizer = load_tokenizer(place.model, trust_remote_code=trust_remote_code)
    fit, judge, split = _rows(place, settings.limit, tokenizer)
    loaded = load_model(place.model, trust_remote_code=trust_remote_code, say=say)
    base = shared_copy(loaded.model).eval()
    model = with_adapter(loaded.model, adapter).eval()
    own_rank = needed_rank(model)
    if own_rank is None and not fit:
        raise ConfigError(
            "a static LoRA of a mixture is fitted on rows, and there is no run file to take them "
            "from; add --config RUN.yaml."
        )
    fitted, kept = divided(passages)
    rows: dict[str, Sequence[Row]] = {
        ROWS: _encoded(place.run, fit, tokenizer),
        TEXT: [{"input_ids": ids} for ids in tokenised(fitted, tokenizer)],
        HELD_OUT: _encoded(place.run, judge, tokenizer),
        OTHER: [{"input_ids": ids} for ids in tokenised(kept, tokenizer)],
    }
    if not judge:
        del rows[HELD_OUT]
    return Prepared(place, adapter, model, base, tokenizer, rows, judge, split, own_rank)


def export_lora(
    place: Target,
    folder: Path,
    settings: Settings,
    *,
    say: Say,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> Verdict:
    """Write the static LoRA of a target's adapter, and judge the files that were written.

    Args:
        place, settings, say: as in `prepare`, which says what it raises.
        folder: exists; receives what PEFT's save_pretrained writes.
        progress: called with (what, done, total).
    """
    ready = prepare(place, settings, say=say, trust_remote_code=trust_remote_code)
    rank = settings.rank or ready.own_rank or RANK
    say(f"fitting a LoRA of rank {rank}")
    parts = ready.batches()
    fitted = {name: parts.pop(name) for name in (ROWS, TEXT)}
    layers = static_lora(ready.model, fitted, parts, rank=rank, progress=progress)
    ready.write(layers, folder)
    exact = all(layer.exact for layer in layers.values())
    shares = {name: total_share(layers, name) for name in ready.rows}

    say("comparing the LoRA in these files with the mixture")
    without = ready.agreements(ready.base)
    second = with_adapter(ready.base, folder).eval()
    agreements = ready.agreements(second)
    report = None
    if ready.judged and not exact:
        for each in (ready.model, second):
            take_endings(each, ready.adapter)
        report = _measured(ready, second, progress)
    return Verdict(layers, rank, exact, shares, agreements, without, report, ready.split)


def shared_copy(model: Any) -> Any:
    """Return a copy of a model that has modules of its own and the same tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _mixture_of(place: Target) -> Path:
    """Return the folder of a target's RotMoLE adapter."""
    if place.adapter is None:
        raise AdapterError(
            f"{place.folder} has no adapter yet, so there is nothing to export; train it first."
        )
    kind = check_adapter_folder(place.adapter).get("peft_type")
    if kind != "ROTMOLE":
        reason = "is a LoRA already: copy that folder" if kind == "LORA" else f"is of {kind}"
        raise AdapterError(
            f"the adapter in {place.adapter} {reason}; --lora exports RotMoLE adapters."
        )
    return place.adapter


def _rows(place: Target, limit: int, tokenizer: Any) -> tuple[Tasks, Tasks, str]:
    """Return the rows to fit on, those to judge by, and the split of these."""
    run = place.run
    if run is None:
        return {}, {}, ""
    splits = load_splits(run.data, seed=run.seed, tokenizer=tokenizer, date=place.date)
    train = _some(splits["train"], limit, run.seed)
    if not train:
        raise ConfigError("no task has training rows, on which a static LoRA is fitted.")
    for split in ("test", "validation"):
        judge = _some(splits[split], limit, run.seed)
        if judge:
            break
    else:
        warnings.warn(
            "no task has test or validation rows, so every tenth training row is left out of the "
            "fit, to judge by; the mixture was trained on it",
            stacklevel=2,
        )
        split = "train"
        judge = {task: rows[::10] for task, rows in train.items()}
        train = {task: [r for i, r in enumerate(rows) if i % 10] for task, rows in train.items()}
    task_metrics(judge, _wanted(run))  # raises before the model is loaded
    return train, judge, split


def _some(tasks: Mapping[str, Sequence[Example]], limit: int, seed: int) -> Tasks:
    return {task: rows for task, rows in limit_rows(tasks, limit, seed=seed).items() if rows}


def _wanted(run: RunFile) -> dict[str, list[str] | None]:
    return {name: task.metrics for name, task in run.data.tasks.items()}


def _encoded(run: RunFile | None, tasks: Tasks, tokenizer: Any) -> list[Row]:
    if run is None:
        return []
    longest = sft_arguments(run)["max_length"] or 1 << 30
    rows = [
        row for task in tasks.values() for row in encode_all(task, tokenizer, max_length=longest)
    ]
    return [{name: row[name] for name in ("input_ids", "labels")} for row in rows]


def _measured(ready: Prepared, static: Any, progress: Progress | None) -> Report:
    run = ready.place.run
    assert run is not None  # it gave the rows
    section = run.evaluation.model_copy(update={"examples_in_prompt": 0})
    systems = {}
    for name, model in (("mixture", ready.model), ("static", static)):
        show = None if progress is None else _named(progress, name)
        systems[name] = measure(
            model, ready.tokenizer, ready.judged, section,
            metrics_by_task=_wanted(run), progress=show, seed=run.seed,
            max_length=sft_arguments(run)["max_length"],
        )  # fmt: skip
    return compare(systems, {"seed": run.seed})


def _named(progress: Progress, name: str) -> Progress:
    return lambda what, done, total: progress(f"{name}: {what}", done, total)
