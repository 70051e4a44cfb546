from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotmole.evaluation.text import exact_match, normalize, rouge_l, words


@pytest.mark.parametrize(
    ("prediction", "reference", "same"),
    [
        ("2\u202f000\u00a0km", "2 000 km", True),
        ("e\u0301", "\u00e9", True),  # NFC
        ("  Haus\n", "Haus", True),
        ("haus", "Haus", False),
        ("Haus.", "Haus", False),
        ("2  000", "2 000", False),  # spaces inside are not merged
        ("2\u2009000", "2 000", False),  # other spaces stay what they are
        ("\ufb01x", "fix", False),  # NFC, not NFKC
    ],
)
def test_exact_match(prediction, reference, same):
    assert exact_match(prediction, reference) is same


@given(st.text())
def test_normalize_is_idempotent(text):
    assert normalize(normalize(text)) == normalize(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Straße, über-Köln!", ["straße", "über", "köln"]),
        ("Привет, мир", ["привет", "мир"]),
        ("水と火 abc", ["水", "と", "火", "abc"]),
        ("abc水1", ["abc", "水", "1"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),  # vowel signs are marks and stay inside words
        ("snake_case", ["snake", "case"]),
        ("", []),
    ],
)
def test_words_of_any_script(text, expected):
    assert words(text) == expected


def test_rouge_l_counts_letters_outside_ascii():
    assert rouge_l("Привет мир", "Привет мир") == 1.0
    assert rouge_l("水と火", "水火") == pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1))
    assert rouge_l("a b c d", "a c d e") == pytest.approx(0.75)
    assert rouge_l("", "a") == 0.0
