"""What the locale tasks ask: for each kind its values, its prompt and its answer by Babel.

A kind is a prompt, its languages and two functions. `draw(rng)` draws one value as text, the same
for all languages; `ask(value, language)` returns the question and the answer, or None if the
libraries give no correct answer in that language (the item is then left out).
"""

from __future__ import annotations

import datetime
import random
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from typing import Literal, NamedTuple

# Languages whose CLDR data Babel renders without right-to-left marks or other digits.
LANGUAGES = (
    "de", "fr", "es", "it", "pt", "ca", "ro", "nl", "sv", "nb", "da", "pl", "cs", "ru", "uk",
    "el", "fi", "hu", "tr", "id", "ja", "ko", "zh",
)  # fmt: skip

# num2words languages whose words for 0..9999 were reviewed. Left out for wrong spelling:
# da ("ettusinde og et"), sv ("etttusen"), tr ("yüzbir" as one word), cs ("dvěstě" as one word),
# hu (102 "százkét"), nl ("honderdéén", no space after "duizend"), no ("en hundre" for "ett
# hundre"), vi ("hai nghìn lẻ hai mươi hai"), lv ("simtu viens"), sl and is (genders mixed),
# en ("one thousand, two hundred and", while CLDR has American English), uk (ASCII apostrophe,
# while CLDR has U+2019). num2words has no el and no zh.
NUMBER_LANGUAGES = (
    "de", "fr", "es", "it", "pt", "ca", "ro", "pl", "ru", "fi", "id", "ja", "ko",
)  # fmt: skip

UNITS = (
    "length-centimeter", "length-meter", "length-kilometer", "mass-gram", "mass-kilogram",
    "mass-tonne", "volume-milliliter", "volume-liter", "volume-cubic-meter", "area-square-meter",
    "area-square-kilometer", "duration-second", "duration-minute", "duration-hour",
    "duration-day", "duration-week", "duration-month", "duration-year",
    "speed-kilometer-per-hour", "speed-meter-per-second", "temperature-celsius",
    "energy-kilowatt-hour", "power-watt", "power-kilowatt", "electric-volt", "digital-megabyte",
)  # fmt: skip

# Only currencies with two decimals, so that every amount is written with two.
CURRENCIES = (
    "USD", "EUR", "GBP", "CHF", "CAD", "AUD", "NZD", "SEK", "NOK", "DKK", "PLN", "CZK", "RON",
    "TRY", "INR", "BRL", "MXN", "CNY", "ZAR", "UAH",
)  # fmt: skip

# Words that are spelled as in English; they are correct and no fallback to English.
COGNATES = {
    ("fr", "EUR"), ("es", "EUR"), ("pt", "EUR"), ("ca", "EUR"), ("fr", "duration-minute"),
}  # fmt: skip

# No name begins with a vowel or h, because Spanish "y" and "o" change before some of them, which
# Babel does not do.
NAMES = (
    "Ben", "Bruno", "Carla", "Clara", "David", "Dora", "Felix", "Frida", "Greta", "Jan", "Karl",
    "Laura", "Lena", "Marta", "Max", "Nina", "Nora", "Paul", "Petra", "Robert", "Rosa", "Simon",
    "Tom", "Vera", "Walter",
)  # fmt: skip


class Item(NamedTuple):
    """A question and its only correct answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Kind:
    """One kind of locale task.

    Attributes:
        prompt: one line with {question} and {language}; ends in "->" and a space.
        languages: codes of the languages in which it can be asked.
        draw: random generator -> a value as text.
        ask: (value, language) -> Item, or None if the item must be left out.
    """

    prompt: str
    languages: tuple[str, ...]
    draw: Callable[[random.Random], str]
    ask: Callable[[str, str], Item | None]


def clean(text: str) -> str:
    """Return the text in NFC with no-break spaces (U+00A0, U+202F) replaced by spaces."""
    plain = text.replace("\u00a0", " ").replace("\u202f", " ")
    return unicodedata.normalize("NFC", plain)


def words_of(text: str) -> str:
    """Return the text without its number, in lower case.

    >>> words_of("856,7 Tage")
    'tage'
    """
    return " ".join(re.sub(r"[\d.,]+", " ", text).casefold().split())


def fell_back(answer: str, keys: tuple[str, ...], english: str) -> bool:
    """Return whether an answer has no words, English words, or a key of the library for words.

    >>> fell_back("856,7 duration-day", ("duration-day",), "856.7 days")
    True
    """
    words = words_of(answer)
    return not words or words in {key.casefold() for key in keys} or words == words_of(english)


def _draw_unit(rng: random.Random) -> str:
    whole = rng.random() < 0.5
    number = str(rng.randint(2, 999)) if whole else f"{rng.randint(0, 999)}.{rng.randint(1, 9)}"
    return f"{number} {rng.choice(UNITS)}"


def _ask_unit(value: str, language: str) -> Item | None:
    from babel.units import format_unit

    text, unit = value.split(" ")
    number = Decimal(text)
    english = clean(format_unit(number, unit, "long", locale="en"))
    answer = clean(format_unit(number, unit, "long", locale=language))
    if (language, unit) not in COGNATES and fell_back(answer, (unit,), english):
        return None
    return Item(english, answer)


def _draw_amount(rng: random.Random) -> str:
    # below 1000, because Babel ignores CLDR's rule that some languages do not group four digits
    return f"{rng.randint(0, 999)}.{rng.randint(1, 99):02d} {rng.choice(CURRENCIES)}"


def _ask_amount(value: str, language: str) -> Item | None:
    from babel.numbers import format_currency

    text, currency = value.split(" ")
    number = Decimal(text)
    english = clean(format_currency(number, currency, locale="en", format_type="name"))
    answer = clean(format_currency(number, currency, locale=language, format_type="name"))
    if (language, currency) not in COGNATES and fell_back(answer, (currency,), english):
        return None
    return Item(value, answer)


def _draw_date(rng: random.Random) -> str:
    first = datetime.date(1900, 1, 1)
    return (first + datetime.timedelta(days=rng.randrange(73_049))).isoformat()


def _ask_date(value: str, language: str) -> Item | None:
    from babel.dates import format_date

    if _english_months(language):
        return None
    date = datetime.date.fromisoformat(value)
    return Item(value, clean(format_date(date, "long", locale=language)))


@lru_cache(maxsize=64)
def _english_months(language: str) -> bool:
    """Return whether Babel has English months for a language; some names, as April, may agree."""
    from babel.dates import get_month_names

    names = get_month_names("wide", "format", language)
    english = get_month_names("wide", "format", "en")
    same = [month for month in range(1, 13) if names[month] == english[month]]
    return len(same) > 6


def _draw_time(rng: random.Random) -> str:
    return f"{rng.randrange(24):02d}:{rng.randrange(60):02d}:{rng.randrange(60):02d}"


def _ask_time(value: str, language: str) -> Item | None:
    """Ask with the twelve-hour clock, so that a 24-hour answer is more than a copy."""
    from babel.dates import format_time

    time = datetime.time.fromisoformat(value)
    english = clean(format_time(time, "medium", locale="en"))
    answer = clean(format_time(time, "medium", locale=language))
    if re.search(r"\b[ap]m\b", answer, re.IGNORECASE):
        return None  # English day periods, as in Korean
    return Item(english, answer)


def _draw_percent(rng: random.Random) -> str:
    return f"{rng.randint(0, 999)}.{rng.randint(1, 9)}"


def _ask_percent(value: str, language: str) -> Item | None:
    from babel.numbers import format_percent

    number = Decimal(value) / 100
    answer = clean(format_percent(number, locale=language, decimal_quantization=False))
    return Item(f"{value}%", answer)


def _draw_list(rng: random.Random) -> str:
    names = rng.sample(NAMES, rng.randint(2, 4))
    return f"{rng.choice(('and', 'or'))}: {', '.join(names)}"


def _ask_list(value: str, language: str) -> Item | None:
    from babel.lists import format_list

    word, names = value.split(": ")
    style: Literal["standard", "or"] = "standard" if word == "and" else "or"
    return Item(value, clean(format_list(names.split(", "), style, locale=language)))


def _draw_number(rng: random.Random) -> str:
    return str(rng.randrange(10_000))


def _ask_number(value: str, language: str) -> Item | None:
    from num2words import num2words

    number = int(value)
    words = clean(num2words(number, lang=language))
    if language == "it" and number > 3 and words.endswith("tre"):
        return None  # num2words drops the accent of "centoventitré"
    if language == "pt" and number % 100 in (16, 17, 19):
        return None  # European words; all other tasks are in Brazilian Portuguese
    return Item(value, words)


KINDS: dict[str, Kind] = {
    "units": Kind("Unit in {language}: {question} -> ", LANGUAGES, _draw_unit, _ask_unit),
    "currency": Kind("Money in {language}: {question} -> ", LANGUAGES, _draw_amount, _ask_amount),
    "dates": Kind("Date in {language}: {question} -> ", LANGUAGES, _draw_date, _ask_date),
    "times": Kind(
        "Time in {language}: {question} -> ",
        tuple(language for language in LANGUAGES if language != "ko"),
        _draw_time,
        _ask_time,
    ),
    "percents": Kind(
        "Percent in {language}: {question} -> ", LANGUAGES, _draw_percent, _ask_percent
    ),
    "lists": Kind("List in {language}, {question} -> ", LANGUAGES, _draw_list, _ask_list),
    "numbers": Kind(
        "Words in {language}: {question} -> ", NUMBER_LANGUAGES, _draw_number, _ask_number
    ),
}
