"""Comparing a generated text with the right one: exact match and ROUGE-L, in any script."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import Any

# Scripts written without spaces between words: there a character counts as a word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Myanmar, Khmer
    "\u3040-\u30ff\u31f0-\u31ff"  # Hiragana, Katakana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
)
_UNSPACED_CHARACTER = re.compile(f"([{_UNSPACED}])")


def normalize(text: str) -> str:
    """Unicode NFC, no-break spaces (U+00A0, U+202F) to a space, outer white space removed.

    Returns:
        The text as exact match compares it.
    """
    return unicodedata.normalize("NFC", text).replace("\u00a0", " ").replace("\u202f", " ").strip()


def exact_match(prediction: str, reference: str) -> bool:
    """Whether both texts are equal after `normalize`; case counts, nothing else is forgiven."""
    return normalize(prediction) == normalize(reference)


def words(text: str) -> list[str]:
    """Lower-cased words of any script, for ROUGE.

    A word is a run of letters, marks and digits. Chinese, Japanese, Thai, Lao, Khmer and Burmese
    put no space between words, so each of their characters is a word.

    Source: our choice; rouge-score's own tokenizer drops every letter outside a-z.
    """
    text = unicodedata.normalize("NFC", text).lower()
    text = _UNSPACED_CHARACTER.sub(r" \1 ", text)
    kept = (c if c.isspace() or unicodedata.category(c)[0] in "LMN" else " " for c in text)
    return "".join(kept).split()


class _Words:
    """The tokenizer object that rouge-score asks for."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


@lru_cache(maxsize=1)
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L F-measure over `words`, 0 .. 1, from rouge-score.

    Returns:
        The F-measure of the longest common subsequence.

    Source: Lin 2004, computed by the rouge-score package.
    """
    return float(_rouge_scorer().score(reference, prediction)["rougeL"].fmeasure)
