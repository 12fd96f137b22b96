"""How a byte-level BPE cuts a text into words before it merges, as the name that llama.cpp knows it by.

Source: llama.cpp, src/llama-vocab.cpp; every name stands for regular expressions that are compiled into it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moeft.errors import UnsupportedModelError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    rf"{_CONTRACTIONS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    rf"{_CONTRACTIONS}|\p{{N}}|{_REST}": "qwen2",
}
"""Regular expression of a ``Split`` -> name."""
# GPT-2's expression, which is inside of ByteLevel, under its name and those of models that llama.cpp lists apart.
GPT2 = ("gpt-2", "olmo")
GPT2_DIGITS = "smollm"


def pre_tokenizer(document: Mapping[str, Any], default: str, path: Path) -> str:
    """The name for a ``tokenizer.json``.

    Args:
        document: Its content.
        default: Name of the architecture, taken where the file says nothing about words.
        path: Where it lies, for messages.

    Raises:
        UnsupportedModelError: If it cuts in a way for which no name is known here.
    """
    parts = _parts(document.get("pre_tokenizer"))
    if not parts:
        return default
    *before, last = parts
    # Every name of llama.cpp cuts, and none puts a space in front.
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        name = _of_gpt2(before, default) if last.get("use_regex", True) else _of_split(before)
        if name is not None:
            return name
    raise UnsupportedModelError(
        f"{path} cuts texts by {document['pre_tokenizer']}, for which no pre-tokenizer of llama.cpp is known here: its "
        "texts would fall into other tokens; known are those of GPT-2, SmolLM, Llama 3 and Qwen 2 and 3"
    )


def _of_gpt2(before: Sequence[Mapping[str, Any]], default: str) -> str | None:
    """The name of what cuts by GPT-2's expression, behind other parts or none."""
    if not before:
        return default if default in GPT2 else GPT2[0]
    is_by_digit = [part.get("type") for part in before] == ["Digits"] and before[0].get("individual_digits")
    return GPT2_DIGITS if is_by_digit else None


def _of_split(before: Sequence[Mapping[str, Any]]) -> str | None:
    """The name of what cuts by an expression of its own."""
    if [part.get("type") for part in before] != ["Split"] or before[0].get("behavior") != "Isolated":
        return None
    pattern = before[0].get("pattern")
    expression = pattern.get("Regex") if isinstance(pattern, Mapping) else None
    return SPLITS.get(expression) if isinstance(expression, str) else None


def _parts(found: Any) -> list[Mapping[str, Any]]:
    if not isinstance(found, Mapping):
        return []
    inner = found.get("pretokenizers") if found.get("type") == "Sequence" else [found]
    return [part for part in inner if isinstance(part, Mapping)] if isinstance(inner, list) else []
