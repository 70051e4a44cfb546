from __future__ import annotations

import sys
import time
import unicodedata
from decimal import Decimal

import pytest
from babel import Locale

from rotmole.config.schema import DataSection, TaskSection
from rotmole.data import load_examples
from rotmole.data.locale import library_versions, locale_rows, split_of, values
from rotmole.data.locale_kinds import (
    CURRENCIES,
    KINDS,
    LANGUAGES,
    NUMBER_LANGUAGES,
    UNITS,
    clean,
    fell_back,
)
from rotmole.errors import ConfigError

DEMO = ["de", "fr", "es", "it", "pt"]


def section(kind: str, languages=None, limit=None) -> TaskSection:
    limits = {} if limit is None else {"train": limit, "validation": limit, "test": limit}
    return TaskSection(source="locale", kind=kind, languages=languages, limit=limits)


def ask(kind: str, value: str, language: str) -> str | None:
    item = KINDS[kind].ask(value, language)
    return item and item.answer


@pytest.fixture(scope="module")
def everything() -> dict:
    """(kind, split) -> rows in every language, several hundred a cell."""
    return {
        (kind, split): locale_rows(section(kind, limit=150), split, seed=0)
        for kind in KINDS
        for split in ("train", "validation", "test")
    }


@pytest.mark.parametrize(
    ("kind", "value", "language", "answer"),
    [
        ("units", "856.7 duration-day", "de", "856,7 Tage"),
        ("units", "3 mass-kilogram", "ru", "3 килограмма"),
        ("units", "0.5 duration-hour", "fr", "0,5 heure"),
        ("currency", "12.50 USD", "de", "12,50 US-Dollar"),
        ("currency", "12.50 EUR", "fr", "12,50 euros"),
        ("currency", "12.50 PLN", "pl", "12,50 złotego polskiego"),
        ("dates", "2024-03-05", "de", "5. März 2024"),
        ("dates", "2024-04-05", "de", "5. April 2024"),
        ("dates", "2024-03-05", "es", "5 de marzo de 2024"),
        ("dates", "2024-03-05", "ja", "2024年3月5日"),
        ("times", "14:05:09", "de", "14:05:09"),
        ("times", "00:05:09", "fi", "0.05.09"),
        ("percents", "12.5", "fr", "12,5 %"),
        ("percents", "12.5", "it", "12,5%"),
        ("percents", "12.5", "tr", "%12,5"),
        ("lists", "and: Ben, Clara, Max", "de", "Ben, Clara und Max"),
        ("lists", "or: Ben, Clara", "es", "Ben o Clara"),
        ("numbers", "1480", "de", "eintausendvierhundertachtzig"),
        ("numbers", "80", "fr", "quatre-vingts"),
    ],
)
def test_known_answers(kind, value, language, answer):
    assert ask(kind, value, language) == answer


def test_at_least_twelve_languages_for_every_kind():
    for kind in KINDS.values():
        assert len(kind.languages) >= 12
        assert set(DEMO) <= set(kind.languages) <= set(LANGUAGES)


def test_cells_are_equal_and_questions_have_one_answer(everything):
    answers: dict[str, str] = {}
    for (kind, _), rows in everything.items():
        cells = [row.columns["language"] for row in rows]
        sizes = {cells.count(language) for language in KINDS[kind].languages}
        assert sizes == {150}
        for row in rows:
            prompt, answer = row.columns["prompt"], row.columns["completion"]
            assert answers.setdefault(prompt, answer) == answer
            assert "\n" not in prompt
            assert prompt.endswith(" -> ")
    assert len(answers) > 60_000


def test_no_test_value_in_train_in_any_language(everything):
    for kind in KINDS:
        seen = {}
        for split in ("train", "validation", "test"):
            rows = everything[kind, split]
            seen[split] = {row.columns["value"] for row in rows}
            assert all(split_of(kind, value) == split for value in seen[split])
            assert seen[split] <= set(values(kind, split))
        assert not seen["train"] & seen["test"]
        assert not seen["train"] & seen["validation"]
        assert not seen["validation"] & seen["test"]
    pairs = {
        split: {
            (row.columns["prompt"], row.columns["completion"])
            for kind in KINDS
            for row in everything[kind, split]
        }
        for split in ("train", "test")
    }
    assert not pairs["train"] & pairs["test"]


def test_thousands_of_values_split_80_10_10():
    for kind in KINDS:
        sizes = [len(values(kind, split)) for split in ("train", "validation", "test")]
        assert sum(sizes) == 5000
        assert 3800 < sizes[0] < 4200
        assert 400 < sizes[1] < 600


def test_text_is_clean(everything):
    for rows in everything.values():
        for row in rows:
            for text in (row.columns["prompt"], row.columns["completion"]):
                assert "\u00a0" not in text
                assert "\u202f" not in text
                assert unicodedata.is_normalized("NFC", text)
                # no marks of direction, no soft hyphens
                assert not any(unicodedata.category(letter) == "Cf" for letter in text)
    assert clean("e\u0301 12,5\u202f%\u00a0") == "é 12,5 % "


def test_keys_and_english_are_left_out(everything):
    # Babel has no plural forms of these: it would write "856,7 duration-day"
    assert ask("units", "856.7 duration-day", "it") is None
    assert ask("units", "856.7 duration-hour", "nl") is None
    assert ask("units", "856.7 length-meter", "zh") is None
    assert ask("units", "856.7 digital-megabyte", "es") is None  # "megabytes"
    assert ask("units", "856.7 electric-volt", "fr") is None  # spelt alike: not worth the doubt
    assert ask("times", "14:05:09", "ko") is None  # "PM 2:05:09"
    assert fell_back("12,50 PLN", ("PLN",), "12.50 Polish zlotys")
    assert fell_back("12,50 Polish zlotys", ("PLN",), "12.50 Polish zlotys")
    assert not fell_back("12,50 złotego polskiego", ("PLN",), "12.50 Polish zlotys")
    for rows in everything.values():
        for row in rows:
            answer = row.columns["completion"]
            assert not any(key in answer for key in (*UNITS, *CURRENCIES, "duration-"))
            assert " AM" not in answer
            assert " PM" not in answer


def test_every_unit_comes_from_a_plural_form_of_the_language():
    for language in LANGUAGES:
        patterns = Locale.parse(language)._data["unit_patterns"]
        for unit in UNITS:
            for number in ("0.5", "2", "3", "5", "21", "101", "856.7"):
                if ask("units", f"{number} {unit}", language) is not None:
                    form = Locale.parse(language).plural_form(Decimal(number))
                    assert form in patterns[unit]["long"]


def test_every_currency_has_a_name_in_the_language():
    for language in LANGUAGES:
        names = Locale.parse(language).currencies
        english = Locale.parse("en").currencies
        for code in CURRENCIES:
            if ask("currency", f"12.50 {code}", language) is not None:
                assert names[code] != code
                assert names[code] != english[code] or code == "EUR"


def test_months_are_not_english():
    for language in LANGUAGES:
        assert "January" not in ask("dates", "2024-01-05", language)
        assert "Monday" not in ask("dates", "2024-03-04", language)


def test_number_words_with_faulty_orthography_are_left_out():
    assert not {"da", "sv", "tr", "cs", "hu", "nl", "no", "nb", "vi", "uk"} & set(NUMBER_LANGUAGES)
    for language in ("da", "sv", "tr"):
        with pytest.raises(ConfigError, match=f"'{language}' is not available for numbers"):
            locale_rows(section("numbers", [language]), "test", seed=0)
    assert ask("numbers", "223", "it") is None  # num2words writes "duecentoventitre"
    assert ask("numbers", "23", "it") == "ventitré"
    assert ask("numbers", "103", "it") == "centotré"
    assert ask("numbers", "116", "pt") is None  # dezasseis (Portugal), dezesseis (Brazil)
    for number in range(4, 10_000):
        words = ask("numbers", str(number), "it")
        assert words is None or not words.endswith("tre")


def test_same_seed_same_rows_and_limit_is_per_language():
    task = section("dates", DEMO, 7)
    rows = locale_rows(task, "train", seed=3)
    assert rows == locale_rows(task, "train", seed=3)
    assert rows != locale_rows(task, "train", seed=4)
    assert len(rows) == 35
    # a smaller limit takes the first of the same order
    fewer = locale_rows(section("dates", DEMO, 2), "train", seed=3)
    assert [row for row in rows if row.number <= 2] == fewer


def test_without_limit_cells_follow_the_smallest():
    rows = locale_rows(section("units", ["de", "zh"]), "test", seed=0)
    languages = [row.columns["language"] for row in rows]
    assert languages.count("de") == languages.count("zh") > 100


def test_demo_mixture_is_fast_and_rendered():
    tasks = {kind: section(kind, DEMO, 100) for kind in ("units", "currency", "dates", "numbers")}
    data = DataSection(tasks=tasks)
    begin = time.process_time()
    train = load_examples(data, "train", seed=0)
    test = load_examples(data, "test", seed=0)
    assert time.process_time() - begin < 3
    assert {task: len(rows) for task, rows in train.items()} == dict.fromkeys(tasks, 500)
    one = test["dates"][0]
    assert one.group in DEMO
    assert one.prompt.endswith("->")
    assert one.completion.startswith(" ")
    assert len({row.id for row in test["dates"]}) == 500


def test_own_wording():
    task = section("dates", ["de"], 1)
    task.prompt, task.completion = "{question}, auf {language_name}:\n", "{completion}."
    made = load_examples(DataSection(tasks={"d": task}), "test", seed=0)["d"][0]
    assert made.prompt.endswith(", auf German:\n")
    assert made.completion.endswith(".")


def test_unknown_kind_and_language_with_missing_library(monkeypatch):
    with pytest.raises(ConfigError, match=r"kind 'date' is not known.*did you mean 'dates'"):
        locale_rows(section("date"), "test", seed=0)
    with pytest.raises(ConfigError, match="languages is empty"):
        locale_rows(section("dates", []), "test", seed=0)
    monkeypatch.setitem(sys.modules, "babel", None)
    monkeypatch.setitem(sys.modules, "num2words", None)
    with pytest.raises(ConfigError, match=r'needs Babel.*pip install "rotmole\[demo\]"'):
        locale_rows(section("dates"), "test", seed=0)
    with pytest.raises(ConfigError, match="needs num2words"):
        locale_rows(section("numbers"), "test", seed=0)


def test_versions():
    assert set(library_versions()) == {"babel", "num2words"}
