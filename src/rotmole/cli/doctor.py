"""``rotmole doctor``: what is missing, the problems of an adapter, and the laws that it breaks."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement

from rotmole.cli.screen import note
from rotmole.config.schema import ModelSection
from rotmole.errors import AdapterError, ConfigError, InputError, one_of
from rotmole.evaluation.render import print_lines, print_table
from rotmole.evaluation.target import find_target
from rotmole.inspection.laws import Finding, Report, check_laws
from rotmole.models.adapter import CONFIG, check_adapter_folder, read_config
from rotmole.models.builtin import BUILT_IN, built_in_folder, built_in_named, cache_folder
from rotmole.models.load import load_model
from rotmole.models.precision import DTYPES
from rotmole.training.folder.layout import ADAPTER

USERS_EXTRAS = ("", "train", "demo", "quant", "eval", "onnx", "serve")
"""Extras of the package that a user may want, "" for what is always needed; others develop it."""

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HOME")


def doctor(adapter: Path | None = None) -> int:
    """Check the installation, and an adapter folder if one is given.

    Returns:
        0 if there are no problems, else 2.
    """
    problems = [*_packages(), *_registration()]
    _devices()
    problems += _cache()
    for name in OFFLINE:
        if name in os.environ:
            print(f"{name:<16}{os.environ[name]}")
    if adapter is not None:
        problems += _adapter(adapter)
    print()
    for problem in problems:
        print(f"problem: {problem}")
    if not problems:
        print("no problems found.")
    return 2 if problems else 0


def _packages() -> list[str]:
    print(f"{'python':<16}{platform.python_version():<14}{sys.executable}")
    problems = []
    shown: set[str] = set()
    for extra, requirements in _requirements().items():
        missing = []
        for requirement in requirements:
            if requirement.name in shown:  # extras that build on others repeat their packages
                continue
            try:
                installed = version(requirement.name)
            except PackageNotFoundError:
                missing.append(requirement.name)
                continue
            shown.add(requirement.name)
            fits = requirement.specifier.contains(installed, prereleases=True)
            wanted = str(requirement.specifier) or "any"
            rule = wanted if fits else f"needs {wanted}"
            print(f"{requirement.name:<16}{installed:<13} {rule}")
            if not fits:
                problems.append(
                    f"{requirement.name} {installed} is outside {wanted}: "
                    f"pip install '{requirement.name}{wanted}'."
                )
        if missing and extra:
            print(f"{'extra ' + extra:<16}missing       {', '.join(missing)}")
            print(f"{'':<16}pip install 'rotmole[{extra}]'")
        elif missing:
            problems.append(f"required packages are missing: pip install {' '.join(missing)}.")
    return problems


def _requirements() -> dict[str, list[Requirement]]:
    """Return rotmole's requirements by extra; "" are those without an extra."""
    by_extra: dict[str, list[Requirement]] = {extra: [] for extra in USERS_EXTRAS}
    by_extra[""] = [Requirement("rotmole")]
    for line in requires("rotmole") or []:
        requirement = Requirement(line)
        extras = str(requirement.marker or "").split("extra == ")
        extra = extras[1].strip("\"' )") if len(extras) > 1 else ""
        if requirement.name != "rotmole" and extra in by_extra:
            by_extra[extra].append(requirement)
    return by_extra


def _registration() -> list[str]:
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    is_method = "ROTMOLE" in PeftType.__members__
    registered = is_method and PeftType("ROTMOLE") in PEFT_TYPE_TO_CONFIG_MAPPING
    print(f"{'PEFT method':<16}ROTMOLE is {'registered' if registered else 'missing'}")
    print(f"{'':<16}in your programs, write `import rotmole` before you load an adapter")
    if registered:
        return []
    return ["`import rotmole` did not register ROTMOLE with PEFT; install another version of peft."]


def _devices() -> None:
    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    mps = ["Apple MPS"] if torch.backends.mps.is_available() else []
    print(f"{'devices':<16}{', '.join([*cards, *mps, platform.processor() or 'cpu'])}")
    print(f"{'threads':<16}{torch.get_num_threads()} of {os.cpu_count()} cores")


def _cache() -> list[str]:
    folder = cache_folder()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        print(f"{'cache':<16}{folder} cannot be written")
        return [f"the cache {folder} cannot be written ({error.strerror}); set ROTMOLE_CACHE."]
    print(f"{'cache':<16}{folder}")
    for name, model in BUILT_IN.items():
        ready = "ready" if built_in_folder(model).is_dir() else "downloaded when first used"
        print(f"{'':<16}{name}: {ready}")
    return []


def _adapter(folder: Path) -> list[str]:
    print(f"{'adapter':<16}{folder}")
    try:
        with warnings.catch_warnings(record=True) as notices:
            warnings.simplefilter("always")
            config = check_adapter_folder(folder)
    except AdapterError as error:
        return [str(error)]
    for notice in notices:
        print(f"{'':<16}{notice.message}")
    base = str(config.get("base_model_name_or_path"))
    print(f"{'':<16}method {config['peft_type']}, base model {base}")
    if config["peft_type"] == "ROTMOLE":
        print(
            f"{'':<16}load it after `import rotmole`; without that line PEFT raises KeyError: "
            "'ROTMOLE'"
        )
    is_path = base.startswith(("/", ".", "~"))
    if is_path and not Path(base).expanduser().exists() and built_in_named(base) is None:
        return [
            f"the base model {base} named in {folder}/adapter_config.json is not on this machine; "
            "when you load the adapter, give the base model's folder on this machine or its hub id."
        ]
    return []


def laws(
    adapter: Path | None,
    *,
    base: str | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> int:
    """Measure which laws an adapter of any PEFT method keeps on its base model.

    Args:
        adapter: an adapter folder, or a run folder with an adapter.
        base: the base model; None takes the run's, or the one that the adapter names.
        dtype: number format of the base model.

    Returns:
        0 if all laws are kept, else 2.

    Raises:
        InputError: there is no such adapter, or it does not fit the base model.
    """
    if adapter is None:
        raise ConfigError("--laws needs an adapter; give its folder.")
    if dtype not in DTYPES:
        raise ConfigError(one_of("--dtype", dtype, DTYPES) + ".")
    folder, section = _with_base(adapter.expanduser(), base)
    section = section.model_copy(update={"dtype": dtype})
    kind = check_adapter_folder(folder)["peft_type"]
    report = check_laws(
        lambda: load_model(section, trust_remote_code=trust_remote_code, say=note).model,
        folder,
        say=note,
    )
    print(f"{'adapter':<16}{folder}")
    print(f"{'':<16}method {kind}, base model {section.name}, {dtype} on {report.device.type}")
    print(f"{'':<16}the adapter changes a logit by up to {report.effect:.2g} of the unit below")
    print()
    print_table([["law", "difference", "base alone", "tolerance", "verdict"],
                 *map(_line, report.findings)])  # fmt: skip
    print_lines(["difference: the largest change of a logit, in standard deviations of the logits"])
    print()
    problems = list(_broken(report))
    print_lines([f"problem: {problem}." for problem in problems] or ["all laws are kept."])
    return 2 if problems else 0


def _with_base(path: Path, base: str | None) -> tuple[Path, ModelSection]:
    """Return the folder of the adapter and the settings of its base model."""
    if base is None:
        if (path / CONFIG).is_file() and not read_config(path).get("base_model_name_or_path"):
            raise AdapterError(f"{path / CONFIG} does not name its base model; add --base MODEL.")
        target = find_target(path, needs_data=False)
        if target.adapter is None:
            raise InputError(f"{path} has no adapter yet; train it first.")
        return target.adapter, target.model
    is_run = not (path / CONFIG).is_file() and (path / ADAPTER / CONFIG).is_file()
    return (path / ADAPTER if is_run else path), ModelSection(name=base)


def _line(finding: Finding) -> list[str]:
    figures = [finding.difference, finding.base, finding.tolerance]
    verdict = "kept" if finding.kept else "error" if finding.error else "BROKEN"
    shown = ["-" if value is None else f"{value:.0e}" if value else "0" for value in figures]
    return [finding.law.name, *shown, verdict]


def _broken(report: Report) -> Iterator[str]:
    """Yield a sentence for each law that is broken, and for each error once."""
    errors: dict[str, list[str]] = {}
    for finding in report.findings:
        if finding.error:
            errors.setdefault(finding.error, []).append(finding.law.name)
        elif not finding.kept:
            yield f"{finding.law.name}: {finding.law.broken}"
    for error, names in errors.items():
        yield f"{', '.join(names)}: the model ended in an error ({error})"
    if not report.seen and not errors:
        yield (
            "the adapter does not change the output on these rows, so no fault of it could be "
            "seen; test it after training"
        )
