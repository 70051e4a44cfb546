"""CITATION.cff follows its format, and says the version that the package and its changes say.

citation-1.2.0.json is the schema of the Citation File Format 1.2.0 (CC-BY-4.0), as in cffconvert.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema_rs
import yaml

import rotmole

ROOT = Path(__file__).parents[2]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def test_it_follows_the_schema() -> None:
    schema = json.loads(Path(__file__).with_name("citation-1.2.0.json").read_text("utf-8"))
    validator = jsonschema_rs.validator_for(schema)
    assert not [str(error) for error in validator.iter_errors(CITATION)]


def test_one_version_in_all_places() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[?(\d+\.\d+\.\d+)", changes, re.MULTILINE)
    assert CITATION["version"] == rotmole.__version__
    assert not released or released[0] == rotmole.__version__
