"""A model in memory as the subject of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from moeft.errors import DataError
from moeft.evaluation.continuations import encode_continuation, encode_windows
from moeft.evaluation.generation import Sampling, iterate_replies, render
from moeft.evaluation.prefix_tree import Scored
from moeft.evaluation.request import Answer, Chat, Choices, Request, Text
from moeft.evaluation.scoring import Scorer

LENGTH_FIELDS = ("n_positions", "max_position_embeddings", "n_ctx")
DEFAULT_LENGTH = 2048


class ModelSubject:
    """Scores texts through the loss head and generates with transformers.

    Args:
        model: A causal language model of transformers, with or without adapters.
        tokenizer: Its tokenizer; with a chat template if replies are asked for.
        identity: What tells it from other models, as plain JSON.
        batch_size: Replies generated at once.
        max_length: Positions to use; None takes all that the model has.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        identity: dict[str, Any] | None = None,
        *,
        batch_size: int = 16,
        max_length: int | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.batch_size = batch_size
        self.max_length = max_length or model_length(model.config)
        self._identity = identity or {}
        self._scorer: Scorer | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """Of the model, and how much of a text it sees."""
        return {**self._identity, "max_length": self.max_length}

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """Answer requests of every kind; those about log-probabilities first."""
        yield from self._score([(i, r) for i, r in enumerate(requests) if isinstance(r, Choices | Text)])
        groups: dict[tuple[Any, ...], list[tuple[int, Chat]]] = {}
        for index, request in enumerate(requests):
            if isinstance(request, Chat):
                key = (request.max_new_tokens, request.temperature, request.top_p, request.seed, bool(request.tools))
                groups.setdefault(key, []).append((index, request))
        for group in groups.values():
            yield from self._generate(group)

    def _score(self, requests: Sequence[tuple[int, Choices | Text]]) -> Iterator[tuple[int, Answer]]:
        if not requests:
            return
        if self._scorer is None:
            self._scorer = Scorer(self.model)
        parts = []
        for index, request in requests:
            try:
                parts.append(self._encode(request))
            except DataError as error:
                parts.append([])
                yield index, {"error": str(error)}
        owners = [(owner, place) for owner, of_one in enumerate(parts) for place in range(len(of_one))]
        scores: list[dict[int, float]] = [{} for _ in requests]
        for number, score in self._scorer.score([part for of_one in parts for part in of_one]):
            owner, place = owners[number]
            scores[owner][place] = score
            if len(scores[owner]) == len(parts[owner]):
                index, request = requests[owner]
                yield index, _answer(request, parts[owner], [scores[owner][i] for i in range(len(parts[owner]))])

    def _encode(self, request: Choices | Text) -> list[Scored]:
        if isinstance(request, Text):
            return encode_windows(self.tokenizer, request.text, self.max_length)
        encoded = (
            encode_continuation(self.tokenizer, request.context, continuation, self.max_length)
            for continuation in request.continuations
        )
        return list(encoded)

    def _generate(self, requests: Sequence[tuple[int, Chat]]) -> Iterator[tuple[int, Answer]]:
        first = requests[0][1]
        if first.tools:
            self._check_shows_tools(first)
        replies = iterate_replies(
            self.model,
            self.tokenizer,
            [request.messages for _, request in requests],
            max_new_tokens=first.max_new_tokens,
            batch_size=self.batch_size,
            sampling=Sampling(first.temperature, first.top_p, first.seed),
            tools=[request.tools for _, request in requests],
            skip_special_tokens=not first.tools,  # Calls of some protocols are made of them.
        )
        for place, reply in replies:
            yield requests[place][0], {"reply": reply}

    def _check_shows_tools(self, request: Chat) -> None:
        if self.tokenizer.chat_template and render(self.tokenizer, request.messages, request.tools) == render(
            self.tokenizer, request.messages
        ):
            raise DataError(
                "the chat template leaves tools out, so the model would not see them; write them into the prompt with "
                "--tool-protocol python, or set a template that shows tools"
            )


def model_length(config: Any) -> int:
    """Positions of a model, as its config tells them; 2048 if it does not."""
    text = config.get_text_config()
    lengths = (getattr(text, name, None) for name in LENGTH_FIELDS)
    return next((length for length in lengths if length), DEFAULT_LENGTH)


def _answer(request: Choices | Text, parts: Sequence[Scored], scores: Sequence[float]) -> Answer:
    if not all(map(math.isfinite, scores)):
        return {"error": "a log-probability is not a finite number; look for weights that are none, or for an overflow"}
    if isinstance(request, Choices):
        return {"log_probs": list(scores)}
    return {"log_prob": sum(scores), "tokens": sum(len(part.tokens) - part.first for part in parts)}
