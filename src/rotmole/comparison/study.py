"""Read a study file, and report every mistake at once; a study knows the run file of each cell."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rotmole.comparison.equal import (
    Counter,
    Sized,
    equal_parameters,
    equal_rank,
    plain_size,
    size_in,
)
from rotmole.comparison.grid import (
    GATES,
    SCALE,
    grid_problems,
    has_no_gates,
    in_trial,
    resized,
    trials,
)
from rotmole.comparison.results import NLL
from rotmole.comparison.study_file import StudyFile
from rotmole.config.adapter import adapter_hints
from rotmole.config.load import lay_over, load_run, read_text
from rotmole.config.paths import anchor_paths
from rotmole.config.peft_types import OURS, peft_type_problem
from rotmole.config.problems import sentences
from rotmole.config.schema import METRICS, ModelSection, RunFile
from rotmole.config.yaml_text import parse_yaml, write_yaml
from rotmole.data import data_problems
from rotmole.errors import ConfigError, one_of
from rotmole.models.preview import adapter_problems

Notice = tuple[str, type[Warning]]
_SECTIONS = ("model", "data", "training", "optimizer", "evaluation", "adapter")
_FIXED = {
    "output_dir": "the cells' folders lie in the study's",
    "seed": "write seeds in the study file",
}


@dataclass
class Study:
    """A checked study.

    Attributes:
        file: the study file with every default.
        where: its path, for messages.
        sized: method -> its adapter, the size decided.
        trust_remote_code: let transformers run code that came with the model.
    """

    file: StudyFile
    where: str
    sized: dict[str, Sized] = field(default_factory=dict)
    trust_remote_code: bool = False

    @property
    def folder(self) -> Path:
        """The study's folder."""
        return Path(self.file.output_dir)

    @property
    def model(self) -> ModelSection:
        """The `model:` section of base."""
        return ModelSection.model_validate(self.file.base.get("model") or {})

    def run_of(
        self,
        method: str,
        *,
        seed: int = 0,
        settings: Mapping[str, Any] | None = None,
        folder: str | Path | None = None,
        machine: Mapping[str, Any] | None = None,
        check: bool = False,
        held_out: bool = False,
    ) -> RunFile:
        """Make the run of one cell.

        Args:
            method: a name of the study file.
            seed: of the run.
            settings: of the tuning grid: full name -> value.
            folder: the run folder; None is one below the study's.
            machine: model.dtype and model.device, as they were resolved for the study.
            check: look at the data's files and at the fit of the adapter as well.
            held_out: the same with the tasks that no cell trains on in place of base's.

        Raises:
            ConfigError: settings are wrong.
        """
        raw = self._raw(method, settings or {})
        raw |= {"output_dir": str(folder or self.folder / method), "seed": seed}
        raw["model"] = {**(raw.get("model") or {}), **(machine or {})}
        raw["evaluation"] = {**(raw.get("evaluation") or {}), "split": self.file.split}
        if held_out:
            raw["data"] = {**(raw.get("data") or {}), "tasks": copy.deepcopy(self.file.held_out)}
        fits = partial(adapter_problems, trust_remote_code=self.trust_remote_code)
        with warnings.catch_warnings():
            if not check:  # shown once, when the study was read
                warnings.simplefilter("ignore")
            return load_run(
                None,
                text=write_yaml(raw),
                data_problems=data_problems if check else None,
                model_problems=fits if check else None,
            )

    def _raw(self, method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        raw = copy.deepcopy(self.file.base)
        section = self.file.methods[method]
        sized = self.sized.get(method)
        adapter = self.adapter_of(method) if sized is None else dict(sized.adapter)
        for name in ("training", "optimizer"):
            own = getattr(section, name)
            if own:
                raw[name] = {**(raw.get(name) or {}), **own}
        for key, value in settings.items():
            place, _, name = key.partition(".")
            rates_nothing = key in GATES and has_no_gates(adapter, key)
            if key != SCALE and place != "adapter" and not rates_nothing:
                raw[place] = {**(raw.get(place) or {}), name: value}
        raw["adapter"] = in_trial(adapter, settings)
        return raw

    def written(self, method: str) -> dict[str, Any]:
        """Return what the study file says of a method: full name -> value."""
        section = self.file.methods[method]
        places = {name: getattr(section, name) for name in ("adapter", "training", "optimizer")}
        return {f"{place}.{name}": v for place, own in places.items() for name, v in own.items()}

    def adapter_of(self, method: str) -> dict[str, Any]:
        """Return the settings of a method's adapter: the common ones, and its own over them."""
        own = self.file.methods[method].adapter
        kind = own.get("peft_type", OURS)
        if peft_type_problem(kind):
            return dict(own)
        base, known = self.file.base.get("adapter") or {}, adapter_hints(kind)
        common = {k: base[k] for k in self.file.common if k in base and k in known}
        return common | own


def load_study(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    output: str | Path | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] | None = None,
) -> Study:
    """Read and check a study file, and decide the sizes of its methods.

    Relative paths are relative to the study file's folder, those of a base that is a path to that
    file's. An override of a section of the run file, such as ``model.name=X``, is base's.

    Args:
        path: the YAML file.
        overrides: ``a.b=c`` settings that replace the file's.
        output: replaces output_dir.
        trust_remote_code: let transformers run code that came with the model.
        say: told before slow steps.

    Raises:
        ConfigError: holding one sentence for each wrong setting.
    """
    where = str(path)
    raw = parse_yaml(read_text(path), where) or {}
    if not isinstance(raw, dict):
        raise ConfigError("a study file is a mapping of settings, such as `methods: ...`", where)
    problems = _inline_base(raw, Path(path).expanduser().parent)
    problems += lay_over(raw, [_placed(entry) for entry in overrides])
    if output is not None:
        raw["output_dir"] = str(output)
    try:
        file = StudyFile.model_validate(raw)
    except ValidationError as error:
        problems += sentences(error.errors(), raw, StudyFile, suggest=_place_of)
        raise ConfigError([problem.rstrip(".") for problem in problems], where) from None
    study = Study(file, where, trust_remote_code=trust_remote_code)
    if (file.base.get("experts_from") or {}).get("paths"):
        problems.append(
            "base.experts_from: the methods of a study start anew; leave it out, and compare such "
            "runs by rotmole eval."
        )
    problems += _rules(file) + _method_problems(study) + _held_out_problems(study)
    if not problems:
        if say is not None:
            say("counting parameters")
        problems += decide_sizes(study)
    if not problems:
        problems += _grid_problems(study)
    if problems:
        raise ConfigError([problem.rstrip(".") for problem in problems], where)
    return study


def is_study(path: str | Path) -> bool:
    """Tell whether a YAML file is a study file, by its key `methods`."""
    try:
        raw = parse_yaml(read_text(path), str(path))
    except ConfigError:
        return False
    return isinstance(raw, dict) and "methods" in raw


def _inline_base(raw: dict[str, Any], folder: Path) -> list[str]:
    """Put the content of base in its place, with the paths that it has; drop what cells replace."""
    if isinstance(raw.get("output_dir"), str):
        anchor_paths(raw, folder)
    base = raw.get("base")
    if isinstance(base, str):
        path = folder / Path(base).expanduser()
        content = parse_yaml(read_text(path), str(path)) or {}
        if not isinstance(content, dict):
            return [f"base: {base} is no run file."]
        for name in _FIXED:
            content.pop(name, None)
        anchor_paths(content, path.parent)
        raw["base"] = content
        return []
    if isinstance(base, dict):
        anchor_paths(base, folder)
        return [
            f"base.{name} cannot be set here: {_FIXED[name]}." for name in _FIXED if name in base
        ]
    return []


def _placed(entry: str) -> str:
    """Put an override of the run file under base."""
    section = entry.partition("=")[0].partition(".")[0].strip()
    return f"base.{entry}" if section in _SECTIONS else entry


def _place_of(key: str, section: str) -> str:
    """Suggest base for the sections of a run file."""
    return f"; did you mean 'base.{key}'?" if not section and key in _SECTIONS else ""


def _rules(file: StudyFile) -> list[str]:
    """Check what the schema cannot know."""
    problems = []
    if file.baseline not in file.methods:
        problems.append(one_of("baseline", file.baseline, file.methods))
    problems += [
        one_of("metrics", metric, [NLL, *METRICS])
        for metric in file.metrics
        if metric not in (NLL, *METRICS)
    ]
    problems += [
        one_of("common", name, adapter_hints())
        for name in file.common
        if name not in adapter_hints()
    ]
    if file.parameters is not None and file.equal != "parameters":
        problems.append(
            f"parameters: {file.parameters} is for equal: parameters, and equal is {file.equal}; "
            "leave one of them out."
        )
    if not file.seeds and file.tune is None:
        problems.append("seeds: there are none, and nothing is tuned; name at least one seed.")
    if file.tune is not None:
        both = sorted({*file.tune.seeds} & {*file.seeds})
        if both:
            problems.append(
                f"tune.seeds: {', '.join(map(str, both))} are final seeds too; tune on others, so "
                "that the final cells do not choose their own rates."
            )
        problems += grid_problems(file.tune.grid, file.methods)
    return problems


def _method_problems(study: Study) -> list[str]:
    """Check the run of each method; what is wrong in all of them is wrong in base."""
    faults: dict[str, list[str]] = {}
    notices: dict[str, set[Notice]] = {}
    for method in study.file.methods:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                study.run_of(method, check=True)
            except ConfigError as error:
                faults[method] = error.problems
            else:
                faults[method] = []
        notices[method] = {(str(warning.message), warning.category) for warning in caught}
    _repeat(notices)
    problems = []
    shared = [p for p in next(iter(faults.values())) if all(p in own for own in faults.values())]
    problems += [f"base.{p}" if p.partition(".")[0] in _SECTIONS else f"base: {p}" for p in shared]
    for method, own in faults.items():
        problems += [f"methods.{method}.{p}" for p in own if p not in shared]
    return problems


def _held_out_problems(study: Study) -> list[str]:
    """Check the tasks that no cell trains on."""
    names, tasks = study.file.held_out, (study.file.base.get("data") or {}).get("tasks") or {}
    problems = [
        f"held_out.{name}: base trains on a task of that name; give it another name."
        for name in names
        if name in tasks
    ]
    if not names or problems:
        return problems
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            study.run_of(next(iter(study.file.methods)), check=True, held_out=True)
    except ConfigError as error:
        places = [p for p in error.problems if p.startswith("data.tasks.")]
        return [f"held_out.{p.removeprefix('data.tasks.')}" for p in places]
    return []


def _repeat(notices: Mapping[str, set[Notice]]) -> None:
    """Issue the warnings that all methods have once, and others with their methods' names."""
    shared = set.intersection(*notices.values())
    for text, category in dict.fromkeys(notice for own in notices.values() for notice in own):
        methods = [method for method, own in notices.items() if (text, category) in own]
        owner = "" if (text, category) in shared else f"methods {', '.join(methods)}: "
        warnings.warn(f"{owner}{text}", category, stacklevel=2)


def decide_sizes(study: Study) -> list[str]:
    """Decide the size of each method, and return one sentence for each that has none."""
    file, counter = study.file, Counter(study.model, study.trust_remote_code)
    adapters = {name: study.adapter_of(name) for name in file.methods}
    scale = file.scale if file.scale is not None else _base_scale(file.base.get("adapter") or {})
    problems = []
    plain = {}
    for name, adapter in adapters.items():
        try:
            plain[name] = plain_size(adapter, counter, scale)
        except ConfigError as error:
            if file.equal != "parameters" or (name == file.baseline and file.parameters is None):
                problems += [f"methods.{name}.{problem}" for problem in error.problems]
    if problems:
        return problems
    target = file.parameters
    if target is None and file.equal != "none":
        target = plain[file.baseline].parameters
    rank = 0
    if file.equal in ("rank", "active_rank"):
        rank = size_in(file.equal, adapters[file.baseline], counter)
    for name, adapter in adapters.items():
        try:
            sized = _size_of(study, name, adapter, plain, counter, scale, target, rank)
        except ConfigError as error:
            problems += [f"methods.{name}: {problem}" for problem in error.problems]
        else:
            study.sized[name] = dataclasses.replace(sized, target=target)
    return problems


def _size_of(
    study: Study,
    name: str,
    adapter: Mapping[str, Any],
    plain: Mapping[str, Sized],
    counter: Counter,
    scale: float | None,
    target: int | None,
    rank: int,
) -> Sized:
    file = study.file
    if file.equal == "none":
        return plain[name]
    if name == file.baseline and file.parameters is None:
        return dataclasses.replace(plain[name], equal=True)
    if file.equal == "parameters" and target is not None:
        return equal_parameters(adapter, counter, scale, target)
    return equal_rank(adapter, counter, scale, rank, active=file.equal == "active_rank")


def _base_scale(adapter: Mapping[str, Any]) -> float | None:
    """Return lora_alpha / r of base's adapter section; None if it does not say both."""
    rank, alpha = adapter.get("r"), adapter.get("lora_alpha")
    numbers = (int, float)
    if isinstance(rank, numbers) and isinstance(alpha, numbers) and rank:
        return alpha / rank
    return None


def _grid_problems(study: Study) -> list[str]:
    """Make a run with each trial of each method; none may change what is made equal."""
    file, counter = study.file, Counter(study.model, study.trust_remote_code)
    if file.tune is None:
        return []
    problems: dict[str, None] = {}
    for method in file.methods:
        for trial in trials(study.adapter_of(method), file.tune.grid):
            try:
                study.run_of(method, settings=trial)
                found = resized(study.sized[method].adapter, trial, file.equal, counter)
            except ConfigError as error:
                found = error.problems
            problems |= {f"tune.grid, method {method}: {p}": None for p in found}
    return list(problems)
