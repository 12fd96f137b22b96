"""Preference rows in any accepted form to encoded pairs that a model has embeddings for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moeft.data.pairs import EncodedPairs, encode_pairs
from moeft.data.preferences import PreferenceRows, read_preferences
from moeft.data.vocabulary import check_ids
from moeft.training.dpo_arguments import DPOConfig

Dataset = str | Path | Iterable[Mapping[str, Any]] | PreferenceRows | EncodedPairs


def encode_dataset(dataset: Dataset, tokenizer: Any, args: DPOConfig, num_embeddings: int) -> EncodedPairs:
    """Encode rows, if they are not, and check their ids.

    Raises:
        DataError: If no pair can be used, or the model has no embedding for a token.
    """
    if not isinstance(dataset, EncodedPairs):
        rows = dataset if isinstance(dataset, PreferenceRows) else read_preferences(dataset)
        options: dict[str, Any] = {
            "reasoning": args.reasoning,
            "max_length": args.max_length,
            "on_too_long": args.on_too_long,
        }
        dataset = encode_pairs(rows, tokenizer, **options)
    for side in (dataset.pairs.chosen, dataset.pairs.rejected):
        check_ids(side, num_embeddings)
    return dataset
