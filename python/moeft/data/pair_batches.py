"""Batches of preference pairs: both answers of a pair always in one batch, and so in one forward pass.

Shapes: B pairs, S tokens of a row, M compared tokens of an answer.

There are three layouts of a pair:

* ``padded``: a row for each answer;
* ``packed``: both in one row, with positions that start anew, as in :mod:`moeft.data.packing`;
* ``shared_prefix``: the prompt once, then both answers, whose positions go on from it. What attends to what is given by
  ``segments``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from moeft.config.sources import PairLayout
from moeft.data.collate import document_lengths, filled
from moeft.data.example import IGNORE_INDEX, Example
from moeft.data.pairs import Pair

PREFIX, CHOSEN, REJECTED, PADDING = range(4)
"""Values of ``segments``."""
_Arrays = dict[str, NDArray[Any]]


class PairCollator:
    """Batches pairs; a ``data_collator`` for ``transformers.Trainer``.

    Args:
        pad_token_id: Id that fills ``input_ids``.
        layout: How the two answers of a pair lie.
        documents: Say where answers lie, to a model that takes it; a shared prefix belongs to two, and is not told.

    Raises:
        ValueError: If the layout is unknown.
    """

    def __init__(self, pad_token_id: int, layout: PairLayout, documents: bool = False) -> None:
        if layout not in get_args(PairLayout):
            raise ValueError(f"layout is {layout!r}, expected one of {', '.join(get_args(PairLayout))}")
        self.pad_token_id = pad_token_id
        self.layout = layout
        self.documents = documents and layout != "shared_prefix"

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        """Make a batch.

        Returns:
            ``input_ids`` and ``position_ids``, ``[B, S]``, or ``[B, 2, S]`` if padded, then with ``attention_mask``
            in place of positions; ``segments``, ``[B, S]``, if the prefix is shared. ``sources`` and ``targets``,
            ``[B, 2, M]``: place in a pair's tokens from which a compared token is predicted, and its id, -100 where
            there is none. ``reference``, ``[B, 2]`` float64, and ``rows``, ``[B]``: places in the data set. With
            documents, ``documents``: for each pair, the lengths of the documents of each of its rows.
        """
        import torch

        made = {"padded": _padded, "packed": _packed, "shared_prefix": _shared}[self.layout](pairs, self.pad_token_id)
        width = max(len(_targets(answer)) for pair in pairs for answer in _answers(pair))
        made["targets"] = np.full((len(pairs), 2, width), IGNORE_INDEX, np.int64)
        made["sources"] = np.zeros((len(pairs), 2, width), np.int64)
        row_tokens = made["input_ids"].shape[-1]
        for place, pair in enumerate(pairs):
            for index, answer in enumerate(_answers(pair)):
                targets = _targets(answer)
                made["targets"][place, index, : len(targets)] = answer["input_ids"][targets]
                made["sources"][place, index, : len(targets)] = self._sources(pair, index, targets, row_tokens)
        made["reference"] = np.stack([pair["reference"] for pair in pairs])
        made["rows"] = np.array([pair["row"] for pair in pairs])
        batch: dict[str, Any] = {name: torch.from_numpy(array) for name, array in made.items()}
        if self.documents:
            batch["documents"] = self._lengths(pairs, row_tokens)
        return batch

    def _lengths(self, pairs: Sequence[Pair], row_tokens: int) -> list[list[list[int]]]:
        answers = [[len(answer["input_ids"]) for answer in _answers(pair)] for pair in pairs]
        rows = [[[length] for length in pair] if self.layout == "padded" else [pair] for pair in answers]
        return [document_lengths(of_pair, row_tokens) for of_pair in rows]

    def _sources(self, pair: Pair, index: int, targets: NDArray[np.int64], row_tokens: int) -> NDArray[np.int64]:
        before = targets - 1
        if index == 0:
            return before
        if self.layout == "padded":
            return before + row_tokens
        num_chosen, shared = len(pair["chosen"]["input_ids"]), pair["num_shared"]
        if self.layout == "packed":
            return before + num_chosen
        return np.where(before < shared, before, before + num_chosen - shared)


def _answers(pair: Pair) -> tuple[Example, Example]:
    return pair["chosen"], pair["rejected"]


def _targets(example: Example) -> NDArray[np.int64]:
    """Places of the tokens that are compared; the first of a row is predicted from nothing."""
    return np.flatnonzero(example["labels"][1:] != IGNORE_INDEX) + 1


def _padded(pairs: Sequence[Pair], fill: int) -> _Arrays:
    rows = [answer["input_ids"] for pair in pairs for answer in _answers(pair)]
    ids = _filled(rows, fill)
    mask = _filled([np.ones(len(row), np.int64) for row in rows], 0)
    shape = (len(pairs), 2, ids.shape[1])
    return {"input_ids": ids.reshape(shape), "attention_mask": mask.reshape(shape)}


def _packed(pairs: Sequence[Pair], fill: int) -> _Arrays:
    positions = [np.concatenate([np.arange(len(answer["input_ids"])) for answer in _answers(pair)]) for pair in pairs]
    return {"input_ids": _filled([pair["input_ids"] for pair in pairs], fill), "position_ids": _filled(positions, 0)}


def _shared(pairs: Sequence[Pair], fill: int) -> _Arrays:
    ids, positions, segments = [], [], []
    for pair in pairs:
        shared, chosen, rejected = pair["num_shared"], pair["chosen"]["input_ids"], pair["rejected"]["input_ids"]
        ids.append(np.concatenate([chosen, rejected[shared:]]))
        positions.append(np.concatenate([np.arange(len(chosen)), np.arange(shared, len(rejected))]))
        counts = (shared, len(chosen) - shared, len(rejected) - shared)
        segments.append(np.repeat([PREFIX, CHOSEN, REJECTED], counts))
    return {
        "input_ids": _filled(ids, fill),
        "position_ids": _filled(positions, 0),
        "segments": _filled(segments, PADDING),
    }


def _filled(rows: Sequence[NDArray[Any]], value: int) -> NDArray[np.int64]:
    return filled(rows, max(map(len, rows)), value)
