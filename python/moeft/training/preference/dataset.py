"""Preference rows in any accepted form to encoded pairs, and whether a model has embeddings for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeft.data.pairs import EncodedPairs, encode_pairs
from moeft.data.preferences import PreferenceRows, read_preferences
from moeft.data.vocabulary import check_ids, check_vocabulary
from moeft.errors import DataError
from moeft.training.dpo_arguments import DPOConfig

Dataset = str | Path | Iterable[Mapping[str, Any]] | PreferenceRows | EncodedPairs


def encode_dataset(dataset: Dataset, tokenizer: Any, args: DPOConfig) -> EncodedPairs:
    """Encode rows, if they are not.

    Raises:
        DataError: If no pair can be used.
    """
    if isinstance(dataset, EncodedPairs):
        return dataset
    rows = dataset if isinstance(dataset, PreferenceRows) else read_preferences(dataset)
    options: dict[str, Any] = {
        "reasoning": args.reasoning,
        "max_length": args.max_length,
        "on_too_long": args.on_too_long,
    }
    return encode_pairs(rows, tokenizer, **options)


def check_encoded(encoded: EncodedPairs, tokenizer: Any, model: Any) -> None:
    """Refuse pairs that a model has no positions for, and pairs or a tokenizer with tokens that have no embedding.

    Raises:
        DataError: Naming one of them.
    """
    num_embeddings = model.get_input_embeddings().weight.shape[0]
    check_vocabulary(tokenizer, num_embeddings)
    for side in (encoded.pairs.chosen, encoded.pairs.rejected):
        check_ids(side, num_embeddings)
        _check_lengths(side.lengths, encoded.pairs.lines, model)


def _check_lengths(lengths: NDArray[np.int64], lines: NDArray[np.int64], model: Any) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = int(lengths.argmax())
    if positions is not None and lengths[longest] > positions:
        raise DataError(
            f"line {lines[longest]}: prompt and answer have {lengths[longest]} tokens, and the model has {positions} "
            f"positions; set max_length to at most {positions}"
        )
