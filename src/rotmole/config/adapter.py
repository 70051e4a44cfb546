"""The `adapter:` section: the names of the method's configuration, and what may not be set and why.

Without peft_type it is RotMoleConfig; with it, the configuration class of that method of PEFT.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rotmole.config.fields import Suggest, check_fields, no_hint
from rotmole.config.peft_types import OURS, config_class, field_hints, peft_type_problem
from rotmole.errors import ConfigError, one_of

if TYPE_CHECKING:
    from peft import PeftConfig

REFUSED: dict[str, str] = {
    "task_type": "it is always CAUSAL_LM here",
    "base_model_name_or_path": "write model.name",
    "revision": "write model.revision",
    "auto_mapping": "PEFT fills it in",
    "peft_version": "PEFT fills it in",
    "inference_mode": "training needs it off",
    "runtime_config": "it is no part of a saved adapter",
    "format_version": "the library fills it in",
    "base_fingerprint": "the library fills it in",
}


def adapter_hints(peft_type: str = OURS) -> dict[str, Any]:
    """Return the type of each key of the section.

    Args:
        peft_type: a method that `peft_type_problem` has nothing to say about.
    """
    hints = field_hints(config_class(peft_type)) | {"peft_type": str}
    return {"preset": str} | hints if peft_type == OURS else hints


def check_adapter(
    values: Mapping[str, Any],
    suggest: Suggest = no_hint,
    decided: Mapping[str, Any] | None = None,
    *,
    starts: bool = False,
) -> tuple[dict[str, Any], PeftConfig | None, list[str]]:
    """Check the section and make the adapter's configuration.

    Args:
        values: the section as parsed from YAML.
        suggest: as of `check_fields`.
        decided: settings that the adapters of experts_from decide; None or empty if there are none.
        starts: whether the weights are those of a saved adapter.

    Returns:
        The settings that passed, with the decided ones and the preset's filled in; the
        configuration made of them, None if a setting is wrong; and one sentence per problem.
    """
    peft_type = values.get("peft_type", OURS)
    if problem := peft_type_problem(peft_type):
        return {}, None, [problem]
    kind, hints = config_class(peft_type), adapter_hints(peft_type)
    settings, problems = check_fields(
        values, hints, REFUSED, "adapter", suggest, owner=f"PEFT's {kind.__name__}"
    )
    if peft_type == OURS:
        settings.pop("peft_type", None)
        settings, ours = _own_settings(
            settings | dict(decided or {}), decided=bool(decided), starts=starts
        )
        problems += ours
    elif decided:
        problems.append(
            f"adapter.peft_type is {peft_type}, and experts_from makes experts of ROTMOLE; drop one"
        )
    config = None
    given = {name: value for name, value in settings.items() if name != "peft_type"}
    try:
        with warnings.catch_warnings():
            if problems:  # notices of a file that is refused would only distract
                warnings.simplefilter("ignore")
            config = kind(task_type="CAUSAL_LM", **given)
    except ConfigError as error:
        problems += [
            f"adapter{'.' if problem.partition(' is ')[0] in hints else ': '}{problem}"
            for problem in error.problems
        ]
    except (ValueError, TypeError, ImportError) as error:  # PEFT's own rules
        problems.append(f"adapter: {' '.join(str(error).split())}")
    return settings, None if problems else config, problems


def _own_settings(
    settings: dict[str, Any], *, decided: bool, starts: bool
) -> tuple[dict[str, Any], list[str]]:
    """Fill in a preset of ours, and check what only our method has."""
    from rotmole.tuner.config import RotMoleConfig
    from rotmole.tuner.from_adapters import REFUSED as CHANGES_EXPERTS
    from rotmole.tuner.settings.presets import PRESETS, contradictions, preset_fields

    problems = []
    preset = settings.pop("preset", None)
    if preset in PRESETS:
        problems += [
            f"adapter.{name} is {settings[name]!r} but adapter.preset is {preset!r}, which means "
            f"{name}: {PRESETS[preset].fields[name]!r}; leave one of them out"
            for name in contradictions(preset, settings)
        ]
        settings = preset_fields(preset, settings)
    elif preset is not None:
        problems.append(one_of("adapter.preset", preset, PRESETS))
    if decided:
        problems += [
            f"adapter.{name} is {settings[name]!r}, which would change what the adapters of "
            "experts_from computed; leave it out"
            for name in sorted(CHANGES_EXPERTS)
            if settings.get(name)
            and settings[name] != RotMoleConfig.__dataclass_fields__[name].default
        ]
    elif settings.get("frozen") == "AB" and not starts and settings.get("init_weights") != "svd":
        problems.append(
            "adapter.frozen is 'AB', which keeps B at zero here, so nothing would be trained; it "
            "is for experts that were trained before (experts_from)"
        )
    return settings, problems
