"""PEFT knows the method after the import, and only once."""

from __future__ import annotations

import copy
import enum
import json
import pickle

import pytest
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

import rotmole
from rotmole.errors import RotMoleError
from rotmole.tuner import registration


def test_the_member_behaves_as_pefts_own() -> None:
    member = PeftType("ROTMOLE")
    assert isinstance(member, enum.Enum)
    assert member is PeftType.ROTMOLE
    assert member in PeftType
    assert member in list(PeftType)
    assert member == "ROTMOLE"
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member
    assert json.dumps({"type": member}) == '{"type": "ROTMOLE"}'
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is rotmole.RotMoleConfig


def test_registering_twice_changes_nothing() -> None:
    members = list(PeftType)
    registration.register()
    assert list(PeftType) == members


def test_a_peft_that_ships_the_method_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(PeftType.ROTMOLE, "added_by")
    with pytest.raises(RotMoleError, match="has a method named ROTMOLE of its own"):
        registration.add_member()


def test_the_public_names_are_the_documented_ones() -> None:
    assert sorted(rotmole.__all__) == rotmole.__all__
    assert all(hasattr(rotmole, name) for name in rotmole.__all__)
