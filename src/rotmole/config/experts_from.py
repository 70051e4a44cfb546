"""The `experts_from:` section: settings that trained adapters decide, and what contradicts them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rotmole.config.schema import ExpertsFromSection
from rotmole.errors import AdapterError

if TYPE_CHECKING:
    from rotmole.tuner.loras import Lora


@dataclass(frozen=True)
class Imported:
    """What a run file says of experts that were trained before.

    Attributes:
        decided: settings of the adapter that follow from them; empty if experts start anew.
        loras: the adapters that could be read.
        problems: one sentence each.
    """

    decided: dict[str, Any] = field(default_factory=dict)
    loras: list[Lora] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def imported_experts(section: ExpertsFromSection | None, adapter: Mapping[str, Any]) -> Imported:
    """Read the adapters of a run file, unless it says all that they decide.

    The run.yaml of a run folder does, so that a run can be resumed and evaluated without the
    adapters that it began with.

    Args:
        section: `experts_from:`; None if it is wrong, which is reported elsewhere.
        adapter: `adapter:` as parsed.
    """
    from rotmole.tuner.from_adapters import DECIDED, decided_settings
    from rotmole.tuner.loras import names_of, read_lora

    if section is None:
        return Imported()
    problems = _own_problems(section)
    if not section.paths or problems:
        return Imported(problems=problems)
    if all(name in adapter for name in DECIDED):
        decided = {name: adapter[name] for name in DECIDED}
        return Imported(decided, problems=_resolved_problems(section, adapter))
    problems += [
        f"adapter.{name} cannot be set here: the adapters of experts_from decide it"
        for name in DECIDED
        if name in adapter
    ]
    loras = []
    for path in section.paths:
        try:
            loras.append(read_lora(path))
        except AdapterError as error:
            problems.append(f"experts_from.paths: {error}")
    if len(loras) < len(section.paths):
        return Imported(loras=loras, problems=problems)
    names = section.names or names_of(section.paths)
    return Imported(decided_settings(loras, names, section.trainable), loras, problems)


def _own_problems(section: ExpertsFromSection) -> list[str]:
    """Check the section by itself."""
    if not section.paths:
        given = sorted(section.model_fields_set - {"paths"})
        needless = [name for name in given if getattr(section, name) != _DEFAULTS[name]]
        return [
            f"experts_from.{name} is {getattr(section, name)!r} but experts_from.paths is empty; "
            "name the adapters, or leave it out"
            for name in needless
        ]
    if section.names is not None and len(section.names) != len(section.paths):
        return [
            f"experts_from.names has {len(section.names)} names but experts_from.paths has "
            f"{len(section.paths)} adapters; give each adapter one name"
        ]
    return []


_DEFAULTS = {"names": None, "trainable": "gates"}


def _resolved_problems(section: ExpertsFromSection, adapter: Mapping[str, Any]) -> list[str]:
    """Check the section against settings that were decided before."""
    frozen = "AB" if section.trainable == "gates" else "none"
    wanted = {"num_experts": len(section.paths), "frozen": frozen}
    if section.names is not None:
        wanted["expert_names"] = section.names
    return [
        f"adapter.{name} is {adapter[name]!r}, but experts_from means {value!r}; leave out what "
        f"the adapters decide ({', '.join(adapter)})"
        for name, value in wanted.items()
        if adapter[name] != value
    ]
