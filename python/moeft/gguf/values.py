"""Typed values of GGUF metadata, in the form in which the Rust core takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Value = dict[str, Any]
Metadata = list[tuple[str, Value]]


def uint32(value: int) -> Value:
    """A count, a size or an id."""
    return {"type": "uint32", "value": int(value)}


def float32(value: float) -> Value:
    """A number."""
    return {"type": "float32", "value": float(value)}


def flag(value: bool) -> Value:
    """A truth value."""
    return {"type": "bool", "value": bool(value)}


def string(value: str) -> Value:
    """A text."""
    return {"type": "string", "value": str(value)}


def array(kind: str, values: Sequence[Any]) -> Value:
    """Values of one type, ``"int32"``, ``"float32"``, ``"bool"`` or ``"string"``."""
    return {"type": "array", "value": {"type": kind, "value": list(values)}}
