"""``rotmole inspect``: what experts, weights and angles of a trained mixture do."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rotmole.cli.screen import note, progress
from rotmole.config.load import load_run
from rotmole.config.schema import RunFile
from rotmole.data import data_problems, load_splits
from rotmole.errors import AdapterError, ConfigError, DataError
from rotmole.evaluation.render import print_lines, print_table
from rotmole.evaluation.target import Target, find_target, load_target
from rotmole.files import check_writable
from rotmole.inspection.inspect import Request, inspect_adapter
from rotmole.inspection.inspection import FILE, Inspection, Source
from rotmole.inspection.pages import summary
from rotmole.inspection.pages.curves import curves_of
from rotmole.inspection.pages.report import PAGE, write_figures, write_report
from rotmole.inspection.sample import LIMIT, Sample, sample_of, sample_of_text
from rotmole.models.adapter import check_adapter_folder
from rotmole.models.load import LoadedModel


@dataclass(frozen=True)
class Look:
    """What is looked at, and where the results go.

    Attributes:
        data: run file whose rows are read; None: the target's own, unless there is a text.
        text: shown token by token.
        file: UTF-8 text of passages; its first one is shown token by token.
        limit: tokens to look at, and as many to fit a static map on.
        layer: pattern of layers that are shown token by token besides the mean.
        figures: folder for the figures as files.
        output: folder for inspect.json and report.html; None: the run's or the adapter's, but no
            files for a text alone.
    """

    data: Path | None = None
    text: str | None = None
    file: Path | None = None
    limit: int = LIMIT
    layer: str | None = None
    figures: Path | None = None
    output: Path | None = None

    @property
    def is_text_alone(self) -> bool:
        """Whether no rows of a run are read."""
        return self.data is None and (self.text is not None or self.file is not None)


def inspect(
    targets: Sequence[Path], look: Look | None = None, *, trust_remote_code: bool = False
) -> int:
    """Inspect adapters one after the other; the first one's page shows the others beside it.

    Args:
        targets: of them. Those after the first one may be of any PEFT method: then only their
            losses are shown.
        look: what to look at.
        trust_remote_code: let transformers run code that came with the model.

    Raises:
        AdapterError: the first target has no RotMoLE adapter.
        ConfigError: there are no rows, or options contradict each other.
        DataError: the file is no UTF-8 text.
        StorageError: the disk refused.
    """
    look = Look() if look is None else look
    text = _text(look)
    places = [find_target(path, needs_data=False) for path in targets]
    _check(places[0])
    output = look.output or (None if look.is_text_alone else places[0].folder)
    for folder in filter(None, (output, look.figures)):
        check_writable(folder)
    inspections = [
        _inspected(place, look, text, trust_remote_code=trust_remote_code)
        if number == 0 or _is_mixture(place) else _losses(place)
        for number, place in enumerate(places)
    ]  # fmt: skip
    first, *others = inspections
    _show(first)
    for other in others:
        print(f"\n{other.source.target}")
        if other.layers:
            _show(other)
    _write(first, others, output, look.figures)
    return 0


def _text(look: Look) -> str | None:
    if look.file is None:
        if look.layer is not None and look.text is None:
            raise ConfigError(
                f"--layer {look.layer!r} says where a text is shown token by token; add --text or "
                "--file."
            )
        return look.text
    try:
        return look.file.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{look.file} cannot be read as UTF-8 text: {error}.") from error


def _is_mixture(place: Target) -> bool:
    if place.adapter is None:
        return False
    return check_adapter_folder(place.adapter).get("peft_type") == "ROTMOLE"


def _check(place: Target) -> None:
    if place.adapter is None:
        raise AdapterError(
            f"{place.folder} has no adapter yet, so there is nothing to inspect; train it first."
        )
    if not _is_mixture(place):
        kind = check_adapter_folder(place.adapter).get("peft_type")
        raise AdapterError(
            f"{place.adapter} is a {kind} adapter, which has no experts of rotmole; rotmole "
            "inspect takes RotMoLE's."
        )


def _run_of(place: Target, look: Look) -> RunFile | None:
    if look.data is not None:
        return load_run(look.data, data_problems=data_problems)
    if look.is_text_alone:
        return None
    if place.run is None:
        raise ConfigError(
            f"{place.folder} is not in a run folder, so there are no rows to look at; add "
            "--data RUN.yaml, --text or --file."
        )
    problems = data_problems(place.run.data)
    if problems:
        raise ConfigError("\n".join(problems))
    return place.run


def _inspected(
    place: Target, look: Look, text: str | None, *, trust_remote_code: bool
) -> Inspection:
    run = _run_of(place, look)
    loaded = load_target(place, say=note, trust_remote_code=trust_remote_code)
    sample = _sample(run, place, loaded, text, look)
    shown = None if text is None else text.strip("\n").split("\n\n")[0]
    with progress() as show:
        return inspect_adapter(
            loaded.model,
            loaded.tokenizer,
            sample,
            request=Request(shown, look.layer, answers=not look.is_text_alone),
            target=str(place.folder),
            curves=curves_of(place.folder),
            progress=show,
        )


def _sample(
    run: RunFile | None, place: Target, loaded: LoadedModel, text: str | None, look: Look
) -> Sample:
    if run is None:
        assert text is not None
        return sample_of_text(text, loaded.tokenizer, look.limit)
    splits = load_splits(run.data, seed=run.seed, tokenizer=loaded.tokenizer, date=place.date)
    return sample_of(run, splits, loaded.tokenizer, look.limit)


def _losses(place: Target) -> Inspection:
    """Return what can be said of an adapter of another method: the losses of its run."""
    curves = curves_of(place.folder)
    if not curves:
        warnings.warn(
            f"{place.folder} has no RotMoLE adapter and no metrics.jsonl, so it is left out",
            stacklevel=2,
        )
    settings: Mapping[str, Any] = {}
    if place.adapter is not None:
        settings = check_adapter_folder(place.adapter)
    method = {"method": str(settings["peft_type"])} if "peft_type" in settings else {}
    source = Source(str(place.folder), place.model.name, method, "", {}, curves=curves)
    return Inspection(source, (), ())


def _show(found: Inspection) -> None:
    """Print the verdict, then tables."""
    print_lines(summary.verdict_lines(found))
    counts = found.source.tokens
    of = f" of {len(counts)} tasks" if len(counts) > 1 else ""
    print(f"\n{sum(counts.values()):,} tokens{of}, {found.source.rows}")
    print_table(summary.modules(found))
    print_lines(summary.MODULE_NOTES)
    if found.static is not None:
        print()
        print_table(summary.static_lines(found.static))
        print_lines(summary.STATIC_NOTES)
    if found.answers:
        print()
        print_table(summary.answer_lines(found.answers))
    if found.passage is not None:
        tokens = found.passage.tokens
        print("\nweights and |angles|, averaged over layers")
        print_table(summary.token_lines(tokens, found.passage.mean))
        for path, routing in found.passage.layers.items():
            print(f"\nweights and angles in {path}")
            print_table(summary.token_lines(tokens, routing))
    print_lines(found.notes)


def _write(
    found: Inspection, others: Sequence[Inspection], output: Path | None, figures: Path | None
) -> None:
    if output is None:
        print("no files are written for a text alone; --output DIR writes them.")
    else:
        found.write(output)
        write_report(found, output, others)
        print(f"written: {output / FILE}, {output / PAGE}")
    if figures is not None:
        files = write_figures(found, figures, others)
        print(f"written: {len(files)} figures in {figures}")
