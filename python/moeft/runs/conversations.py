"""Figures of long conversations for the report of a run: perplexity by turn, and recall of early facts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from moeft.config import TuningRecipe
from moeft.data.reading import read_rows
from moeft.data.rows import Row, Rows


class Conversations:
    """Measures what ``evaluation.turn_perplexity`` and ``evaluation.recall`` ask for.

    Args:
        recipe: The recipe.
        show: Where to print what is found.

    Raises:
        DataError: If a file cannot be read, or holds too few exchanges to stand between a fact and its question.
    """

    def __init__(self, recipe: TuningRecipe, show: Callable[[str], None]) -> None:
        from moeft.evaluation.recall import check_filler

        self._settings = recipe.evaluation
        self._max_length = recipe.data.max_length
        self._show = show
        turns, recall = self._settings.turn_perplexity, self._settings.recall
        self._turns = None if turns is None else read_rows(turns, turns="trim")
        self._filler = None if recall is None else read_rows(recall.filler, turns="trim")
        if recall is not None and self._filler is not None:
            check_filler(self._filler.rows, recall.distances)

    def measure(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        """``turns`` and ``recall`` as lists in plain JSON types, each only if asked for.

        Raises:
            DataError: If no conversation fits ``data.max_length``.
        """
        figures: dict[str, Any] = {}
        if self._turns is not None:
            figures["turns"] = self._perplexity(model, tokenizer, self._turns)
        if self._filler is not None:
            figures["recall"] = self._recall(model, tokenizer, self._filler.rows)
        return figures

    def _perplexity(self, model: Any, tokenizer: Any, read: Rows) -> list[dict[str, Any]]:
        from moeft.evaluation.conversation import conversation_perplexity

        rows = self._fitting(tokenizer, read)
        found = conversation_perplexity(model, tokenizer, rows, batch_size=self._settings.batch_size)
        self._show(f"perplexity by turn, {len(rows)} of {len(read.rows)} conversations fit data.max_length:")
        for turn in found:
            self._show(f"  turn {turn.turn}: {turn.perplexity} over {turn.perplexity.num} conversations")
        return [asdict(turn) for turn in found]

    def _fitting(self, tokenizer: Any, read: Rows) -> Sequence[Row]:
        from moeft.data.chat import encode

        encoded = encode(read, tokenizer, max_length=self._max_length)
        left_out = {reject.line for reject in encoded.rejects}
        return [row for row in read.rows if row.line not in left_out]

    def _recall(self, model: Any, tokenizer: Any, filler: Sequence[Row]) -> list[dict[str, Any]]:
        from moeft.evaluation.recall import recall

        settings = self._settings.recall
        assert settings is not None
        found = recall(
            model,
            tokenizer,
            filler,
            distances=settings.distances,
            max_new_tokens=settings.max_new_tokens,
            batch_size=self._settings.batch_size,
        )
        for at in found:
            self._show(f"recall after {at.distance} exchanges: {at.accuracy}, by chance {at.chance:.2g}")
        return [asdict(at) for at in found]
