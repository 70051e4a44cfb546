"""The `adapter:` section: RotMoleConfig's own names, and what a run file may not set and why."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_type_hints

from rotmole.config.fields import Suggest, check_fields, no_hint
from rotmole.errors import ConfigError, one_of

if TYPE_CHECKING:
    from rotmole.tuner.config import RotMoleConfig

REFUSED: dict[str, str] = {
    "peft_type": "it is always ROTMOLE",
    "task_type": "it is always CAUSAL_LM here",
    "base_model_name_or_path": "write model.name",
    "revision": "write model.revision",
    "auto_mapping": "PEFT fills it in",
    "peft_version": "PEFT fills it in",
    "inference_mode": "training needs it off",
    "format_version": "the library fills it in",
    "base_fingerprint": "the library fills it in",
}


def adapter_hints() -> dict[str, Any]:
    """Return the type of each key of the section."""
    from rotmole.tuner.config import RotMoleConfig

    names = RotMoleConfig.__dataclass_fields__
    hints = {name: hint for name, hint in get_type_hints(RotMoleConfig).items() if name in names}
    return {"preset": str} | hints


def check_adapter(
    values: Mapping[str, Any],
    suggest: Suggest = no_hint,
    decided: Mapping[str, Any] | None = None,
    *,
    starts: bool = False,
) -> tuple[dict[str, Any], RotMoleConfig | None, list[str]]:
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
    from rotmole.tuner.config import RotMoleConfig
    from rotmole.tuner.from_adapters import REFUSED as CHANGES_EXPERTS
    from rotmole.tuner.settings.presets import PRESETS, contradictions, preset_fields

    hints = adapter_hints()
    settings, problems = check_fields(values, hints, REFUSED, "adapter", suggest)
    settings |= decided or {}
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
    config = None
    try:
        with warnings.catch_warnings():
            if problems:  # notices of a file that is refused would only distract
                warnings.simplefilter("ignore")
            config = RotMoleConfig(task_type="CAUSAL_LM", **settings)
    except ConfigError as error:
        problems += [
            f"adapter{'.' if problem.partition(' is ')[0] in hints else ': '}{problem}"
            for problem in error.problems
        ]
    except (ValueError, TypeError) as error:  # PEFT's own rules
        problems.append(f"adapter: {' '.join(str(error).split())}")
    return settings, None if problems else config, problems
