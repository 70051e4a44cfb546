"""Lets the tests import `evaluation_cases`, and shares its model and tokenizer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from evaluation_cases import make_model, make_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    """One tokenizer for all tests; nobody changes it."""
    return make_tokenizer()


@pytest.fixture
def model(tokenizer):
    """A fresh model per test."""
    return make_model(tokenizer)
