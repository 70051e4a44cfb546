"""Serving: OpenAI's interface to a base model and its adapters, by transformers' own server."""

from __future__ import annotations
