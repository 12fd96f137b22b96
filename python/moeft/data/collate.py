"""Batches of encoded rows and of packs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moeft.data.example import IGNORE_INDEX, Example
from moeft.data.packing import Pack

if TYPE_CHECKING:
    from torch import Tensor


class PaddingCollator:
    """Pads examples on the right to the longest of the batch; a ``data_collator`` for ``transformers.Trainer``.

    Right padding keeps the positions of real tokens as they are without padding, and a causal model never looks at it.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int | None = None, documents: bool = False) -> None:
        """Set up the padding.

        Args:
            pad_token_id: Id that fills ``input_ids``.
            pad_to_multiple_of: Round the length up to a multiple of this.
            documents: Say where documents lie, to a model that takes it.

        Raises:
            ValueError: If ``pad_token_id`` is None, or ``pad_to_multiple_of`` is below 1.
        """
        if pad_token_id is None:
            raise ValueError("pad_token_id is None; set tokenizer.pad_token, often to the end-of-sequence token")
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of is {pad_to_multiple_of}, expected at least 1")
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of or 1
        self.documents = documents

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Make a batch.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels``, each ``[B, S]`` int64 for B examples padded to S tokens;
            padding has mask 0 and label -100. With documents, ``documents`` as :func:`document_lengths` gives them.
        """
        width = _width(examples, self.pad_to_multiple_of)
        batch: dict[str, Any] = {
            "input_ids": _padded([example["input_ids"] for example in examples], width, self.pad_token_id),
            "attention_mask": _padded([np.ones(len(example["input_ids"])) for example in examples], width, 0),
            "labels": _padded([example["labels"] for example in examples], width, IGNORE_INDEX),
        }
        if self.documents:
            batch["documents"] = document_lengths([[len(example["input_ids"])] for example in examples], width)
        return batch


class PackingCollator:
    """Batches packs; a ``data_collator`` for ``transformers.Trainer``.

    There is no attention mask: transformers derives from ``position_ids`` that start anew which tokens may see each
    other, for attention inside sliding windows too, and only when no mask is given.
    """

    def __init__(self, pad_token_id: int, flatten: bool = False, documents: bool = False) -> None:
        """Set up the batch.

        Args:
            pad_token_id: Id that fills ``input_ids``.
            flatten: Put all packs into one row without padding, as kernels for sequences of varied length want
                (flash attention tells examples apart in a batch of one only).
            documents: Say where documents lie, to a model that takes it.
        """
        self.pad_token_id = pad_token_id
        self.flatten = flatten
        self.documents = documents

    def __call__(self, packs: Sequence[Pack]) -> dict[str, Any]:
        """Make a batch.

        Returns:
            ``input_ids``, ``position_ids`` and ``labels``, each ``[B, S]`` int64 for B packs padded to S tokens, or
            ``[1, total]`` if flattened. Padding has label -100 and position 0: each such token is alone. With
            documents, ``documents`` as :func:`document_lengths` gives them.
        """
        if self.flatten:
            packs = [
                {
                    "input_ids": np.concatenate([pack["input_ids"] for pack in packs]),
                    "labels": np.concatenate([pack["labels"] for pack in packs]),
                    "position_ids": np.concatenate([pack["position_ids"] for pack in packs]),
                }
            ]
        width = _width(packs, 1)
        batch: dict[str, Any] = {
            "input_ids": _padded([pack["input_ids"] for pack in packs], width, self.pad_token_id),
            "position_ids": _padded([pack["position_ids"] for pack in packs], width, 0),
            "labels": _padded([pack["labels"] for pack in packs], width, IGNORE_INDEX),
        }
        if self.documents:
            batch["documents"] = document_lengths([_lengths(pack["position_ids"]) for pack in packs], width)
        return batch


def count_tokens(batch: dict[str, Any]) -> int:
    """Tokens of a batch of either collator, without padding. Waits for the device of the batch."""
    return int(number_of_tokens(batch))


def number_of_tokens(batch: dict[str, Any]) -> Tensor | int:
    """As :func:`count_tokens`, without waiting: a scalar on the device of the batch where values must be read."""
    if "attention_mask" in batch:
        return batch["attention_mask"].sum()
    if "position_ids" in batch:
        # An example has a target after its first token, so it has a position 1, and padding has not.
        return (batch["position_ids"] > 0).sum() + (batch["position_ids"] == 1).sum()
    return batch["input_ids"].numel()


def document_lengths(rows: Sequence[Sequence[int]], width: int) -> list[list[int]]:
    """Tokens of each document of each row, the padding of a row as one more; what a model takes as ``documents``.

    Lists of numbers stay on the host when a batch is moved to a device, which nobody then has to ask.
    """
    return [[*row, width - sum(row)] if sum(row) < width else list(row) for row in rows]


def _lengths(positions: NDArray[np.int32]) -> list[int]:
    """Tokens of each example of a pack."""
    return np.diff(np.flatnonzero(positions == 0), append=len(positions)).tolist()


def _width(rows: Sequence[Example] | Sequence[Pack], multiple: int) -> int:
    longest = max(len(row["input_ids"]) for row in rows)
    return -(-longest // multiple) * multiple


def _padded(rows: Sequence[NDArray[Any]], width: int, value: int) -> Tensor:
    import torch

    return torch.from_numpy(filled(rows, width, value))


def filled(rows: Sequence[NDArray[Any]], width: int, value: int) -> NDArray[np.int64]:
    """Rows of varied length as one array, ``[len(rows), width]``, with ``value`` behind each."""
    array = np.full((len(rows), width), value, np.int64)
    for index, row in enumerate(rows):
        array[index, : len(row)] = row
    return array
