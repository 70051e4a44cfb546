"""Register the method ROTMOLE with PEFT, which has no plug-ins: a member is added to its enum.

Tested with peft 0.19.1 to 0.21.2 and Python 3.10 to 3.13; pickle, deepcopy, JSON and
`PeftType("ROTMOLE")` behave as with PEFT's own members. With a subclass of str, or a plain string
in PEFT's mappings, parts of PEFT's test suite fail.
"""

from __future__ import annotations

from peft.utils.peft_types import PeftType, register_peft_method

from rotmole.errors import RotMoleError

NAME = "ROTMOLE"


def add_member() -> None:
    """Add the member ROTMOLE to PEFT's enum of methods; a second call does nothing.

    Raises:
        RotMoleError: PEFT itself ships a method of that name.
    """
    if NAME in PeftType.__members__:
        if getattr(PeftType[NAME], "added_by", None) == "rotmole":
            return
        raise RotMoleError(
            f"this version of peft has a method named {NAME} of its own; use that one, or install "
            "a version of rotmole that was made for this peft"
        )
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member.__objclass__ = PeftType  # as enum sets it on its members
    member._sort_order_ = len(PeftType)  # as enum sets it
    member.added_by = "rotmole"
    type.__setattr__(PeftType, NAME, member)  # EnumType forbids the plain form since Python 3.12
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    PeftType._member_names_.append(NAME)


def register() -> None:
    """Register configuration and model with PEFT; a second call does nothing."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from rotmole.tuner.config import RotMoleConfig
    from rotmole.tuner.model import RotMoleModel

    add_member()
    if PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[NAME]) is not RotMoleConfig:
        register_peft_method(
            name=NAME.lower(), config_cls=RotMoleConfig, model_cls=RotMoleModel, prefix="rotmole_"
        )
