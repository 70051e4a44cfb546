"""PEFT's own methods in the `adapter:` section: which may be trained here, and their settings."""

from __future__ import annotations

from typing import Any, get_type_hints

from rotmole.errors import one_of

OURS = "ROTMOLE"

_COUNTS_POSITIONS = (
    "it adds virtual tokens, and training and eval count the positions of a row's own tokens"
)
UNFIT: dict[str, str] = {
    "ADALORA": "it needs a call after every update and a loss of its own, which only a loop "
    "written for it has",
    "POLY": "it needs the number of the task with every batch; ROTMOLE with router_task_loss_coef "
    "learns which experts a task takes",
    "ADAMSS": "its size follows from the weights, so nothing about it is known before training",
    "FROD": "its size follows from the weights, so nothing about it is known before training",
    "XLORA": "it needs trained adapters, and its own forward pass ends in a KeyError (peft 0.21.2)",
    "SHIRA": "which weights it changes is drawn when it is put on a model with weights, so nothing "
    "about it is known before training",
    "SHADOW": "its auxiliary loss is computed by a loop written for it",
}
"""Methods that PEFT has and this trainer cannot train, with the reason."""


def peft_types() -> list[str]:
    """Return the values that adapter.peft_type may have, ours first."""
    return [OURS, *(name for name in _known() if name != OURS and not _unfit(name))]


def peft_type_problem(value: object) -> str:
    """Say why a value is no adapter.peft_type; the empty string if it is one."""
    if not isinstance(value, str) or value not in _known():
        return one_of("adapter.peft_type", value, peft_types())
    reason = _unfit(value)
    return f"adapter.peft_type: {value} cannot be trained here: {reason}" if reason else ""


def config_class(peft_type: str) -> type[Any]:
    """Return PEFT's configuration class of a method."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind: type[Any] = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(peft_type)]
    return kind


def field_hints(kind: type[Any]) -> dict[str, Any]:
    """Return the type of each field of a configuration class.

    Args:
        kind: a dataclass of PEFT.

    Returns:
        name -> type; Any where the class names a type that only type checkers import.
    """
    names = kind.__dataclass_fields__
    try:
        hints = get_type_hints(kind)
    except NameError:
        hints = {}
    return {name: hints.get(name, Any) for name in names}


def _known() -> dict[str, bool]:
    """Map each method that the installed PEFT has to whether it adapts layers."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    return {
        str(kind.value): issubclass(PEFT_TYPE_TO_TUNER_MAPPING.get(kind, object), BaseTuner)
        for kind in PEFT_TYPE_TO_CONFIG_MAPPING
    }


def _unfit(name: str) -> str:
    return UNFIT.get(name) or ("" if _known()[name] else _COUNTS_POSITIONS)
