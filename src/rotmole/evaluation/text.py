"""Comparing a generated text with the correct one: exact match and ROUGE-L, in any script."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import Any

# Scripts without spaces between words, in which each character counts as a word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Myanmar, Khmer
    "\u3040-\u30ff\u31f0-\u31ff"  # Hiragana, Katakana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
)
_UNSPACED_CHARACTER = re.compile(f"([{_UNSPACED}])")


def normalize(text: str) -> str:
    """Return the stripped text in NFC, with no-break spaces (U+00A0, U+202F) as spaces."""
    return unicodedata.normalize("NFC", text).replace("\u00a0", " ").replace("\u202f", " ").strip()


def exact_match(prediction: str, reference: str) -> bool:
    """Return whether both texts are equal after `normalize`; upper and lower case differ."""
    return normalize(prediction) == normalize(reference)


def words(text: str) -> list[str]:
    """Return the lower-case words of a text in any script, for ROUGE.

    A word is a sequence of letters, marks and digits. Chinese, Japanese, Thai, Lao, Khmer and
    Burmese have no spaces between words, so each of their characters is a word. rouge-score's
    own tokenizer drops all letters except a-z.
    """
    text = unicodedata.normalize("NFC", text).lower()
    text = _UNSPACED_CHARACTER.sub(r" \1 ", text)
    spaced = (c if unicodedata.category(c)[0] in "LMN" else " " for c in text)
    return "".join(spaced).split()


class _Words:
    """The tokenizer object that rouge-score asks for."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


@lru_cache(maxsize=1)
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())


def rouge_l(prediction: str, reference: str) -> float:
    """Return the F-measure of ROUGE-L over `words`, 0 .. 1.

    Source: Lin 2004, computed by the rouge-score package.
    """
    return float(_rouge_scorer().score(reference, prediction)["rougeL"].fmeasure)
