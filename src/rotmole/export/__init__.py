"""Adapters for programs without rotmole: static LoRA, ONNX, model cards, uploads to a hub."""

from __future__ import annotations

from rotmole.export.static_lora import Share, StaticLayer, static_lora, total_share

__all__ = ["Share", "StaticLayer", "static_lora", "total_share"]
