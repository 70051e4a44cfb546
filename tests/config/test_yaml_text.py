from __future__ import annotations

from contextlib import suppress

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from rotmole.config.yaml_text import parse_yaml, write_yaml
from rotmole.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2E+3", 2000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-3", -3),
        ("010", "010"),
        ("0x1f", 31),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("12:30", "12:30"),
        ("2024-01-31", "2024-01-31"),
        ("'1e-4'", "1e-4"),
        ("1_000", "1_000"),
        ("", None),
    ],
)
def test_scalars_mean_what_they_look_like(text, value):
    parsed = parse_yaml(f"key: {text}", "x")["key"]
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3", "line 3, column 1: the key 'a' appears twice"),
        ("x: {r: 1, r: 2}", "the key 'r' appears twice"),
        ("a: [1, 2", "line 1"),
        ("a: !!python/object/apply:os.system [ls]", "constructor"),
        ("? [1]\n: 2", "plain word"),
        ("a: \x07", "not valid YAML"),
        ("\tb: 1", "not valid YAML"),
    ],
)
def test_mistakes_are_named_with_their_place(text, words):
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "run.yaml")
    assert words in str(caught.value)
    assert str(caught.value).startswith("run.yaml: not valid YAML")


def test_merge_keys_work():
    text = "a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  y: 3"
    assert parse_yaml(text, "x")["b"] == {"x": 1, "y": 3}


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=8,
)


# words that one version of YAML or another takes for a number, and the letters of such words
NUMBERS = st.from_regex(r"[-+]?[0-9]{0,3}\.?[0-9]{0,2}[eE_xo:]?[-+]?[0-9]{1,3}", fullmatch=True)


@given(value=PLAIN | NUMBERS | st.dictionaries(NUMBERS, NUMBERS, max_size=3))
@example("0E0")
@example("1234e56")  # a short git commit, as model.revision may be
def test_what_is_written_comes_back(value):
    parsed = parse_yaml(write_yaml(value), "x")
    assert parsed == value
    assert type(parsed) is type(value)


@given(value=PLAIN | NUMBERS)
@example("no")
@example("1_000")
@example("2024-01-31")
@example({"\x85": None})  # a line break, but to few readers
def test_other_readers_of_yaml_read_the_same(value):
    assert yaml.safe_load(write_yaml(value)) == value


@given(text=st.text(max_size=60))
def test_any_text_is_parsed_or_refused(text):
    with suppress(ConfigError):  # any other exception fails
        parse_yaml(text, "x")
