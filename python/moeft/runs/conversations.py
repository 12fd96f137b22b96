"""Figures of long conversations for the report of a run: perplexity by turn, and recall of early facts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from moeft.config import SftRecipe
from moeft.data.rows import Row, read_rows


class Conversations:
    """Measures what ``evaluation.turn_perplexity`` and ``evaluation.recall`` ask for.

    Args:
        recipe: The recipe.
        show: Where to print what is found.

    Raises:
        DataError: If a file cannot be read.
    """

    def __init__(self, recipe: SftRecipe, show: Callable[[str], None]) -> None:
        self._settings = recipe.evaluation
        self._max_length = recipe.data.max_length
        self._show = show
        self._turns: list[Row] = []
        self._filler: list[Row] = []
        if self._settings.turn_perplexity is not None:
            self._turns = read_rows(self._settings.turn_perplexity, turns="trim").rows
        if self._settings.recall is not None:
            self._filler = read_rows(self._settings.recall.filler, turns="trim").rows

    def measure(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        """``turns`` and ``recall`` as lists in plain JSON types, each only if asked for.

        Raises:
            DataError: If no conversation fits ``data.max_length``, or too few exchanges can stand between.
        """
        figures: dict[str, Any] = {}
        if self._settings.turn_perplexity is not None:
            figures["turns"] = self._perplexity(model, tokenizer)
        if self._settings.recall is not None:
            figures["recall"] = self._recall(model, tokenizer)
        return figures

    def _perplexity(self, model: Any, tokenizer: Any) -> list[dict[str, Any]]:
        from moeft.evaluation.conversation import conversation_perplexity

        rows = self._fitting(tokenizer)
        found = conversation_perplexity(model, tokenizer, rows, batch_size=self._settings.batch_size)
        self._show(f"perplexity by turn, {len(rows)} of {len(self._turns)} conversations fit data.max_length:")
        for turn in found:
            self._show(f"  turn {turn.turn}: {turn.perplexity} over {turn.perplexity.num} conversations")
        return [asdict(turn) for turn in found]

    def _fitting(self, tokenizer: Any) -> Sequence[Row]:
        from moeft.data.chat import encode

        encoded = encode(self._turns, tokenizer, max_length=self._max_length)
        left_out = {reject.line for reject in encoded.rejects}
        return [row for row in self._turns if row.line not in left_out]

    def _recall(self, model: Any, tokenizer: Any) -> list[dict[str, Any]]:
        from moeft.evaluation.recall import recall

        settings = self._settings.recall
        assert settings is not None
        found = recall(
            model,
            tokenizer,
            self._filler,
            distances=settings.distances,
            max_new_tokens=settings.max_new_tokens,
            batch_size=self._settings.batch_size,
        )
        for at in found:
            self._show(f"recall after {at.distance} exchanges: {at.accuracy}, by chance {at.chance:.2g}")
        return [asdict(at) for at in found]
